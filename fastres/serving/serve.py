"""The server of ``fastres serve``: checked before anything starts, then run by LitServe."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..batch.classifier import Classifier, check_counts
from ..bench.run import parse_device
from ..errors import MissingDependencyError
from ..perf.environment import worker_cores
from .guard import Guard

if TYPE_CHECKING:
    from .lit import Api

HOSTS = ("127.0.0.1", "0.0.0.0", "::")  # those that LitServe knows
PAGE = Path(__file__).with_name("page.html")
ONLY_ITS_OWN = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
ONLY_ITS_OWN += "connect-src 'self'; img-src blob: data:"


def api(model: str, *, max_batch: int = 1, batch_wait: float = 0.0, **options: Any) -> Api:
    """The network as a ``litserve.LitAPI``, for a LitServer of one's own.

    Args:
        model: as :class:`fastres.serving.Predictor` takes it.
        max_batch: images that are computed together at most.
        batch_wait: seconds that the first of them waits for others; 0 takes those that are there.
        options: of the Predictor.

    Raises:
        MissingDependencyError: litserve is missing.
    """
    _litserve()
    from .lit import Api

    return Api({"model": model, **options}, max_batch, batch_wait)


def serve(
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    workers: int | None = None,
    max_batch: int | None = None,
    batch_wait: float = 0.002,
    deadline: float = 10.0,
    max_queue: int = 128,
    max_body: int = 20_000_000,
    page: bool = True,
    device: str = "auto",
    ready: Callable[[dict[str, Any]], Any] = lambda _: None,
    **options: Any,
) -> None:
    """Answer ``POST /predict`` until SIGINT or SIGTERM, then end when all is answered.

    The image is the field ``file`` of a form, or the body. Beside it: ``/health``, ``/info``,
    ``/metrics`` and the page ``/ui``. A worker that dies is replaced.

    Args:
        model: as :class:`fastres.serving.Predictor` takes it.
        host: ``"127.0.0.1"``, this machine alone; ``"0.0.0.0"`` and ``"::"``, everybody.
        port: from 1024 on.
        workers: processes for each device, by default one for each core, or each GPU.
        max_batch: images computed together at most, by default 1 on a CPU and 32 on CUDA.
        batch_wait: seconds that the first of a batch waits for others.
        deadline: seconds after which a request is answered 408 or 504.
        max_queue: requests at once; others are answered 503.
        max_body: bytes of a request; longer ones are answered 413.
        page: whether there is a page.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``, which is all GPUs.
        ready: called, when requests are taken, with ``url``, ``workers`` and others.
        options: of the Predictor: weights, checkpoint, labels, dtype, top.

    Raises:
        ValueError: an argument out of its range; nothing has started by then.
        OSError: the port is in use, or a file is missing.
        MissingDependencyError: litserve is missing.
        UnknownModelError, WeightsError, CheckpointError: as the Predictor says.
        RuntimeError: the workers could not start, or the server died.
    """
    kind = parse_device(device).type
    workers = workers or (worker_cores() if kind == "cpu" else 1)
    max_batch = max_batch or (1 if kind == "cpu" else 32)
    counts = {"workers": workers, "max_batch": max_batch}
    check_counts(optional=False, **counts, max_queue=max_queue, max_body=max_body)
    if not 0 <= batch_wait < deadline < float("inf"):
        raise ValueError(
            "deadline must be more seconds than batch_wait, from 0 on; "
            f"got {deadline} and {batch_wait}"
        )
    _check_port(host, port)
    _litserve()
    network = Classifier(model, device="cpu", **options)
    state = network.to_dict() | {"model": model, "classes": len(network.names)}
    del network  # each worker has its own
    from .lit import Server

    devices = torch.cuda.device_count() if kind == "cuda" else 1
    address = f"http://{'localhost' if host in HOSTS[1:] else host}:{port}"
    shown = {"url": address, "workers": workers * devices, "max_batch": max_batch, "device": kind}
    server = Server(
        api(model, max_batch=max_batch, batch_wait=batch_wait, **options),
        lambda: ready(state | shown),
        accelerator=kind,
        devices=devices,
        workers_per_device=workers,
        timeout=deadline,  # what the Guard has given up on is not computed
        restart_workers=True,
        disable_openapi_url=True,  # its page of documentation loads scripts from elsewhere
        model_metadata=state | shown,
        middlewares=[(Guard, {"deadline": deadline, "limit": max_queue, "max_body": max_body})],
    )
    server.uvicorn_graceful_timeout = max(30, int(deadline) + 5)
    if page:
        server.app.add_api_route("/ui", show_page, methods=["GET"])
    server.run(host=host, port=port, log_level="warning")


def show_page() -> Any:
    """The page on which a photograph is dropped."""
    from fastapi.responses import HTMLResponse

    return HTMLResponse(PAGE.read_text(), headers={"content-security-policy": ONLY_ITS_OWN})


def _check_port(host: str, port: int) -> None:
    """Raises ValueError for an address that cannot be, OSError for one that is not to be had."""
    if host not in HOSTS:
        raise ValueError(f"host must be one of {', '.join(HOSTS)}; got {host!r}")
    if not 1024 <= port <= 65535:
        raise ValueError(f"port must be from 1024 to 65535; got {port}")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except OSError as error:
            raise OSError(f"port {port} of {host} cannot be had: {error.strerror}") from error


def _litserve() -> None:
    try:
        import litserve  # noqa: F401
        import prometheus_client  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"serving needs litserve, which cannot be imported ({error}); install fastres[serve]"
        ) from error
