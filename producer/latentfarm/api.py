"""The HTTP API: submission, status, pictures and health, on the same core as the SDK."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from latentfarm_shared import __version__
from latentfarm_shared.errors import FarmError, UnknownName
from latentfarm_shared.specs import JobSpec

from latentfarm.farm import Farm
from latentfarm.jobs import FarmImage, ImageNotReady

_HTTP_OF_EXIT = {1: 500, 2: 422, 3: 503, 4: 504}


def create_app(farm: Farm) -> FastAPI:
    """Build the app around a farm; handlers run in threads, for the farm's clients block."""
    app = FastAPI(title="latentfarm", version=__version__)

    @app.exception_handler(FarmError)
    def on_error(_request: Request, error: FarmError) -> JSONResponse:
        """Answer with RFC 9457's fields."""
        status = 404 if isinstance(error, UnknownName) and error.kind == "job" else _HTTP_OF_EXIT[error.exit_code]
        status = 409 if isinstance(error, ImageNotReady) else status
        problem = {"status": status, "code": error.code, "title": str(error)}
        return JSONResponse(problem, status, media_type="application/problem+json")

    @app.get("/healthz")
    def health() -> dict[str, str]:
        """Say that this process is alive."""
        return {"status": "ok", "version": __version__}

    @app.get("/readyz")
    def ready() -> dict[str, str]:
        """Say whether Redis and S3 answer."""
        farm.ledger.check()
        farm.store.check()
        return {"status": "ok"}

    @app.post("/api/v1/jobs", status_code=202)
    def submit(spec: dict[str, Any]) -> dict[str, Any]:
        """Submit a job."""
        return _job(farm, farm.submit(JobSpec.check(spec)).id)

    @app.get("/api/v1/jobs")
    def list_jobs(limit: int = 50) -> list[dict[str, Any]]:
        """List the newest jobs first."""
        return [status.model_dump() for status in farm.ledger.jobs(min(limit, 500))]

    @app.get("/api/v1/jobs/{job_id}")
    def job(job_id: str) -> dict[str, Any]:
        """Return where a job stands."""
        return _job(farm, job_id)

    @app.get("/api/v1/jobs/{job_id}/images")
    def images(job_id: str, start: int = 0, limit: int = 100) -> list[dict[str, object]]:
        """Return a page of a job's images."""
        page = farm.job(job_id).iter_images(max(0, start), max(0, start) + min(limit, 1000))
        return [image.summary() for image in page]

    @app.get("/api/v1/jobs/{job_id}/images/{index}.png")
    def picture(job_id: str, index: int) -> Response:
        """Return one picture."""
        return Response(_image(farm, job_id, index).png(), media_type="image/png")

    @app.get("/api/v1/workers")
    def workers() -> list[dict[str, Any]]:
        """List the workers that are alive."""
        return [worker.model_dump() for worker in farm.workers()]

    return app


def _job(farm: Farm, job_id: str) -> dict[str, Any]:
    return farm.ledger.status(job_id).model_dump()


def _image(farm: Farm, job_id: str, index: int) -> FarmImage:
    found = next(farm.job(job_id).iter_images(index, index + 1), None)
    if found is None or index < 0:
        raise UnknownName("job", f"{job_id}/{index}")
    return found
