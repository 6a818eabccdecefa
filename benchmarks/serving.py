"""Serving over HTTP: images/s, p50 and p99 of fastres and of eager torchvision, in one server.

    python benchmarks/serving.py --output benchmarks/results/serving

Four servers of ``fastres serve`` wait side by side, each with one worker of one thread: {fastres,
torchvision in eager mode} x {no batches, batches of up to 8 after 2 ms}. All have the same weights
and the same preprocessing, and their answers are compared first. In each round every server in turn
is asked by 1, 8 and 32 clients, each of which sends its next photograph when it has its answer;
the order of the servers changes from round to round. Loopback; the clients share the cores, and CPU
time of server and clients is given beside the wall time.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import nn

from fastres.batch.classifier import Classifier
from fastres.models.preprocess import Normalize

ROOT = Path(__file__).parents[1]
CLIENTS = (1, 8, 32)
SERVERS = {
    "fastres": ("fastres", 1),
    "eager": ("eager", 1),
    "fastres, batches": ("fastres", 8),
    "eager, batches": ("eager", 8),
}


def eager(self: Classifier, network: nn.Module, kind: object) -> tuple[nn.Module, torch.dtype]:
    """torchvision's network with the same weights, as PyTorch runs it."""
    import torchvision

    plain = torchvision.models.get_model(os.environ["SERVED"])
    plain.load_state_dict(network.state_dict())
    return nn.Sequential(Normalize.like(self.crop.preset), plain).eval(), torch.float32


if os.environ.get("CONTENDER") == "eager":  # in a server and, started from this file, its worker
    Classifier._fused = eager


class Server:
    """One contender in processes of its own."""

    def __init__(self, name: str, model: str, checkpoint: Path) -> None:
        contender, batch = SERVERS[name]
        with socket.socket() as trial:
            trial.bind(("127.0.0.1", 0))
            self.port = trial.getsockname()[1]
        command = [sys.executable, __file__, "--serve", "serve", model, "--checkpoint", checkpoint]
        options = [
            "--workers",
            1,
            "--max-batch",
            batch,
            "--batch-wait",
            "2ms",
            "--dtype",
            "float32",
        ]
        self.process = subprocess.Popen(
            [*map(str, command), *map(str, options), "--port", str(self.port), "--json"],
            stdout=subprocess.PIPE,
            env={**os.environ, "CONTENDER": contender, "SERVED": model, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    def wait(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.read(1), "the server did not start"
        asyncio.run(until_ready(self.port))

    def cpu_seconds(self) -> float:
        """Of all its processes together."""
        ticks = 0
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                fields = folder.joinpath("stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == self.process.pid:
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


async def until_ready(port: int) -> None:
    for _ in range(1200):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        if (await reader.read()).startswith(b"HTTP/1.1 200"):
            return
        await asyncio.sleep(0.1)
    raise TimeoutError("the worker is not ready")


async def post(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes) -> dict:
    """One request on a connection that is kept."""
    writer.write(
        b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    )
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    length = int(head.partition("content-length: ")[2].partition("\r\n")[0])
    batch = int(head.partition("batch-size: ")[2].partition("\r\n")[0] or 0)
    found = json.loads(await reader.readexactly(length))
    return {"status": int(head.split(" ")[1]), "batch": batch, "answer": found}


async def load(port: int, clients: int, seconds: float, photos: list[bytes]) -> dict:
    """Closed loop: latencies in ms, statuses and batch sizes of each request."""
    found: dict[str, list] = {"ms": [], "status": [], "batch": []}
    start = time.perf_counter()

    async def client(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        order = random.Random(number)
        while time.perf_counter() - start < seconds:
            asked = time.perf_counter()
            got = await post(reader, writer, order.choice(photos))
            found["ms"].append(round(1e3 * (time.perf_counter() - asked), 2))
            found["status"].append(got["status"])
            found["batch"].append(got["batch"])
        writer.close()

    await asyncio.gather(*map(client, range(clients)))
    return found | {"seconds": time.perf_counter() - start}


async def answers(port: int, photos: list[bytes]) -> list[dict]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    return [(await post(reader, writer, photo))["answer"] for photo in photos]


def photographs(count: int = 40) -> list[bytes]:
    """JPEGs of 500 x 375 pixels, 40 to 60 kB, as ImageNet's are."""
    from PIL import Image

    made = []
    for seed in range(count):
        drawn = np.random.default_rng(seed)
        coarse = Image.fromarray(drawn.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = (smooth + drawn.integers(-12, 13, smooth.shape)).clip(0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(noisy).save(file, "JPEG", quality=85)
        made.append(file.getvalue())
    return made


def checkpoint(model: str, folder: str) -> Path:
    """Random weights whose norms matter; the speed does not depend on them."""
    import fastres
    from fastres.bench.accuracy import calibrate_

    torch.manual_seed(0)
    network = fastres.create_model(model).eval()
    calibrate_(network)
    path = Path(folder) / "weights.safetensors"
    fastres.models.checkpoint.save_checkpoint(network.state_dict(), path)
    return path


def compare(servers: dict[str, Server], photos: list[bytes]) -> float:
    """The largest relative difference of a probability; the five classes must be the same."""
    found = {name: asyncio.run(answers(one.port, photos)) for name, one in servers.items()}
    worst = 0.0
    for name, got in found.items():
        for one, right in zip(got, found["eager"], strict=True):
            values = {top["index"]: top["probability"] for top in right["top"]}
            worst = max(
                worst, *(abs(t["probability"] / values[t["index"]] - 1) for t in one["top"])
            )
        assert worst < 1e-3, f"{name} answers otherwise than eager PyTorch: {worst}"
    return worst


def measure(arguments: argparse.Namespace) -> dict:
    from fastres.perf.environment import environment

    photos, runs = photographs(), []
    with tempfile.TemporaryDirectory() as folder:
        weights = checkpoint(arguments.model, folder)
        servers = {name: Server(name, arguments.model, weights) for name in SERVERS}
        try:
            for server in servers.values():
                server.wait()
            worst = compare(servers, photos[:8])
            for turn in range(arguments.rounds):
                names = list(SERVERS)[turn % 4 :] + list(SERVERS)[: turn % 4]
                for clients in CLIENTS:
                    for name in names:
                        one = servers[name]
                        cpu, own = one.cpu_seconds(), time.process_time()
                        got = asyncio.run(load(one.port, clients, arguments.seconds, photos))
                        spent = {
                            "server_cpu_seconds": round(one.cpu_seconds() - cpu, 2),
                            "client_cpu_seconds": round(time.process_time() - own, 2),
                            "load_average": os.getloadavg()[0],
                        }
                        runs.append(
                            {"server": name, "clients": clients, "round": turn, **spent, **got}
                        )
                        print(name, clients, f"{len(got['ms']) / got['seconds']:.1f}/s", flush=True)
        finally:
            codes = [server.end() for server in servers.values()]
    method = {"rounds": arguments.rounds, "seconds": arguments.seconds, "exit_codes": codes}
    return {
        "model": arguments.model,
        "largest_difference": worst,
        "method": method,
        "environment": environment().to_dict(),
        "runs": runs,
    }


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def table(found: dict) -> str:
    """Medians of the rounds, the rounds' range behind images/s."""
    lines = [
        "| server | clients | images/s | p50 ms | p99 ms | batch | CPU ms an image | not 200 |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in SERVERS:
        for clients in CLIENTS:
            runs = [r for r in found["runs"] if (r["server"], r["clients"]) == (name, clients)]
            rates = sorted(len(r["ms"]) / r["seconds"] for r in runs)
            cells = (
                f"{median(rates):.1f} ({rates[0]:.1f} to {rates[-1]:.1f})",
                f"{median(percentile(r['ms'], 0.5) for r in runs):.0f}",
                f"{median(percentile(r['ms'], 0.99) for r in runs):.0f}",
                f"{median(sum(r['batch']) / len(r['batch']) for r in runs):.1f}",
                f"{median(1e3 * r['server_cpu_seconds'] / len(r['ms']) for r in runs):.1f}",
                str(sum(status != 200 for r in runs for status in r["status"])),
            )
            lines.append(f"| {name} | {clients} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def text(found: dict) -> str:
    method, loads = found["method"], [run["load_average"] for run in found["runs"]]
    return f"""# Serving {found["model"]}, float32, on a CPU

Written by `python benchmarks/serving.py`; raw latencies and the environment are in
[{found["model"]}.json]({found["model"]}.json).
{method["rounds"]} interleaved rounds of {method["seconds"]:g} s; medians of the rounds, their range
in brackets. One worker of one thread each, loopback, the clients on the same cores; the CPU time is
that of the server's processes.
Random weights. The answers of all servers were compared first: the first five classes are the
same, and no probability of them differs by more than {found["largest_difference"]:.1g} of itself.

**The machine was shared**: its load average was {min(loads):.1f} to {max(loads):.1f} on
{os.cpu_count()} cores. Compare rows, not digits; the CPU time of an image is the steadier figure.

{table(found)}
"""


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        from fastres.cli import main as command

        sys.argv[1:2] = []
        command()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--output", type=Path, default=Path("out/serving"))
    arguments = parser.parse_args()
    found = measure(arguments)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / f"{arguments.model}.json").write_text(json.dumps(found) + "\n")
    (arguments.output / f"{arguments.model}.md").write_text(text(found))
    print(table(found))


if __name__ == "__main__":
    main()
