"""The farm's own API, under `/api/v1`."""

from fastapi import APIRouter

from latentfarm.api.problems import documented
from latentfarm.api.v1 import admin, embeddings, images, jobs, webhooks

router = APIRouter(prefix="/api/v1", responses=documented())
for part in (jobs, images, embeddings, admin, webhooks):
    router.include_router(part.router)
