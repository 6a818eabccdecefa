"""What runs a job's workers: processes of this machine, or Ray Data. Both call ``run_part``."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, cast

import torch

from ..bench.run import parse_device
from ..errors import MissingDependencyError
from ..perf.environment import worker_cores
from .parts import Place

if TYPE_CHECKING:
    from .job import BatchJob

Work = Callable[[list[int]], Iterator[Any]]


def refuse_local(places: Sequence[Place]) -> None:
    """Raises ValueError for a local one, which may be another on each machine of a cluster."""
    for place in places:
        if place.local:
            raise ValueError(
                f"{place} is a local path, and the machines of a cluster may have different files "
                "there: name an object store, or say that they share it with shared_fs"
            )


@contextmanager
def opened(job: BatchJob) -> Iterator[Work]:
    """The engine of a job: a function that does parts and yields as each is done.

    The job's device and dtype are settled here, so that all workers have the same.
    """
    described = job.described  # a mistake is said before anything starts
    if job.engine == "local":
        device = parse_device(job.options.get("device", "auto"))
        cuda = device.type == "cuda"
        _settle(job, described, str(device))
        yield lambda todo: _local(job, todo, torch.cuda.device_count() if cuda else 0)
        return
    ray, mine = _ray(job)
    try:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        wanted = job.options.get("device", "auto")
        cuda = wanted.startswith("cuda") or (wanted == "auto" and gpus > 0)
        if cuda and not gpus:
            raise ValueError("device is cuda, but the Ray cluster has no GPU")
        _settle(job, described, "cuda" if cuda else "cpu")
        yield lambda todo: _on_ray(ray, job, todo, gpus if cuda else 0)
    finally:
        if mine:
            ray.shutdown()


def _settle(job: BatchJob, described: dict[str, Any], device: str) -> None:
    cuda = device.startswith("cuda")
    defaults = {"threads": 1}  # more cost time where cores are shared
    if cuda:
        defaults = {"decode_threads": max(1, worker_cores() // max(1, torch.cuda.device_count()))}
    fused = str(job.options.get("model", "")).endswith(".safetensors")
    if job.options.get("dtype", "auto") == "auto" and not fused:
        job.options["dtype"] = described["dtype"] = "bfloat16" if cuda else "float32"
    given = {name: value for name, value in job.options.items() if value is not None}
    job.options = {**defaults, **given, "device": device}


class _Worker:
    """A process that does one part after another, as it is told by lines of JSON."""

    def __init__(self, job: BatchJob, device: str) -> None:
        code = "from fastres.batch import BatchJob, engines; engines.work(BatchJob)"
        path = os.pathsep.join(filter(None, sys.path))  # from where this process has its modules
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for the driver
            **pipes,
        )
        self.device, self.part = device, -1
        self.tell({**job.to_dict(), "device": device})

    def tell(self, what: Any) -> None:
        with suppress(BrokenPipeError):  # that it is dead is seen where it is listened to
            print(json.dumps(what), file=self.process.stdin, flush=True)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


def _local(job: BatchJob, todo: list[int], gpus: int) -> Iterator[int]:
    """A dead worker is replaced, and the part that it had comes first."""
    waiting = deque(todo)
    count = min(job.arguments["workers"] or gpus or worker_cores(), len(todo))
    device = job.options["device"]
    places = [f"cuda:{k % gpus}" if device == "cuda" else device for k in range(count)]
    workers: dict[Any, _Worker] = {
        w.process.stdout: w for w in (_Worker(job, place) for place in places)
    }
    try:
        while workers:
            for stream in cast(list[Any], wait(list(workers))):
                worker, line = workers[stream], stream.readline()
                if not line:
                    code = worker.process.wait()
                    if worker.part < 0:
                        raise RuntimeError(f"a worker ended before it was ready, by code {code}")
                    del workers[stream]
                    waiting.appendleft(worker.part)
                    new = _Worker(job, worker.device)
                    workers[new.process.stdout] = new
                    continue
                said = json.loads(line)
                if said.get("error"):
                    raise RuntimeError(said["error"])
                if "part" in said:
                    yield said["part"]
                if waiting:
                    worker.part = waiting.popleft()
                    worker.tell(worker.part)
                else:
                    worker.stop()
                    del workers[stream]
    finally:
        for worker in workers.values():
            worker.stop()


def work(make: type[BatchJob]) -> None:
    """The life of a local worker: a job, then parts, on standard input; it ends with its driver."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what others print must not be taken for an answer
    lines: SimpleQueue[Any] = SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            lines.put(json.loads(line))
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    try:
        job = make(**lines.get())
        classifier = job.classifier()
        print(json.dumps({"ready": True}), file=answers, flush=True)
        while True:
            print(json.dumps(job.run_part(lines.get(), classifier)), file=answers, flush=True)
    except Exception as error:
        print(json.dumps({"error": str(error) or type(error).__name__}), file=answers, flush=True)


def _ray(job: BatchJob) -> tuple[Any, bool]:
    """The package, connected; and whether the connection is ours to end."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingDependencyError(
            f"engine ray needs Ray, which cannot be imported ({error}); install fastres[ray]"
        ) from error
    mine, address = not ray.is_initialized(), os.environ.get("RAY_ADDRESS")
    if mine:
        own: dict[str, Any] = {"num_cpus": worker_cores(), "object_store_memory": 256 << 20}
        how = {} if address else {**own, "include_dashboard": False}
        ray.init(
            address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **how
        )
        logging.getLogger("ray.data").setLevel(logging.ERROR)
    if not job.arguments["shared_fs"] and sum(node["Alive"] for node in ray.nodes()) > 1:
        refuse_local(job.places)
    return ray, mine


class _RayWorker:
    """An actor: a part in, done, its number out, or why it cannot be."""

    def __init__(self, job: BatchJob) -> None:
        self.job = job

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        (part,), error = batch["part"], ""
        try:
            self.job.run_part(int(part))
        except Exception as found:  # raised on the driver: Ray would put advice of its own behind
            error = str(found) or type(found).__name__
        return {"part": [part], "error": [error]}


def _on_ray(ray: Any, job: BatchJob, todo: list[int], gpus: int) -> Iterator[int]:
    """One stage: actors read, decode, classify and write, and no task waits for a core of theirs.

    Ray Data retries tasks and restarts actors for ever, as it must: a lost node uses up any number
    before it is found dead. What would kill them for ever is ended by the ledger, which knows all
    attempts since it is in the output.
    """
    ray.data.DataContext.get_current().enable_progress_bars = False
    cpus = int(ray.cluster_resources().get("CPU", 1))
    count = min(job.arguments["workers"] or gpus or cpus, len(todo))
    parts = ray.data.from_items([{"part": i} for i in todo], override_num_blocks=len(todo))
    done = parts.map_batches(
        _RayWorker,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=count),
        fn_constructor_kwargs={"job": type(job)(**job.to_dict())},
        num_cpus=1,
        **({"num_gpus": 1} if gpus else {}),
    )
    try:
        for row in done.iter_rows():
            if row["error"]:
                raise RuntimeError(row["error"])
            yield row["part"]
    except ray.exceptions.RayError as error:
        raise RuntimeError(str(error).strip().splitlines()[-1]) from error
