"""Batch jobs in worker processes, which are killed: every image exactly once all the same."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from batches import DAMAGED, DEADLY, POISON, rows, success, write_images, write_model

from fastres import cli

pytest.importorskip("PIL")
pytest.importorskip("torchvision")
pytest.importorskip("pyarrow")

COUNT, PART = 96, 8
ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("batch jobs")]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a network, images of which one kills, and what makes workers die of it."""
    folder = tmp_path_factory.mktemp("job")
    write_model(folder)
    folder.joinpath("sitecustomize.py").write_text(DEADLY)
    ids = write_images(folder / "in", COUNT, poison=POISON)
    return folder, ids


@pytest.fixture
def start(made, tmp_path):
    """Starts the command, as a process of its own; it is killed at the end if it still runs."""
    folder, _ = made
    started = []

    def run(*options, **more):
        path = os.pathsep.join((str(folder), str(ROOT)))
        settings = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}
        command = [
            "batch",
            folder / "in",
            tmp_path / "out",
            "--model",
            folder / "fused.safetensors",
        ]
        command += ["--part-size", PART, "--workers", 2, "--device", "cpu", "--json", *options]
        with open(tmp_path / f"said{len(started)}", "w") as said:
            process = subprocess.Popen(
                [sys.executable, "-m", "fastres", *map(str, command)],
                env=settings, stdout=said, stderr=subprocess.STDOUT,
            )  # fmt: skip
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()


def parts(out):
    return sorted(out.glob("part-*.parquet"))


def wait_for(count, out, process):
    """Until so many part files exist and the job still runs."""
    end = time.monotonic() + 240
    while len(parts(out)) < count:
        assert process.poll() is None, "it ended early"
        assert time.monotonic() < end
        time.sleep(0.02)


def at_work(out):
    """The processes that have a part in hand, by the ledger."""
    held = []
    for path in (out / ".attempts").glob("part-*.json"):
        try:
            held.append(json.loads(path.read_text())["pid"])
        except (OSError, ValueError):
            continue
    return held


def kill_worker(out):
    """SIGKILL to one that has a part in hand."""
    while True:
        for pid in at_work(out):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            return


def wait_until_gone(out):
    end = time.monotonic() + 30
    while any(os.path.exists(f"/proc/{pid}") for pid in at_work(out)):
        assert time.monotonic() < end, "workers outlive their driver"
        time.sleep(0.05)


def check(made, out):
    """Every id once; errors for the damaged and the deadly image, and for no other."""
    found = rows(out)
    assert Counter(found["id"]) == Counter(made[1])
    bad = {i: why for i, why in zip(found["id"], found["error"], strict=True) if why}
    assert bad.pop("poison.jpg") == "the process died on this image"
    assert set(bad) == {f"{'ab'[k % 2]}/{k:03d}.jpg" for k in DAMAGED}
    assert success(out)["rows"] == COUNT + 1
    assert not [path for path in out.iterdir() if path.name.startswith(".part")]


@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=pytest.mark.sweep)])
def test_every_image_once_whoever_is_killed(engine, made, start, tmp_path):
    if engine == "ray":
        pytest.importorskip("ray")
    out = tmp_path / "out"
    first = start("--engine", engine)
    wait_for(1, out, first)
    kill_worker(out)
    wait_for(4, out, first)
    first.kill()
    first.wait()
    wait_until_gone(out)
    old = {path: path.stat().st_mtime_ns for path in parts(out)}
    assert len(old) < 13
    second = start("--engine", engine)
    assert second.wait(900) == 0, (tmp_path / "said1").read_text()
    check(made, out)
    assert {path: path.stat().st_mtime_ns for path in old} == old
    report = json.loads((tmp_path / "said1").read_text())
    assert report["parts_done"] == report["parts"] - len(old)


@pytest.mark.sweep
def test_two_drivers_at_once_write_the_same_rows(made, start, tmp_path):
    first, second = start("--engine", "local"), start("--engine", "local")
    assert {first.wait(240), second.wait(240)} == {0}
    check(made, tmp_path / "out")


@pytest.mark.sweep
def test_a_lost_node_costs_no_image(made, start, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    folder, out = made[0], tmp_path / "out"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(folder), str(ROOT))))
    memory = {"num_cpus": 1, "object_store_memory": 128 << 20}
    cluster = Cluster(initialize_head=True, head_node_args=memory)
    try:
        node = cluster.add_node(**memory)
        job = start("--shared-fs", RAY_ADDRESS=cluster.address)
        wait_for(2, out, job)
        cluster.remove_node(node, allow_graceful=False)
        assert job.wait(400) == 0, (tmp_path / "said0").read_text()
    finally:
        cluster.shutdown()
    check(made, out)


def test_the_command_says_what_a_worker_could_not_do(made, tmp_path, capsys):
    folder, out = made[0], tmp_path / "out"
    command = ["batch", str(folder / "in"), str(out), "--model", str(folder / "fused.safetensors")]
    assert cli.run([*command, "--limit", "9", "--device", "cpu", "--max-errors", "0.1"]) == 1
    said = capsys.readouterr()
    assert "9 rows in 1 parts, 1 of them done" in said.out
    assert "cannot read image: cannot identify image file" in said.out
    assert said.err.endswith("11.1% of the rows are errors\n")
    assert cli.run([*command, "--limit", "9", "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parts_done"] == 0
    assert cli.run([*command, "--limit", "8"]) == 2
    assert "is of another job: its listing is" in capsys.readouterr().err
    (out / "part-000000.parquet").unlink()
    (out / ".attempts/part-000000.json").mkdir()
    assert cli.run([*command, "--limit", "9"]) == 2
    assert "part-000000.json: it is no file" in capsys.readouterr().err
