"""``BatchJob``: lists, resumes, has the parts done and counts; ``run_part`` does one of them."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import torch

from ..version import __version__
from . import engines
from .classifier import Classifier, Row, check_counts, pyarrow
from .parts import Ledger, Place, images, list_input

LISTING, MANIFEST, SUCCESS = "_listing.parquet", "_fastres.json", "_SUCCESS.json"
PART = re.compile(r"part-(\d{6,})\.parquet")
OLD = 3600.0  # seconds after which a temporary file is nobody's
PATHS = ("checkpoint", "labels")


@dataclass(frozen=True)
class Report:
    """What a finished job holds, and what this run of it did.

    Attributes:
        rows: of the output, one for each image of the input.
        errors: how many of them say why there is no answer, by reason (its numbers left out).
        duplicate_ids: rows whose id another row has too.
        passed_over: files of the input whose names are of no kind that is read.
        parts: of the output; ``parts_done`` of them by this run, in so many ``seconds``.
    """

    rows: int
    errors: dict[str, int]
    duplicate_ids: int
    passed_over: int
    parts: int
    parts_done: int
    seconds: float

    def error_rate(self) -> float:
        """The share of rows that are errors."""
        return sum(self.errors.values()) / max(1, self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


class BatchJob:
    """A folder, list, tar or Parquet files of images to a folder of Parquet files of labels.

    Running it again does what is missing. The rows are those of :class:`Classifier`.

    Args:
        input: a folder, an image, a ``.txt`` list, ``.tar`` or ``.parquet`` files (their folder, or
            a pattern such as ``folder/*.tar``); a path, or a URI that pyarrow knows.
        output: a folder for this job alone; made where it is missing.
        engine: ``"local"`` (processes of this machine), ``"ray"`` (Ray Data; the environment's
            ``RAY_ADDRESS`` names a cluster) or ``"auto"``: Ray where that is set, else local.
        workers: how many; by default one to each core, or to each GPU.
        part_size: images of a part; of tar and Parquet a part is a file and a row group.
        image_column: of Parquet, with the files' bytes or paths.
        id_column: of Parquet, with the ids.
        limit: only the first so many images; not of tar.
        retry_errors: do those parts again that hold errors.
        shared_fs: local paths name the same files on every machine of the cluster.
        options: those of :class:`Classifier`.

    Raises:
        ValueError, TypeError: an argument is not what it must be.
    """

    def __init__(
        self,
        input: str | os.PathLike[str],
        output: str | os.PathLike[str],
        *,
        engine: str = "auto",
        workers: int | None = None,
        part_size: int = 512,
        image_column: str = "image",
        id_column: str = "path",
        limit: int | None = None,
        retry_errors: bool = False,
        shared_fs: bool = False,
        **options: Any,
    ) -> None:
        check_counts(workers=workers, part_size=part_size, limit=limit)
        if engine not in ("auto", "local", "ray"):
            raise ValueError(f"engine must be auto, local or ray; got {engine!r}")
        self.input, self.output = Place(input), Place(output)
        if f"{self.output}/".startswith(f"{str(self.input).rstrip('/')}/"):
            raise ValueError(f"output {self.output} must not be inside the input, {self.input}")
        on_cluster = bool(os.environ.get("RAY_ADDRESS"))
        self.engine = engine if engine != "auto" else "ray" if on_cluster else "local"
        files = {name: os.path.abspath(options[name]) for name in PATHS if options.get(name)}
        if os.path.exists(model := os.fspath(options.get("model", ""))):
            files["model"] = os.path.abspath(model)
        self.options = {**options, **files}
        self.places = (self.input, self.output, *map(Place, files.values()))
        if self.engine == "ray" and on_cluster and not shared_fs:
            engines.refuse_local(self.places)
        self.arguments: dict[str, Any] = {
            "workers": workers,
            "part_size": part_size,
            "limit": limit,
            "image_column": image_column,
            "id_column": id_column,
            "retry_errors": retry_errors,
            "shared_fs": shared_fs,
        }
        self.columns = (image_column, id_column)

    def to_dict(self) -> dict[str, Any]:
        """Its arguments as plain data: ``BatchJob(**data)`` is the same job on a worker."""
        places = {"input": self.input.uri, "output": self.output.uri, "engine": self.engine}
        return {**places, **self.arguments, **self.options}

    def classifier(self, **changes: Any) -> Classifier:
        """What a worker holds."""
        return Classifier(**{**self.options, **changes})

    def missing_parts(self) -> list[int]:
        """The parts to do; what the job is is written into the output where that is new.

        Raises:
            ValueError: the output is of another job; the message names what differs. Or the input
                holds no images.
            OSError, and what :class:`Classifier` raises.
        """
        with engines.opened(self):
            return self._missing()

    def _missing(self) -> list[int]:
        names = [info.base_name for info in self.output.under()]
        now = self.described
        if MANIFEST in names:
            _refuse_changes(self.output, _flat(json.loads(self.output.read(MANIFEST))), _flat(now))
        elif held := self.output.under(recursive=True):
            raise ValueError(
                f"output {self.output} must be a new or empty folder; it has {held[0].base_name}"
            )
        else:
            self.output.write(MANIFEST, (json.dumps(now, indent=1) + "\n").encode())
        if LISTING not in names:
            self.output.write(LISTING, self._listing_file())
        self._sweep()
        done = {int(found[1]) for name in names if (found := PART.fullmatch(name))}
        if self.arguments["retry_errors"]:
            done -= {index for index in done if self._errors(index)}
        return [index for index in range(self.parts) if index not in done]

    def run(self, progress: Callable[[int, int], Any] | None = None) -> Report:
        """Do the missing parts, then count the whole output and write ``_SUCCESS.json``.

        progress: called with (done, wanted) parts.

        Raises what :meth:`missing_parts` does, RuntimeError where workers die of no image, OSError.
        """
        start, say = time.perf_counter(), progress or (lambda done, wanted: None)
        with engines.opened(self) as work:
            todo = self._missing()
            say(self.parts - len(todo), self.parts)
            for done, _ in enumerate(work(todo) if todo else (), self.parts - len(todo) + 1):
                say(done, self.parts)
        return self.finish(len(todo), time.perf_counter() - start)

    def run_part(self, index: int, classifier: Classifier | None = None) -> dict[str, Any]:
        """Do one part whole: read, decode, classify, write its file; returns its number and rows.

        For a worker of any engine; :meth:`missing_parts` comes first, on the driver, and
        :meth:`finish` last.

        classifier: by default one that is made at the first part, and kept.
        """
        from pyarrow.parquet import ParquetFile

        system, folder = self.output.opened
        with system.open_input_file(f"{folder}/{LISTING}") as stream:
            listed = ParquetFile(stream).read_row_group(index).to_pylist()
        ledger = Ledger(self.output, index)
        careful = ledger.tries > 1
        classifier = classifier or self._held  # a death while it loads has tried the part
        left = images(self.input.opened[0], listed, self.columns)
        ids: list[str] = []
        rows: list[Row] = []
        while batch := list(islice(left, 1 if careful else classifier.batch_size)):
            if careful and ledger.blames(len(ids)):
                rows.append(Row(error="the process died on this image"))
            else:
                if careful:
                    ledger.save(len(ids))
                rows += classifier.rows([image for _, image in batch])
            ids += [key for key, _ in batch]
        if careful:
            ledger.save(None)
        self.output.write(f"part-{index:06d}.parquet", _parquet(classifier.table(ids, rows)))
        ledger.close()
        return {"part": index, "rows": len(rows)}

    def finish(self, parts_done: int = 0, seconds: float = 0.0) -> Report:
        """Count the output and write ``_SUCCESS.json``.

        Raises:
            ValueError: a part is missing or damaged.
        """
        errors: Counter[str] = Counter()
        hashes, counts = [], []
        for index in range(self.parts):
            table = self._read_part(index, ["id", "error"])
            counts.append(len(table))
            reasons = table["error"].drop_null().to_pylist()
            errors.update(re.sub(r"'[^']*'|\d+", "_", reason) for reason in reasons)
            hashes.append(np.fromiter(map(hash, table["id"].to_pylist()), np.int64, len(table)))
        _, repeats = np.unique(np.concatenate(hashes), return_counts=True)
        report = Report(
            rows=sum(counts),
            errors=dict(errors.most_common()),
            duplicate_ids=int(repeats[repeats > 1].sum()),
            passed_over=self._listed[1],
            parts=self.parts,
            parts_done=parts_done,
            seconds=seconds,
        )
        self.output.write(SUCCESS, (json.dumps(report.to_dict(), indent=1) + "\n").encode())
        return report

    @property
    def parts(self) -> int:
        """Their number."""
        return -(-len(self._listed[0]) // self._rows_of_a_part)

    @property
    def _rows_of_a_part(self) -> int:
        most, group = (self._listed[0][name][0].as_py() for name in ("most", "group"))
        return 1 if most < 0 or group >= 0 else int(self.arguments["part_size"])

    @cached_property
    def _held(self) -> Classifier:
        return self.classifier()

    @cached_property
    def _listed(self) -> tuple[Any, int]:
        return list_input(self.input, self.columns, self.arguments["limit"])

    @cached_property
    def described(self) -> dict[str, Any]:
        """What the rows depend on. The network is looked at here, on the CPU, before any work."""
        listing = hashlib.sha256()
        for column in self._listed[0].columns:
            for value in column.to_pylist():
                listing.update(f"{value}\n".encode())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* is emulated on this processor")
            held = self.classifier(device="cpu", threads=None).to_dict()
        return {
            "format": 1,
            "input": str(self.input),
            "listing": listing.hexdigest(),
            "part_size": self.arguments["part_size"],
            "columns": list(self.columns),
            **held,
            "versions": {"fastres": __version__, "torch": torch.__version__},
        }

    def _listing_file(self) -> bytes:
        """A row group for each part, so that a worker reads its own part of it."""
        return _parquet(self._listed[0], self._rows_of_a_part)

    def _read_part(self, index: int, columns: list[str]) -> Any:
        from pyarrow.parquet import read_table

        pyarrow()
        name = f"part-{index:06d}.parquet"
        try:
            return read_table(io.BytesIO(self.output.read(name)), columns=columns)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{name} of output {self.output} cannot be read: {error}; delete it and run again"
            ) from error

    def _errors(self, index: int) -> bool:
        error = self._read_part(index, ["error"])["error"]
        return bool(error.null_count < len(error))

    def _sweep(self) -> None:
        """Delete temporary files that a killed process has left."""
        for info in self.output.under(recursive=True) if self.output.local else ():
            ours = info.base_name.startswith((".part-", "._"))
            if ours and info.mtime and time.time() - info.mtime.timestamp() > OLD:
                self.output.delete(os.path.relpath(info.path, self.output.opened[1]))


def run_part(job: BatchJob, index: int, classifier: Classifier | None = None) -> dict[str, Any]:
    """:meth:`BatchJob.run_part`, for a worker of another engine."""
    return job.run_part(index, classifier)


def _parquet(table: Any, rows_of_a_group: int | None = None) -> bytes:
    from pyarrow.parquet import write_table

    file = io.BytesIO()
    write_table(table, file, row_group_size=rows_of_a_group)
    return file.getvalue()


def _flat(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
    return found


def _refuse_changes(output: Place, before: dict[str, Any], now: dict[str, Any]) -> None:
    for name in (*before, *now):
        if before.get(name) != now.get(name):
            raise ValueError(
                f"output {output} is of another job: its {name} is {before.get(name)!r}, here "
                f"it is {now.get(name)!r}; give another folder"
            )
