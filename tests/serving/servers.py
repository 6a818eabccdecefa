"""A server in a process of its own, and clients of it: loopback only."""

import contextlib
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def picture(seed=0, sleep=None, size=(320, 240)):
    """A JPEG of noise and a gradient; the worker takes ``sleep`` seconds for it."""
    noise = np.random.RandomState(seed).randint(0, 60, (size[1], size[0], 3))
    noise[..., seed % 3] += np.linspace(0, 180, size[0]).astype(int)
    file = io.BytesIO()
    Image.fromarray(noise.astype(np.uint8)).save(file, "JPEG")
    return file.getvalue() + (b"" if sleep is None else b"sleep=%g" % sleep)


def free_port():
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return trial.getsockname()[1]


@dataclass
class Answer:
    status: int
    headers: dict
    body: bytes
    seconds: float

    def json(self):
        return json.loads(self.body)


@dataclass
class Server:
    """``fastres serve`` with ``arguments``, started and waited for."""

    arguments: list
    port: int = field(default_factory=free_port)
    wait: bool = True

    def __enter__(self):
        command = [sys.executable, HERE / "dawdling.py", "serve", *self.arguments]
        self.process = subprocess.Popen(
            [*map(str, command), "--port", str(self.port), "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            start_new_session=True,
            # a shell's background jobs, this test run perhaps, ignore SIGINT and hand that on
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.errors = []
        threading.Thread(target=self._listen, daemon=True).start()
        if self.wait:
            said = self.process.stdout.read(1)  # the server prints when requests are taken
            if not said:
                raise AssertionError(f"no server: {b''.join(self.errors).decode()}")
            lines = iter(self.process.stdout.readline, b"}\n")
            self.state = json.loads(said + b"".join(lines) + b"}")
            self.until(lambda: self.ask("/health").status == 200)
        return self

    def _listen(self):
        self.errors.extend(self.process.stderr)

    def __exit__(self, *_):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def until(self, true, seconds=120.0):
        """Wait for a condition; the time that it took."""
        start = time.monotonic()
        while not true():
            assert time.monotonic() - start < seconds, b"".join(self.errors).decode()
            time.sleep(0.05)
        return time.monotonic() - start

    def ask(self, path="/predict", body=None, headers=None, timeout=60):
        """One request on a connection of its own."""
        start = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        with contextlib.closing(connection):
            connection.request("GET" if body is None else "POST", path, body, headers or {})
            got = connection.getresponse()
            return Answer(got.status, dict(got.headers), got.read(), time.monotonic() - start)

    def ask_all(self, bodies, then=None, after=0.4):
        """All at once; ``then`` is called while they are under way."""
        with ThreadPoolExecutor(len(bodies)) as pool:
            asked = [pool.submit(self.ask, body=body) for body in bodies]
            if then is not None:
                time.sleep(after)
                then()
            return [future.result() for future in asked]

    def metric(self, name):
        lines = self.ask("/metrics").body.decode().splitlines()
        return next((float(x.rpartition(" ")[2]) for x in lines if x.startswith(f"{name} ")), 0.0)

    def children(self):
        """The living processes of the server's session but the first, as (pid, command)."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                state, _, _, session = (
                    folder.joinpath("stat").read_text().rpartition(")")[2].split()[:4]
                )
                command = folder.joinpath("cmdline").read_bytes().replace(b"\0", b" ").decode()
                if int(session) == self.process.pid != int(folder.name) and state != "Z":
                    found.append((int(folder.name), command))
        return found

    def workers(self):
        return [pid for pid, command in self.children() if "multiprocessing.spawn" in command]

    def listener(self):
        """The process that takes requests: of the two forked ones the younger."""
        ours = [pid for pid, command in self.children() if "dawdling.py" in command]
        return max(ours)

    def ended(self, seconds=60):
        """The exit code; afterwards nobody of the session is left."""
        code = self.process.wait(seconds)
        assert self.until(lambda: not self.children(), 10) < 10
        return code
