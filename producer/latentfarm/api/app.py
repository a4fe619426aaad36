"""The app: routers, guards, and what runs beside the requests."""

from __future__ import annotations

import asyncio
import contextlib
import json
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import Response
from latentfarm_shared import __version__
from latentfarm_shared.errors import FarmError, Unavailable
from latentfarm_shared.logs import log
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from latentfarm.api import links, openai, sdapi, v1
from latentfarm.api.answers import Healthy, answer
from latentfarm.api.callers import Callers
from latentfarm.api.guards import Guard
from latentfarm.api.links import Links
from latentfarm.api.openai.batch_runner import BatchRunner
from latentfarm.api.openai.requests import ImagesRequest
from latentfarm.api.polls import Polls
from latentfarm.api.problems import (
    MEDIA,
    Problem,
    a1111_style,
    documented,
    openai_style,
    problem_of,
    problem_of_request,
)
from latentfarm.api.sdapi.requests import Txt2ImgRequest
from latentfarm.api.v1.jobs import JobRequest
from latentfarm.api.waits import Repeats
from latentfarm.api.watch import Watch
from latentfarm.api.webhooks import HookWatcher, Sender
from latentfarm.farm import DirectFarm
from latentfarm.keys import ApiKeys

MAX_BODY = 2 * 2**20
STEP_S = 0.5
DESCRIPTION = """A Stable Diffusion render farm that takes textual-inversion embeddings seriously.

An embedding is applied or the job is refused, with the reason. Errors are RFC 9457 problems with a `code` for programs.
Send your API key as `Authorization: Bearer KEY`, as the password of Basic authorization, or as `X-API-Key`; a farm without
keys needs none and listens on its own machine alone."""
STYLES = (
    ("/sdapi/", a1111_style),
    ("/internal/", a1111_style),
    ("/agent-scheduler/", a1111_style),
    ("/v1/", openai_style),
)
SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "basic": {"type": "http", "scheme": "basic", "description": "The password is the key."},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}


def create_app(farm: DirectFarm) -> FastAPI:
    """Build the app around a farm; handlers that ask Redis or S3 run in threads, for those clients block."""
    app = FastAPI(
        title="latentfarm", version=__version__, description=DESCRIPTION, lifespan=_living, max_body_size=MAX_BODY
    )
    keys = ApiKeys(farm.ledger)
    app.state.callers, app.state.watch, app.state.repeats = Callers(farm, keys), Watch(farm.ledger), Repeats(farm)
    app.state.links = Links(farm)
    batches = BatchRunner(app.state.callers, app.state.links)
    app.state.steps = (batches.step, HookWatcher(farm).step, Sender(farm).step)
    origins = farm.settings.api_origins
    if origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"], max_age=600
        )
    inner, is_open = app.build_middleware_stack, not keys.are_needed()
    app.build_middleware_stack = lambda: Guard(  # type: ignore[method-assign]
        Polls(inner(), farm.ledger), origins, _admission(app), is_open=is_open
    )
    app.add_exception_handler(FarmError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_bad_request)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(Exception, _on_bug)
    app.include_router(v1.router)
    for part in (sdapi, openai, links):
        app.include_router(part.router)
    _add_health(app, farm)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


@contextlib.asynccontextmanager
async def _living(app: FastAPI) -> AsyncIterator[None]:
    """Run beside the requests what they share."""
    tasks = [asyncio.create_task(app.state.watch.run())]
    tasks += [asyncio.create_task(_repeat(step, STEP_S)) for step in app.state.steps]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _repeat(step: Callable[[], None], pause_s: float) -> None:
    """Do a thing again and again, in a thread; while a service is away it waits."""
    while True:
        try:
            await run_in_threadpool(step)
        except Unavailable as error:
            log.warning("will try again", error=str(error))
        except Exception as error:  # noqa: BLE001 - one thing that is broken must not end the others
            log.error("a background step failed", error=type(error).__name__)
        await asyncio.sleep(pause_s)


def _add_health(app: FastAPI, farm: DirectFarm) -> None:
    @app.get("/healthz", tags=["health"])
    async def health() -> Healthy:
        """Say that this process is alive."""
        return Healthy(version=__version__)

    @app.get("/readyz", tags=["health"], response_model=Healthy, responses={503: documented()[503]})
    def ready() -> Response:
        """Say whether Redis and S3 answer."""
        farm.ledger.check()
        farm.store.check()
        return answer(Healthy(version=__version__))


def _admission(app: FastAPI) -> Callable[[Request], Awaitable[Response | None]]:
    """Return what lets callers in, before what they send is read, or answers them."""

    async def admit(request: Request) -> Response | None:
        try:
            request.state.caller = await app.state.callers.find(request)
        except FarmError as error:
            return _told(request, problem_of(error))
        return None

    return admit


def _told(request: Request, problem: Problem, headers: dict[str, str] | None = None) -> Response:
    request_id = getattr(request.state, "request_id", None)
    body = problem.model_copy(update={"request_id": request_id}).model_dump(mode="json", exclude_defaults=True)
    body |= {"type": problem.type, "title": problem.title, "status": problem.status, "code": problem.code}
    headers = dict(headers or {})
    style = next((style for prefix, style in STYLES if request.url.path.startswith(prefix)), None)
    media = MEDIA if style is None else "application/json"
    body = body if style is None else style(problem, body)
    if style is openai_style and problem.status == 422:
        problem = problem.model_copy(update={"status": 400})
    if style is openai_style and problem.status == 500:
        headers["x-should-retry"] = "false"  # the same request fails again
    if problem.retry_after is not None:
        headers["retry-after"] = str(problem.retry_after)
    if problem.status == 401:
        headers["www-authenticate"] = 'Bearer realm="latentfarm"'
    return Response(json.dumps(body, ensure_ascii=False), problem.status, headers, media)


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, FarmError)  # noqa: S101 - it is registered for these
    return _told(request, problem_of(error))


async def _on_bad_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - as above
    return _told(request, problem_of_request(error))


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - as above
    if error.status_code in (204, 304):
        return Response(status_code=error.status_code)
    code = {404: "NO_ROUTE", 405: "NO_METHOD", 413: "TOO_LARGE"}.get(error.status_code, "BAD_REQUEST")
    problem = Problem(title=str(error.detail), status=error.status_code, code=code)
    return _told(request, problem, dict(error.headers or {}))


async def _on_bug(request: Request, error: Exception) -> Response:
    """Tell nothing of what broke but the request's id, under which the log has where: not what, which may be private."""
    request_id = getattr(request.state, "request_id", None)
    where = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)[-8:]]
    log.error("request failed", error=type(error).__name__, at=" > ".join(where), id=request_id)
    problem = Problem(title="something broke here; the log has it under this request's id", status=500, code="INTERNAL")
    return _told(request, problem)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """Return the description of all routes, made once."""
    if app.openapi_schema:
        return app.openapi_schema
    schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    components = schema.setdefault("components", {})
    components["securitySchemes"] = SCHEMES
    schema["security"] = [{name: []} for name in SCHEMES] + [{}]
    for model in (Problem, JobRequest, Txt2ImgRequest, ImagesRequest):
        found = model.model_json_schema(ref_template="#/components/schemas/{model}")
        components.setdefault("schemas", {}).update(found.pop("$defs", {}))
        components["schemas"][model.__name__] = found
    app.openapi_schema = schema
    return schema
