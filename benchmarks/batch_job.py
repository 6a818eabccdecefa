"""Batch jobs of 2,000 images, 21 of them damaged: whoever is killed, and images/s of the engines.

    python benchmarks/batch_job.py --output benchmarks/results/batch

The images are generated, seeded, with the strange and the damaged ones that any real folder has.
The network is ResNet-18 of random weights on images of 64 pixels, the folder of a training run.
First the speed, in interleaved rounds: ``fastres batch`` by processes of this machine and by Ray,
and a plain loop over the same Classifier; each also with torchvision's network in eager mode in
place of the fused one. Their rows are compared before any speed is told. Then the faults of
docs/batch.md, for each engine; every id must be in the output once, and error rows must be the
damaged ones alone. Started again, it goes on behind what is in the output already.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

from batch_images import DAMAGED, SIDE, generate, write_run

ROOT = Path(__file__).parents[1]
PART, WORKERS = 64, 2
KINDS = [(engine, who) for engine in ("loop", "local", "ray") for who in ("fastres", "eager")]
FAULTS = [(engine, who) for engine in ("local", "ray") for who in ("worker", "driver", "image")]
FAULTS += [("ray", "node")]
POISON = b"kills whoever decodes it"
TICK = os.sysconf("SC_CLK_TCK")
# A process that finds this on its path changes its Classifier once it has imported it.
HOOK = f"""
import importlib.util, sys
class After:
    def find_spec(self, name, path, target=None):
        if name == "fastres.batch.classifier":
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            run = spec.loader.exec_module
            def exec_module(module):
                run(module)
                sys.path.append({str(Path(__file__).parent)!r})
                import batch_job
                batch_job.change(module.Classifier)
            spec.loader.exec_module = exec_module
            return spec
sys.meta_path.insert(0, After())
"""


def change(classifier: Any) -> None:
    """In a worker: another network, or an image that kills."""
    decode = classifier._decode

    def deadly(self: Any, image: Any) -> Any:
        data = image if isinstance(image, bytes) else image()
        if data == POISON:
            Path(os.environ["DEATHS"], str(os.getpid())).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(self, data)

    if os.environ.get("CONTENDER") == "eager":
        classifier._fused = eager
    if "DEATHS" in os.environ:
        classifier._decode = deadly


def eager(self: Any, network: Any, kind: Any) -> tuple[Any, Any]:
    """torchvision's network with the same weights, as PyTorch runs it."""
    import torch
    import torchvision

    from fastres.models.preprocess import Normalize

    plain = torchvision.models.resnet18(num_classes=network.fc.out_features)
    plain.load_state_dict(network.state_dict())
    return torch.nn.Sequential(Normalize.like(self.crop.preset), plain).eval(), torch.float32


def loop(folder: Path, model: Path, output: Path) -> None:
    """The plain loop: one process, one thread, the same Classifier, one file at the end."""
    from pyarrow.parquet import write_table

    from fastres.batch import Classifier

    held, rows = Classifier(str(model), device="cpu", threads=1, top=10), []
    start = time.perf_counter()
    ids = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))
    for at in range(0, len(ids), PART):
        some = ids[at : at + PART]
        rows += held.rows([(folder / name).read_bytes() for name in some])
    output.mkdir()
    write_table(held.table(ids, rows), output / "part-000000.parquet")
    print(json.dumps({"steady_seconds": time.perf_counter() - start, "rows": len(rows)}))


class Watch(threading.Thread):
    """Memory and CPU time of a process and of all that it starts, four times a second."""

    def __init__(self, process: int, output: Path) -> None:
        super().__init__(daemon=True)
        self.process, self.output, self.ended = process, output, threading.Event()
        self.cpu: dict[int, float] = {}
        self.rss: dict[int, list[float]] = defaultdict(list)
        self.all_mb = self.driver_mb = 0.0
        self.start()

    def run(self) -> None:
        known = {self.process}
        while not self.ended.wait(0.25):
            now = dict(processes())
            for _ in range(4):  # children of children
                known |= {pid for pid, (parent, _, _) in now.items() if parent in known}
            mine = {pid: now[pid] for pid in known & set(now)}
            self.cpu |= {pid: cpu for pid, (_, cpu, _) in mine.items()}
            self.all_mb = max(self.all_mb, sum(rss for _, _, rss in mine.values()))
            self.driver_mb = max(self.driver_mb, mine.get(self.process, (0, 0, 0.0))[2])
            for pid in (at_work(self.output) | set(self.rss)) & set(mine):  # from its first part on
                self.rss[pid].append(mine[pid][2])

    def end(self) -> dict[str, Any]:
        self.ended.set()
        self.join()
        series = [s for s in self.rss.values() if len(s) >= 8]
        quarters = [(s[len(s) // 4 : len(s) // 2], s[-len(s) // 4 :]) for s in series]
        growth = [median(last) / median(second) for second, last in quarters]
        return {
            "cpu_seconds": round(sum(self.cpu.values()), 2),
            "worker_peak_mb": round(max(map(max, series), default=self.driver_mb)),
            "worker_growth": round(max(growth), 3) if growth else None,
            "driver_peak_mb": round(self.driver_mb),
            "all_peak_mb": round(self.all_mb),
        }


def processes() -> Iterator[tuple[int, tuple[int, float, float]]]:
    """Of each: parent, CPU seconds, MB in memory."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError):
            field = folder.joinpath("stat").read_text().rpartition(")")[2].split()
            cpu = (int(field[11]) + int(field[12])) / TICK
            yield int(folder.name), (int(field[1]), cpu, int(field[21]) * 4096 / 2**20)


def at_work(output: Path) -> set[int]:
    """The processes that have a part in hand, by the ledger."""
    found = set()
    for path in output.glob(".attempts/part-*.json"):
        with suppress(OSError, ValueError):
            found.add(json.loads(path.read_text())["pid"])
    return found


class Bench:
    """Jobs on the generated images, in a temporary folder."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.made = folder, 0
        self.kinds = generate(folder / "in", count)
        shutil.copytree(folder / "in", folder / "deadly", copy_function=os.link)
        (folder / "deadly/zz.jpg").write_bytes(POISON)
        write_run(folder / "run")
        (folder / "sitecustomize.py").write_text(HOOK)
        (folder / "deaths").mkdir()
        path = os.pathsep.join((str(folder), str(ROOT)))
        os.environ |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}

    @contextmanager
    def started(self, engine: str, output: Path, source: str = "in", **more: str) -> Any:
        """The command, or the loop; killed where it still runs at the end."""
        words = f"--part-size {PART} --workers {WORKERS} --top 10 --device cpu --json"
        options = [self.folder / source, output, "--model", self.folder / "run", "--engine", engine]
        options += words.split()
        options += ["--shared-fs"] if "RAY_ADDRESS" in more else []
        command = ["-m", "fastres", "batch", *options]
        if engine == "loop":
            command = [__file__, "--loop", self.folder / source, self.folder / "run", output]
        with open(self.folder / "errors", "w") as errors:
            process = subprocess.Popen(
                [sys.executable, *map(str, command)],
                stdout=subprocess.PIPE, stderr=errors, env={**os.environ, **more},
            )  # fmt: skip
        try:
            yield process
        finally:
            process.kill()
            process.communicate()

    def output(self) -> Path:
        self.made += 1
        return self.folder / f"out{self.made}"

    def finish(self, process: Any) -> dict[str, Any]:
        said, _ = process.communicate(timeout=1200)
        assert process.returncode == 0, (self.folder / "errors").read_text()
        report: dict[str, Any] = json.loads(said)
        return report

    def timed(self, engine: str, contender: str) -> tuple[dict[str, Any], Path]:
        """An undisturbed job: images/s and memory."""
        output, start = self.output(), time.time()
        with self.started(engine, output, CONTENDER=contender) as process:
            watch = Watch(process.pid, output)
            report = self.finish(process)
            seconds, spent = time.time() - start, watch.end()
        if engine == "loop":
            steady = report["rows"] / report["steady_seconds"]
        else:  # the rows behind the first part that was done
            times = sorted(path.stat().st_mtime for path in output.glob("part-*"))
            steady = (report["rows"] - PART) / (times[-1] - times[0])
        found = {
            "images_per_second_steady": round(steady, 1),
            "images_per_second_with_start": round(report["rows"] / seconds, 1),
            "load_average": os.getloadavg()[0],
        }
        return {"engine": engine, "contender": contender, **found, **spent}, output

    def check(self, output: Path, deadly: bool = False) -> dict[str, Any]:
        """Every id once, errors for the damaged ones and no other."""
        table = read(output)
        ids, errors = Counter(table["id"]), zip(table["id"], table["error"], strict=True)
        bad = {name for name, error in errors if error}
        expected = {name for name, kind in self.kinds.items() if kind in DAMAGED}
        expected |= {"zz.jpg"} if deadly else set()
        found = {
            "rows": len(table["id"]),
            "missing": len((set(self.kinds) | expected) - set(ids)),
            "twice": sum(n > 1 for n in ids.values()),
            "error_rows": len(bad),
            "wrong_errors": len(bad ^ expected),
        }
        wrong = found["missing"] + found["twice"] + found["wrong_errors"]
        assert (wrong, found["rows"]) == (0, len(self.kinds) + deadly), found
        return found

    def killed(self, engine: str, whom: str) -> dict[str, Any]:
        """A job of which a process or a node is killed when a fourth of the parts is done."""
        output = self.output()
        if whom == "node":
            report = self.lost_node(output)
        else:
            with self.started(engine, output) as process:
                self.wait(process, output)
                if whom == "worker":
                    kill_one(output)
                    report = self.finish(process)
        if whom == "driver":  # was killed above
            report = self.resumed(engine, output)
        return {"engine": engine, "killed": whom, **parts(report), **self.check(output)}

    def resumed(self, engine: str, output: Path) -> dict[str, Any]:
        """Its workers are gone, and the same command does what is missing."""
        end = time.time() + 60
        while any(Path(f"/proc/{pid}").exists() for pid in at_work(output)):
            assert time.time() < end, "workers outlive their driver"
            time.sleep(0.1)
        old = {path: path.stat().st_mtime_ns for path in output.glob("part-*")}
        with self.started(engine, output) as process:
            report = self.finish(process)
        assert {path: path.stat().st_mtime_ns for path in old} == old
        assert report["parts_done"] == report["parts"] - len(old) > 0
        return report

    def wait(self, process: Any, output: Path) -> None:
        while len(list(output.glob("part-*"))) < len(self.kinds) // PART // 4:
            assert process.poll() is None, (self.folder / "errors").read_text()
            time.sleep(0.02)

    def lost_node(self, output: Path) -> dict[str, Any]:
        """Two nodes of Ray on this machine; the one without the driver is lost."""
        from ray.cluster_utils import Cluster

        memory = {"num_cpus": 1, "object_store_memory": 128 << 20}
        cluster = Cluster(initialize_head=True, head_node_args=memory)
        try:
            node = cluster.add_node(**memory)
            (raylet,) = node.all_processes["raylet"]
            with self.started("ray", output, RAY_ADDRESS=cluster.address) as process:
                self.wait(process, output)
                while raylet.process.pid not in parents(at_work(output)):
                    assert process.poll() is None, "no worker of the node was seen at work"
                cluster.remove_node(node, allow_graceful=False)
                return self.finish(process)
        finally:
            cluster.shutdown()

    def deadly(self, engine: str, whom: str) -> dict[str, Any]:
        output, deaths = self.output(), self.folder / "deaths"
        before = len(list(deaths.iterdir()))
        with self.started(engine, output, "deadly", DEATHS=str(deaths)) as process:
            report = self.finish(process)
        died = len(list(deaths.iterdir())) - before
        found = {"engine": engine, "killed": whom, "deaths": died, **parts(report)}
        return {**found, **self.check(output, deadly=True)}


def parts(report: dict[str, Any]) -> dict[str, int]:
    return {"parts": report["parts"], "parts_done_by_last_run": report["parts_done"]}


def parents(pids: set[int]) -> set[int]:
    return {parent for pid, (parent, _, _) in processes() if pid in pids}


def kill_one(output: Path) -> None:
    while True:
        for pid in at_work(output):
            with suppress(ProcessLookupError):
                return os.kill(pid, signal.SIGKILL)


def read(output: Path) -> dict[str, list[Any]]:
    from pyarrow import concat_tables
    from pyarrow.parquet import read_table

    files = sorted(output.glob("part-*.parquet"))
    found: dict[str, list[Any]] = concat_tables([read_table(file) for file in files]).to_pydict()
    return found


def compare(one: Path, other: Path) -> None:
    """Ids and errors must be the same, and probabilities but for a thousandth."""
    a, b = read(one), read(other)
    assert (a["id"], a["error"]) == (b["id"], b["error"])
    for row, name in enumerate(a["id"]):
        pairs = (
            zip(t["labels"][row] or (), t["probabilities"][row] or (), strict=True) for t in (a, b)
        )
        ours, theirs = map(dict, pairs)
        assert all(abs(ours[label] / value - 1) < 1e-3 for label, value in theirs.items()), name


def measure(arguments: argparse.Namespace, path: Path) -> dict[str, Any]:
    """What the file lacks yet is measured and written into it, one after another."""
    from fastres.perf.environment import environment

    method = {"images": arguments.count, "rounds": arguments.rounds, "dtype": "float32"}
    found: dict[str, Any] = {
        "method": {**method, "side": SIDE, "part_size": PART, "workers": WORKERS},
        "environment": environment().to_dict(),
        "runs": [],
        "faults": [],
    }
    if path.exists():
        found |= {name: json.loads(path.read_text())[name] for name in ("runs", "faults")}

    def keep(name: str, row: dict[str, Any]) -> None:
        found[name].append({**row, "commit": found["environment"]["commit"]})
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps(row), file=sys.stderr, flush=True)

    known = [(row["round"], row["engine"], row["contender"]) for row in found["runs"]]
    with tempfile.TemporaryDirectory() as folder:
        bench, first = Bench(Path(folder), arguments.count), None
        for turn in range(arguments.rounds):
            for engine, contender in KINDS[turn % 6 :] + KINDS[: turn % 6]:
                if (turn, engine, contender) not in known:
                    row, output = bench.timed(engine, contender)
                    first = first or output
                    compare(output, first)
                    keep("runs", {"round": turn, **row, **bench.check(output)})
        for engine, whom in FAULTS:
            if (engine, whom) not in [(row["engine"], row["killed"]) for row in found["faults"]]:
                keep("faults", (bench.deadly if whom == "image" else bench.killed)(engine, whom))
    return found


def table(found: dict[str, Any]) -> str:
    """Medians of the rounds, the rounds' range behind images/s."""
    lines = [
        "| engine | network | images/s, steady | with start | CPU s | a worker, MB | its growth "
        "| all processes, MB |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for engine, who in KINDS:
        runs = [r for r in found["runs"] if (r["engine"], r["contender"]) == (engine, who)]
        cells = [engine, who]
        for name in ("images_per_second_steady", "images_per_second_with_start"):
            rates = sorted(run[name] for run in runs)
            cells.append(f"{median(rates):.0f} ({rates[0]:.0f} to {rates[-1]:.0f})")
        cells.append(f"{median(run['cpu_seconds'] for run in runs):.0f}")
        cells.append(f"{max(run['worker_peak_mb'] for run in runs)}")
        growth = [run["worker_growth"] for run in runs if run["worker_growth"]]
        cells.append(f"{max(growth):.2f}" if growth else "")
        cells.append(f"{max(run['all_peak_mb'] for run in runs)}")
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| engine | killed | rows | missing | twice | error rows | wrong ones | last run |",
    ]
    lines += ["|---|---|---:|---:|---:|---:|---:|---|"]
    for row in found["faults"]:
        whom = row["killed"] + (f", {row['deaths']} deaths" if "deaths" in row else "")
        names = ("rows", "missing", "twice", "error_rows", "wrong_errors")
        counts = " | ".join(str(row[name]) for name in names)
        last = f"{row['parts_done_by_last_run']} of {row['parts']} parts"
        lines.append(f"| {row['engine']} | {whom} | {counts} | {last} |")
    return "\n".join(lines)


def text(found: dict[str, Any]) -> str:
    method, loads = found["method"], [run["load_average"] for run in found["runs"]]
    return f"""# Batch jobs of {method["images"]} images, ResNet-18 at {SIDE} pixels, on a CPU

Written by `python benchmarks/batch_job.py`; all runs, the commit of each and the environment are
in [resnet18-{SIDE}.json](resnet18-{SIDE}.json). Rounds: {method["rounds"]}, interleaved;
medians, the range in brackets. float32, parts of {PART} images; the engines have {WORKERS}
workers of one thread each, the loop is one process of one thread. Steady: of the rows behind the
first part that was done, of the loop without its start. CPU time and memory (sums of RSS) are of
all processes, sampled four times a second, imports included; growth is a worker's median memory
in the last quarter of its work over that in the second. The rows of all runs were compared: the
same ids and errors, and no probability differs by more than a thousandth of itself.

**The machine was shared**: its load average was {min(loads):.1f} to {max(loads):.1f} on
{os.cpu_count()} cores. Compare rows, not digits; CPU time is the steadier figure.

{table(found)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=2_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("out/batch"))
    parser.add_argument("--json", action="store_true", help="print all that was measured")
    parser.add_argument("--loop", nargs=3, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.loop:
        loop(*arguments.loop)
        return
    arguments.output.mkdir(parents=True, exist_ok=True)
    found = measure(arguments, arguments.output / f"resnet18-{SIDE}.json")
    (arguments.output / f"resnet18-{SIDE}.md").write_text(text(found))
    print(json.dumps(found) if arguments.json else table(found))


if __name__ == "__main__":
    main()
