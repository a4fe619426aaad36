"""OpenAI's API on this farm: images, models, files and batches; its clients need another `base_url` and nothing else."""

from fastapi import APIRouter

from latentfarm.api.openai import batches, files, images

router = APIRouter(prefix="/v1", tags=["OpenAI"])
for part in (images, files, batches):
    router.include_router(part.router)
