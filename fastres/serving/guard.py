"""Limits and metrics around one path of an ASGI application; LitServe has none of them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)  # seconds
BATCHES = tuple(2**n for n in range(9))
GONE = 499  # what proxies log for a client that did not wait; counted, never sent
BATCH_HEADER = "batch-size"  # of an answer: how many requests were computed together


class Guard:
    """ASGI middleware behind which no request waits for ever and none is dropped in silence.

    A request to ``path`` gets the application's answer or ``{"error": reason}`` with

    - 503 and Retry-After where ``limit`` requests are in the application or on their way to it,
    - 413 for a body of more than ``max_body`` bytes, 408 for one that is late,
    - 504 where the application has not answered in time.

    The application is cancelled where the client goes away, which frees the place. A refusal is
    sent once the body has been taken: before, it would be lost as the connection is reset.
    ``/metrics`` answers Prometheus; other paths pass untouched.

    Args:
        app: the application.
        path: what is guarded.
        deadline: seconds from the start of a request to the end of its answer.
        limit: requests at once; with ``max_body`` it bounds the memory.
        max_body: bytes.

    Raises:
        ImportError: without prometheus-client; fastres[serve] has it.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        path: str = "/predict",
        deadline: float = 10.0,
        limit: int = 128,
        max_body: int = 20_000_000,
    ) -> None:
        import prometheus_client as prometheus

        self.app, self.path, self.deadline = app, path, deadline
        self.limit, self.max_body, self.active = limit, max_body, 0
        registry = prometheus.CollectorRegistry()
        self.metrics = prometheus.make_asgi_app(registry)
        self.requests = prometheus.Counter(
            "fastres_requests", "By the status that they got.", ["code"], registry=registry
        )
        self.seconds = prometheus.Histogram(
            "fastres_request_seconds", "To the answer.", buckets=BUCKETS, registry=registry
        )
        self.batches = prometheus.Histogram(
            "fastres_batch_size", "Of each request's batch.", buckets=BATCHES, registry=registry
        )
        active = prometheus.Gauge("fastres_requests_active", "In the server.", registry=registry)
        active.set_function(lambda: self.active)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        where = scope["path"] if scope["type"] == "http" else None
        if where == self.path:
            await self._guarded(scope, receive, send)
        else:
            await (self.metrics if where == "/metrics" else self.app)(scope, receive, send)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = _Exchange(receive, send, self.max_body, full=self.active >= self.limit)
        start = time.perf_counter()
        self.active += not exchange.full
        try:
            await self._answer(scope, exchange)
        finally:
            self.active -= not exchange.full
            self.requests.labels(exchange.status or 500).inc()
            self.seconds.observe(time.perf_counter() - start)
            if exchange.batch:
                self.batches.observe(exchange.batch)

    async def _answer(self, scope: Scope, exchange: _Exchange) -> None:
        """Send the application's answer, or the refusal where there is none in time."""
        import anyio

        with anyio.move_on_after(self.deadline) as time_left:
            body = await exchange.take()
            if exchange.kept:
                watch = asyncio.create_task(exchange.watch(time_left.cancel))
                try:
                    await self.app(scope, exchange.giving(body), exchange.send)
                finally:
                    watch.cancel()
        if exchange.full:
            await exchange.refuse(503, f"{self.limit} requests are being served; try again later")
        elif exchange.size > self.max_body:
            await exchange.refuse(413, f"the body has more than {self.max_body} bytes")
        elif not exchange.whole:
            await exchange.refuse(408, f"the body did not come within {self.deadline:g} s")
        elif time_left.cancelled_caught:
            await exchange.refuse(504, f"there was no answer within {self.deadline:g} s")


@dataclass
class _Exchange:
    """One request, and how far it and its answer have come."""

    receive: Receive
    out: Send
    most: int
    full: bool
    size: int = 0  # bytes of the body so far
    whole: bool = False
    status: int = 0
    batch: int = 0
    answered: bool = False

    @property
    def kept(self) -> bool:
        """Whether the application is to have the body."""
        return not self.full and self.size <= self.most and self.status != GONE

    async def take(self) -> bytes:
        """The whole body, or of one that is not kept nothing, when its end has come."""
        body = bytearray()
        while not self.whole:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                self.status = GONE
                break
            self.size += len(message.get("body", b""))
            body += message.get("body", b"")
            if not self.kept:
                body.clear()
            self.whole = not message.get("more_body", False)
        return bytes(body)

    def giving(self, body: bytes) -> Receive:
        """What the application reads: the body, then nothing until it is cancelled."""
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            return messages.pop() if messages else await asyncio.Future()

        return receive

    async def watch(self, leave: Callable[[], None]) -> None:
        """Cancel the application where the client goes before its answer is whole."""
        while (await self.receive())["type"] != "http.disconnect":
            pass
        if not self.answered:
            self.status = self.status or GONE
            leave()

    async def send(self, message: Message) -> None:
        """Pass on what the application sends, and note it."""
        if message["type"] == "http.response.start":
            headers = dict(message.get("headers", ()))
            self.status, self.batch = message["status"], int(headers.get(BATCH_HEADER.encode(), 0))
        else:
            self.answered = not message.get("more_body", False)
        await self.out(message)

    async def refuse(self, status: int, reason: str) -> None:
        """Send an error, where nothing was sent and somebody listens."""
        if self.status:
            return
        body = json.dumps({"error": reason}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        headers.append((b"connection", b"close"))  # the rest of a body is no next request
        if status == 503:
            headers.append((b"retry-after", b"1"))
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})
