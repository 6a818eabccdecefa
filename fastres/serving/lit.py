"""LitServe with what it lacks: a worker that waits without polling, and an end that loses nothing.

Only :func:`fastres.serving.serve` and :func:`fastres.serving.api` import this module, which needs
litserve. Facts of 0.2.19 that it rests on are tested in tests/serving/test_server.py.
"""

import asyncio  # no annotations as text here: LitServe and FastAPI read them as they are
import copy
import logging
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import wait
from queue import Empty
from socket import SO_ACCEPTCONN, SOL_SOCKET
from threading import Thread
from typing import Annotated, Any

import litserve
from fastapi import Depends, HTTPException, Request
from fastapi.responses import JSONResponse
from litserve.loops.base import collate_requests
from litserve.loops.simple_loops import BatchedLoop
from litserve.utils import WorkerSetupStatus
from starlette.exceptions import HTTPException as AnyHTTPException

from ..perf.host_memory import keep_memory
from .guard import BATCH_HEADER
from .predictor import Predictor

SIGNALS = (signal.SIGINT, signal.SIGTERM)


async def image_in(request: Request) -> bytes:
    """What is in the field ``file`` of a form, else the body itself."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        return await request.body()
    upload = (await request.form()).get("file")
    if isinstance(upload, str) or upload is None:
        raise HTTPException(422, "the form has no file in a field of the name 'file'")
    return await upload.read()


class Api(litserve.LitAPI):
    """Image files in requests to labels in answers; each worker process has its own Predictor.

    Args:
        options: of :class:`fastres.serving.Predictor`, its device left out.
        max_batch: images that are computed together at most.
        batch_wait: seconds that the first of them waits for others.
    """

    def __init__(
        self, options: dict[str, Any], max_batch: int = 1, batch_wait: float = 0.0
    ) -> None:
        loop = {"loop": Waiting()} if max_batch > 1 else {}
        super().__init__(max_batch_size=max_batch, batch_timeout=batch_wait, **loop)
        self.options = options

    def setup(self, device: str) -> None:
        """Load the network, in the worker; ``device`` is LitServe's, such as ``cuda:0``."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it reaches all; the first process decides
        log_to_stderr()
        keep_memory()
        on_cpu = {"threads": 1} if device == "cpu" else {}
        options = {"max_batch": self.max_batch_size, **on_cpu, **self.options, "device": device}
        self.predictor = Predictor(**options)

    def decode_request(self, request: Annotated[bytes, Depends(image_in)]) -> bytes:
        return request

    def predict(self, x: Any) -> Any:
        answers = self.predictor.many(x if isinstance(x, list) else [x])
        found = [(answer, len(answers)) for answer in answers]
        return found if isinstance(x, list) else found[0]

    def encode_response(self, output: tuple[dict[str, Any], int]):  # type: ignore # noqa: ANN201
        answer, batch = output  # an exception from here would be that of the whole batch
        return JSONResponse(answer, 422 if "error" in answer else 200, {BATCH_HEADER: str(batch)})


class Waiting(BatchedLoop):
    """LitServe's loop for batches asks an empty queue a thousand times a second, and leaves in a
    long one what it cannot fetch within the wait; this one waits, and fetches before it does."""

    def get_batch_requests(self, lit_api: Any, request_queue: Any, transport: Any) -> Any:
        queue = First(request_queue)
        taken: list[Any] = []
        late: list[Any] = []
        for seconds in (0, lit_api.batch_timeout):
            rules = copy.copy(lit_api)
            rules.batch_timeout = seconds
            rules.max_batch_size -= len(taken)
            found = collate_requests(self, rules, queue, transport)
            taken, late = taken + found[0], late + found[1]
        return taken, late


class First:
    """A queue, one item of which has been waited for."""

    def __init__(self, queue: Any) -> None:
        self.queue = queue
        self.items: list[Any] = []
        while not self.items:
            with suppress(Empty):
                self.items.append(queue.get(timeout=1.0))

    def get(self, timeout: float) -> Any:
        return self.items.pop() if self.items else self.queue.get(timeout=timeout)

    def get_nowait(self) -> Any:
        return self.items.pop() if self.items else self.queue.get_nowait()


class Answers(dict[str, Any]):
    """Where LitServe keeps what requests wait for; it forgets none of those that were cancelled."""

    def __setitem__(self, uid: str, item: Any) -> None:
        super().__setitem__(uid, item)
        if task := asyncio.current_task():
            task.add_done_callback(lambda _: self.pop(uid, None))


class Server(litserve.LitServer):
    """LitServer that ends where it cannot go on, and on SIGINT and SIGTERM when all is answered.

    Args:
        ready: called when requests are taken.
    """

    def __init__(self, api: Api, ready: Callable[[], Any], **options: Any) -> None:
        super().__init__(api, **options)
        self.ready, self.lost = ready, ""
        self.response_buffer = Answers()
        self.monitor_internal = 0.2  # seconds between two looks at the workers, which are restarted
        self.app.add_exception_handler(AnyHTTPException, said)  # those of Starlette too

    def run(self, **options: Any) -> None:
        """Serve until a signal comes. Raises RuntimeError where the server itself failed."""
        others = set(multiprocessing.active_children())
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        try:
            super().run(generate_client_file=False, num_api_servers=1, **options)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            for child in set(multiprocessing.active_children()) - others:
                child.kill()  # what was still starting when an error or a signal came
        if self.lost:
            raise RuntimeError(self.lost)

    def verify_worker_status(self) -> None:
        """Wait for a worker that is ready; LitServe would wait for ever for one that was killed."""
        while WorkerSetupStatus.READY not in self.workers_setup_status.values():
            for worker in self.inference_workers:
                if worker.exitcode is not None:
                    raise RuntimeError(
                        f"a worker ended with exit code {worker.exitcode} before it was ready"
                    )
            time.sleep(0.05)

    def _start_server(self, *args: Any, **options: Any) -> Any:
        log_to_stderr()
        processes = super()._start_server(*args, **options)
        for number in SIGNALS:
            signal.signal(number, lambda *_: Thread(target=self.stop).start())
        Thread(target=self._watch, args=(processes[0],), daemon=True).start()
        (listening,) = next(argument for argument in args if isinstance(argument, list))
        while not listening.getsockopt(SOL_SOCKET, SO_ACCEPTCONN) and processes[0].is_alive():
            time.sleep(0.01)
        self.ready()
        return processes

    def stop(self) -> None:
        """Let :meth:`run` end. The main thread waits on this event, so that another must set it."""
        with suppress(OSError, EOFError):  # it has ended
            self._shutdown_event.set()

    def _watch(self, http: Any) -> None:
        """Where the process that takes requests dies, nobody would notice."""
        wait([http.sentinel])
        with suppress(OSError, EOFError):
            if not self._shutdown_event.is_set():
                http.join()
                self.lost = f"the process that takes requests ended with exit code {http.exitcode}"
                self.stop()


async def said(request: Request, error: Any) -> JSONResponse:
    """An error of FastAPI and LitServe in the form that the Guard's have."""
    return JSONResponse({"error": error.detail}, error.status_code)


def log_to_stderr() -> None:
    """LitServe's log away from standard output, where --json prints."""
    for handler in logging.getLogger("litserve").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)
