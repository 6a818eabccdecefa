"""Cases: batch jobs, what they refuse before anything is written, and what ends them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pyarrow
import torch
from batches import do, photo, write_model
from pyarrow.parquet import write_table

import fastres
from fastres.batch import BatchJob, engines
from fastres.batch.parts import Ledger, Place
from messages.provoke import add, case, without


def job(source: str = "in", **options: object) -> BatchJob:
    """On a folder with one image, and a network."""
    Path("in").mkdir(exist_ok=True)
    Path("in/a.jpg").write_bytes(photo(0))
    if not Path("fused.safetensors").exists():
        write_model(Path())
    return BatchJob(source, "out", **{"model": "fused.safetensors", "device": "cpu", **options})


def missing(**options: object) -> Callable[[], object]:
    return lambda: job(**options).missing_parts()


add("batch: a part of no image", missing(part_size=0))
add("batch: an unknown engine", missing(engine="dask"))
add("batch: an input that is not there", missing(source="none"))


@case("batch: an output inside the input")
def _() -> None:
    BatchJob("in", "in/out")


@case("batch: an output that holds other files")
def _() -> None:
    Path("out/deep").mkdir(parents=True)
    Path("out/deep/thesis.tex").write_text("mine")
    job().missing_parts()


@case("batch: an output of another job")
def _() -> None:
    job().missing_parts()
    job(top=1).missing_parts()


@case("batch: a part that cannot be read")
def _() -> None:
    do(job())
    Path("out/part-000000.parquet").write_bytes(b"torn")
    try:
        job().finish()
    except ValueError as error:
        raise type(error)(str(error).partition(": ")[0]) from error


@case("batch: an input of two kinds")
def _() -> None:
    job()
    Path("in/a.tar").write_bytes(b"")
    job().missing_parts()


@case("batch: an input without images")
def _() -> None:
    Path("in").mkdir()
    Path("in/notes.md").write_text("none")
    BatchJob("in", "out", model="fused.safetensors").missing_parts()


@case("batch: a limit on tar files")
def _() -> None:
    Path("a.tar").write_bytes(b"")
    job("a.tar", limit=2).missing_parts()


@case("batch: a list of files of another system")
def _() -> None:
    Path("list.txt").write_text("s3://bucket/a.jpg\n")
    job("list.txt").missing_parts()


@case("batch: a column that is not there")
def _() -> None:
    write_table(pyarrow.table({"picture": [b""]}), "a.parquet")
    job("a.parquet").missing_parts()


@case("batch: a damaged tar file")
def _() -> None:
    Path("a.tar").write_bytes(b"no tar" * 200)
    do(job("a.tar"))


@case("batch: a part whose process always dies")
def _() -> None:
    Path("out/.attempts").mkdir(parents=True)
    held = json.dumps({"tries": 9, "now": None, "deaths": []})
    Path("out/.attempts/part-000004.json").write_text(held)
    Ledger(Place("out"), 4)


@case("batch: local paths on a cluster")
def _() -> None:
    with mock.patch.dict("os.environ", RAY_ADDRESS="head:6379"):
        job()


@case("batch: without Ray")
def _() -> None:
    with without("ray"):
        job(engine="ray").missing_parts()


def of_ray() -> mock.MagicMock:
    ray = mock.MagicMock()
    ray.exceptions.RayError = OSError
    ray.cluster_resources.return_value = {"CPU": 1}
    return ray


@case("batch: a cluster without GPUs")
def _() -> None:
    work = job(engine="ray")
    assert work.described
    work.options["device"] = "cuda"
    with mock.patch.object(engines, "_ray", return_value=(of_ray(), False)):
        work.missing_parts()


def on_ray(**rows: object) -> None:
    """A job of which Ray Data gives such rows."""
    ray = of_ray()
    ray.data.from_items.return_value.map_batches.return_value.iter_rows = mock.Mock(**rows)
    with mock.patch.object(engines, "_ray", return_value=(ray, False)):
        job(engine="ray").run()


lost = OSError("a traceback\nOSError: all nodes were lost")
add("batch: a Ray job that fails", lambda: on_ray(side_effect=lost))
full = {"part": 0, "error": "No space left on device"}
add("batch: a part that fails on Ray", lambda: on_ray(return_value=[full]))


def with_worker(script: str) -> None:
    """A job whose workers are this script of the shell."""
    path = Path("worker").absolute()
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    with mock.patch("sys.executable", str(path)):
        job().run()


add("batch: workers that do not start", lambda: with_worker("exit 3"))
add("batch: a worker that fails", lambda: with_worker('echo \'{"error": "No space left"}\''))


for _options in (
    *({"top": 0}, {"embeddings": "fc"}, {"embeddings": "avgpool"}, {"dtype": "float16"}),
    *({"weights": "V9"}, {"model": "a.h5"}),
):
    add(f"batch: {next(iter(_options.items()))}", missing(**_options))


@case("batch: names of another number")
def _() -> None:
    Path("names.txt").write_text("ant\nbee\n")
    job(labels="names.txt").missing_parts()


@case("batch: a network without logits")
def _() -> None:
    network = torch.nn.Conv2d(3, 8, 7, 16).eval()
    fastres.save(fastres.optimize(network, torch.randn(2, 3, 224, 224)), "fused.safetensors")
    job().missing_parts()


@case("batch: without pyarrow")
def _() -> None:
    with without("pyarrow"):
        job().missing_parts()


def of_run(mean: list[float], **options: object) -> None:
    """A job whose network is a training run's."""
    Path("run").mkdir()
    Path("run/config.json").write_text(json.dumps({"model": "resnet18", "mean": mean}))
    job(model="run", **options).missing_parts()


add("batch: a run on other images", lambda: of_run([0.5]))
add("batch: a run beside weights", lambda: of_run([0.485, 0.456, 0.406], weights="V1"))
