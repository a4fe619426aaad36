"""The ledger: Redis holds every job, claim and lease; each transition is one atomic script."""

from latentfarm_shared.ledger.ledger import SOMEBODY_LOOKS, Claim, Ledger
from latentfarm_shared.ledger.states import (
    ImageState,
    JobEvent,
    JobState,
    JobStatus,
    Limits,
    Stamp,
    Submission,
    WorkerStatus,
)

__all__ = [
    "SOMEBODY_LOOKS",
    "Claim",
    "ImageState",
    "JobEvent",
    "JobState",
    "JobStatus",
    "Ledger",
    "Limits",
    "Stamp",
    "Submission",
    "WorkerStatus",
]
