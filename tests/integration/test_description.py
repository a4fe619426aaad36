"""The whole OpenAPI description against the app: no crash, no answer that is not described, whatever is sent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from latentfarm.api import create_app
from latentfarm.embedded.local import LocalFarm
from latentfarm.farm import DirectFarm
from latentfarm.keys import SCOPES, ApiKeys
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi.checks import status_code_conformance

EXAMPLES = 15  # a route, of requests that fit its description and of those that do not
HURRIED = {"X-Farm-Wait": "0"}  # there is no worker to wait for


@pytest.fixture
def farm(tmp_path: Path) -> Iterator[DirectFarm]:
    """A farm of its own, for what is sent here leaves traces everywhere."""
    with LocalFarm(tmp_path, workers=0) as local:
        yield local.farm


@pytest.mark.timeout(600)
def test_every_route_answers_as_it_is_described(farm: DirectFarm) -> None:
    _, word = ApiKeys(farm.ledger).create("ops", scopes=SCOPES)
    headers = HURRIED | {"host": "localhost", "authorization": f"Bearer {word}"}
    schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(farm), headers=headers)
    failures = []
    operations = [found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)]
    for operation in operations:
        for mode in GenerationMode:
            try:
                _try(operation, mode, headers)
            except (Exception, BaseExceptionGroup) as error:  # noqa: BLE001 - all are told at the end
                failures.append(f"{operation.label}, {mode.value}: {type(error).__name__} {str(error)[:1500]}")

    assert len(operations) > 80
    assert not failures, "\n\n".join(failures)


def _try(operation: APIOperation[Any, Any, Any, Any], mode: GenerationMode, headers: dict[str, str]) -> None:
    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(case=operation.as_strategy(generation_mode=mode))
    def answers(case: Any) -> None:
        response = case.call(headers=headers)
        case.validate_response(response, checks=[not_a_server_error, status_code_conformance])

    with suppress(Unsatisfiable):  # nothing can be wrong with a route that takes nothing
        answers()
