"""fastres behind Ray Serve, for those who run a Ray cluster already.

    pip install "fastres[vision]" "ray[serve]"
    serve run examples.ray_serve:app

Ray Serve batches, scales and restarts; fastres answers lists of images. Put a proxy that buffers
bodies before it: here a stalled upload keeps its place in ``max_ongoing_requests``.
"""

import asyncio

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from ray import serve

from fastres.serving import Predictor

MODEL = "resnet50"
MAX_BATCH = 8
LARGEST = 20_000_000  # bytes of a body
http = FastAPI()


@serve.deployment(
    num_replicas=1,
    max_ongoing_requests=64,
    max_queued_requests=128,  # one more is answered 503
    ray_actor_options={"num_cpus": 1},
    health_check_period_s=2,
    graceful_shutdown_timeout_s=20,
)
@serve.ingress(http)
class Photographs:
    """One replica: its network, and batches of whatever requests come together."""

    def __init__(self, model: str = MODEL) -> None:
        self.predictor = Predictor(model, max_batch=MAX_BATCH, threads=1)

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=0.002)
    async def many(self, images: list[bytes]) -> list[dict]:
        return await asyncio.to_thread(self.predictor.many, images)

    @http.post("/predict")
    async def predict(self, request: Request) -> JSONResponse:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > LARGEST:
                return JSONResponse({"error": f"the body has more than {LARGEST} bytes"}, 413)
        answer = await self.many(bytes(body))
        return JSONResponse(answer, 422 if "error" in answer else 200)

    @http.get("/health")
    async def health(self) -> str:
        return "ok"


app = Photographs.bind()
