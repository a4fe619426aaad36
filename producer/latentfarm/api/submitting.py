"""Submitting in a caller's name: scopes, what the key may still have, and requests that are repeated."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from latentfarm_shared.errors import FarmError, InvalidField
from latentfarm_shared.specs import JobSpec

from latentfarm.api.callers import Caller, Callers
from latentfarm.jobs import Job

_JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{7,63}")


def digest_of(request: Mapping[str, Any]) -> str:
    """Return what tells one request from another."""
    return hashlib.sha256(json.dumps(request, sort_keys=True, default=str).encode("utf-8", "replace")).hexdigest()


def check_job_id(job_id: str | None) -> str | None:
    """Return an id that a client chose for its job.

    Raises:
        InvalidField: it is none.
    """
    if job_id is not None and not _JOB_ID.fullmatch(job_id):
        raise InvalidField("id", "should be 8 to 64 letters, digits, - and _")
    return job_id


def submit(
    callers: Callers, caller: Caller, spec: JobSpec, *, job_id: str | None = None, request: str | None = None
) -> Job:
    """Submit a job in a caller's name; one that was submitted before costs nothing of what the key may have.

    Raises:
        UsageError, Busy, Unavailable: as DirectFarm.submit.
        NotAllowed: the key may not submit so many images any more.
    """
    known = caller.farm.submitted(spec, job_id, request)
    return known or charged(callers, caller, [spec], lambda: [caller.farm.submit(spec, job_id, request)])[0]


def charged(callers: Callers, caller: Caller, specs: Sequence[JobSpec], send: Callable[[], list[Job]]) -> list[Job]:
    """Count the images of jobs against what the caller's key may have while they are sent; uncount what was not new."""
    if caller.key is None:
        return send()
    images = sum(spec.total for spec in specs)
    callers.keys.charge(caller.key, images)
    try:
        jobs = send()
    except FarmError:
        callers.keys.give_back(caller.key, images)
        raise
    known = sum(job.spec.total for job in jobs if job.is_known)
    if known:
        callers.keys.give_back(caller.key, known)
    return jobs
