"""AUTOMATIC1111's API on this farm: its clients send and get what they are used to, and each sees only their own work."""

from fastapi import APIRouter

from latentfarm.api.sdapi import catalog, queue, state, txt2img

router = APIRouter()
for part in (txt2img, state, catalog, queue):
    router.include_router(part.router)
