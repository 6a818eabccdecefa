"""Cases: servers, what they refuse before anything starts, and Triton's model repository."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from fused import images

from fastres.formats.triton_repo import export_repository
from fastres.serving import serve
from fastres.serving.lit import Server, image_in
from messages.models import fast
from messages.provoke import add, case, without
from messages.tools import said, said_of_fused

with socket.socket() as trial:
    trial.bind(("127.0.0.1", 0))
    PORT = trial.getsockname()[1]  # nothing is started on it

for command in (
    *("serve resnet5", "serve resnet18 --port 80", "serve resnet18 --host example.org"),
    *("serve resnet18 --deadline 10", "serve resnet18 --max-body 20XB", "serve --port 8000"),
    "serve resnet18 --deadline 1ms --batch-wait 2ms",
    *("export resnet18 repo --triton-repo --name a/b", "export resnet18 m.onnx --max-batch 8"),
    "export resnet18 repo --triton-repo --triton-backend pytorch",
):
    with_port = f" --port {PORT}" if command.startswith("serve") and "--port" not in command else ""
    add(f"fastres {command}", lambda c=command + with_port: said(c))


@case("fastres serve with labels of another length")
def _() -> object:
    Path("names.txt").write_text("cat\ndog\n")
    return said_of_fused(f"serve fused.safetensors --labels names.txt --port {PORT}")


@case("serve: a port in use")
def _() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", PORT))
        other.listen()
        serve("resnet18", port=PORT)


@case("serve: a limit of no integer")
def _() -> None:
    serve("resnet18", port=PORT, max_queue=1.5)


@case("serve: without litserve")
def _() -> None:
    with without("litserve"):
        serve("resnet18", port=PORT)


@case("serve: a form without the file")
def _() -> None:
    async def form() -> dict[str, str]:
        return {"photo": "a.jpg"}

    headers = {"content-type": "multipart/form-data; boundary=x"}
    asyncio.run(image_in(SimpleNamespace(headers=headers, form=form)))


@case("serve: a worker that dies before it is ready")
def _() -> None:
    worker = SimpleNamespace(exitcode=-9)
    Server.verify_worker_status(
        SimpleNamespace(workers_setup_status={}, inference_workers=[worker])
    )


@case("serve: the process that takes requests dies")
def _() -> None:
    server = mock.Mock(spec=Server, lost="the process that takes requests ended with exit code -9")
    with mock.patch("litserve.LitServer.run"):
        Server.run(server)


def repository(**options: object) -> None:
    export_repository(fast(), "repo", images(), **{"name": "m", "backend": "python", **options})


@case("triton: a name that the repository has")
def _() -> None:
    repository()
    repository()


add("triton: no image at once", lambda: repository(max_batch=0))
