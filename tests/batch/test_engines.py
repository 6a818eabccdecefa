"""Batch jobs in worker processes, which are killed: every image exactly once all the same."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from batches import DAMAGED, DEADLY, POISON, rows, success, write_images, write_model

from fastres import cli
from fastres.batch import BatchJob
from fastres.batch.parts import UNNAMED, Ledger

pytest.importorskip("PIL")
pytest.importorskip("torchvision")
pytest.importorskip("pyarrow")

COUNT, PART = 40, 4
ROOT = Path(__file__).parents[2]
SWEEP = pytest.mark.sweep
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("batch jobs")]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a network, images, among others one that kills, and what makes it kill."""
    folder = tmp_path_factory.mktemp("job")
    write_model(folder)
    folder.joinpath("sitecustomize.py").write_text(DEADLY)
    write_images(folder / "in", COUNT)
    write_images(folder / "deadly", 7, poison=POISON)
    return folder


@pytest.fixture
def job(made, tmp_path, monkeypatch):
    """Makes jobs whose workers import what is in the folder."""
    monkeypatch.syspath_prepend(made)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(made), str(ROOT))))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def make(engine="local", source="in", **options):
        if engine == "ray":
            pytest.importorskip("ray")
        known = {"model": made / "fused.safetensors", "part_size": PART, "device": "cpu"}
        known |= {"engine": engine, "workers": 1}
        return BatchJob(made / source, tmp_path / "out", **{**known, **options})

    return make


@pytest.fixture
def start(made, job, tmp_path):
    """Starts the command, as a process of its own; it is killed at the end if it still runs."""
    started = []

    def run(*options, **more):
        command = ["batch", made / "in", tmp_path / "out", "--model", made / "fused.safetensors"]
        command += ["--part-size", PART, "--device", "cpu", "--json", *options]
        with open(tmp_path / "said", "w") as said:
            process = subprocess.Popen(
                [sys.executable, "-m", "fastres", *map(str, command)],
                env={**os.environ, **more}, stdout=said, stderr=subprocess.STDOUT,
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


def parent(pid):
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def kill_worker(out):
    """SIGKILL to one that has a part in hand."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for pid in at_work(out):
            with suppress(ProcessLookupError):
                return os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    raise AssertionError("no worker is at work")


def wait_until_gone(out):
    end = time.monotonic() + 60
    while any(os.path.exists(f"/proc/{pid}") for pid in at_work(out)):
        assert time.monotonic() < end, "workers outlive their driver"
        time.sleep(0.05)


def check(made, out, source="in"):
    """Every id once; errors for the damaged and the deadly image, and for no other."""
    found = rows(out)
    files = sorted(path.relative_to(made / source) for path in (made / source).rglob("*.jpg"))
    assert found["id"] == [str(path) for path in files]
    bad = {i: why for i, why in zip(found["id"], found["error"], strict=True) if why}
    if source == "deadly":
        assert bad.pop("poison.jpg") == "the process died on this image"
    assert set(bad) == {f"{'ab'[k % 2]}/{k:03d}.jpg" for k in DAMAGED} & set(found["id"])
    assert success(out)["rows"] == len(files)
    assert not [path for path in out.rglob(".*") if path.name.startswith(".part")]


@pytest.mark.fault(94)
@pytest.mark.parametrize(
    ("engine", "worker"),
    [("local", False), *(pytest.param(name, True, marks=SWEEP) for name in ("local", "ray"))],
)
def test_every_image_once_whoever_is_killed(engine, worker, made, job, start, tmp_path):
    out = tmp_path / "out"
    first = start("--engine", engine, "--workers", 1)
    wait_for(1, out, first)
    if worker:
        kill_worker(out)
        wait_for(3, out, first)
    first.kill()
    first.wait()
    wait_until_gone(out)
    old = {path: path.stat().st_mtime_ns for path in parts(out)}
    assert len(old) < COUNT // PART
    report = job(engine).run()
    check(made, out)
    assert {path: path.stat().st_mtime_ns for path in old} == old
    assert report.parts_done == report.parts - len(old)


@pytest.mark.fault(95)
@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=SWEEP)])
def test_a_deadly_image_is_an_error_row_at_the_fourth_attempt(engine, made, job, tmp_path):
    work, before = job(engine, "deadly"), set(made.glob("death-*"))
    if engine == "local":  # two deaths without the time that they take
        work.missing_parts()
        Ledger(work.output, 1)
        Ledger(work.output, 1).save(3)
    assert work.run().rows == 8
    assert len(set(made.glob("death-*")) - before) == (1 if engine == "local" else 3)
    check(made, tmp_path / "out", "deadly")


@pytest.mark.fault(95)
@SWEEP
def test_ray_gives_a_part_up_as_the_local_engine_does(job):
    pytest.importorskip("ray")
    work = job("ray")
    job().missing_parts()
    for _ in range(UNNAMED + 1):
        Ledger(work.output, 0)
    with pytest.raises(RuntimeError, match="part 0 was given up: its process died 9 times"):
        work.run()


@pytest.mark.fault(94)
@SWEEP
def test_two_drivers_at_once_write_the_same_rows(made, job, tmp_path):
    with ThreadPoolExecutor(2) as threads:
        reports = list(threads.map(BatchJob.run, (job(), job())))
    assert [report.rows for report in reports] == [COUNT] * 2
    check(made, tmp_path / "out")


@pytest.mark.fault(94)
@SWEEP
def test_a_lost_node_costs_no_image(made, start, tmp_path):
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    out, memory = tmp_path / "out", {"num_cpus": 1, "object_store_memory": 128 << 20}
    cluster = Cluster(initialize_head=True, head_node_args=memory)
    try:
        node = cluster.add_node(**memory)
        job = start("--shared-fs", RAY_ADDRESS=cluster.address)
        wait_for(2, out, job)
        (raylet,) = node.all_processes["raylet"]
        while raylet.process.pid not in map(parent, at_work(out)):
            assert job.poll() is None, "no worker of the node was seen at work"
        cluster.remove_node(node, allow_graceful=False)
        assert job.wait(400) == 0, (tmp_path / "said").read_text()
    finally:
        cluster.shutdown()
    check(made, out)


def test_the_command_says_what_a_worker_could_not_do(made, tmp_path, capsys, monkeypatch):
    folder, out = made, tmp_path / "out"
    command = ["batch", str(folder / "in"), str(out), "--model", str(folder / "fused.safetensors")]
    assert cli.run([*command, "--limit", "9", "--device", "cpu", "--max-errors", "0.1"]) == 1
    said = capsys.readouterr()
    assert "9 rows in 1 parts, 1 of them done" in said.out
    assert "cannot read image: cannot identify image file" in said.out
    assert said.err.endswith("11.1% of the rows are errors\n")
    finish = BatchJob.finish
    monkeypatch.setattr(
        BatchJob, "finish", lambda *args: (print("(raylet) died"), finish(*args))[1]
    )
    assert cli.run([*command, "--limit", "9", "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parts_done"] == 0
    assert cli.run([*command, "--limit", "8"]) == 2
    assert "is of another job: its listing is" in capsys.readouterr().err
    (out / "part-000000.parquet").unlink()
    (out / ".attempts/part-000000.json").mkdir()
    assert cli.run([*command, "--limit", "9"]) == 2
    assert "part-000000.json: it is no file" in capsys.readouterr().err
