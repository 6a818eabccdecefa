"""The files of a batch job: what is in its input, and how its output is written.

The sorted input is cut into parts, fixed ranges. A part's result is one file with the part's number
in its name, written whole or not at all, so every image is in the output exactly once whoever
writes a part, and however often.
"""

from __future__ import annotations

import fnmatch
import json
import os
import posixpath
import re
import socket
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property, partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from ..files import atomic_write
from .classifier import Image, pyarrow

if TYPE_CHECKING:
    import pyarrow as pa

KINDS = {
    "images": (*(".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp"), *(".tif", ".tiff", ".ppm")),
    "tar": (".tar", ".tar.gz", ".tgz"),
    "parquet": (".parquet",),
}
UNNAMED = 8  # deaths with no image to blame, after which a part is given up


class Place:
    """A folder or a file, local or in an object store that pyarrow knows, by its path or URI."""

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        name = os.fspath(uri)
        self.local = "://" not in name or name.startswith("file://")
        self.uri = name if "://" in name else os.path.abspath(name)

    def __str__(self) -> str:
        """Without the secrets that a URI may hold."""
        return re.sub(r"//[^/@]*@", "//", self.uri)

    @cached_property
    def opened(self) -> tuple[Any, str]:
        """pyarrow's file system and the path in it. Raises ValueError for a URI of no such."""
        pyarrow()
        from pyarrow.fs import FileSystem

        system, path = FileSystem.from_uri(self.uri)
        return system, path.rstrip("/")

    def under(self, folder: str = "", recursive: bool = False) -> list[Any]:
        """What pyarrow says of each file in the folder, by path; nothing where there is none."""
        from pyarrow.fs import FileSelector

        system, path = self.opened
        selector = FileSelector(posixpath.join(path, folder).rstrip("/"), True, recursive)
        found = [info for info in system.get_file_info(selector) if info.is_file]
        return sorted(found, key=lambda info: info.path)

    def read(self, name: str = "") -> bytes:
        """A file of the folder, or the file itself. Raises OSError."""
        system, path = self.opened
        return _read(system, posixpath.join(path, name).rstrip("/"))

    def write(self, name: str, data: bytes) -> None:
        """Replace a file of the folder, whole or not at all. Raises OSError."""
        system, folder = self.opened
        path = posixpath.join(folder, name)
        if self.local:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            atomic_write(path, data)
            return
        with system.open_output_stream(path) as stream:  # an object is there once it is whole
            stream.write(data)

    def delete(self, name: str) -> None:
        """Remove a file of the folder, if it is there."""
        system, folder = self.opened
        with suppress(FileNotFoundError):
            system.delete_file(posixpath.join(folder, name))


def _read(system: Any, path: str) -> bytes:
    with system.open_input_stream(path) as stream:
        return bytes(stream.read())


def list_input(place: Place, columns: tuple[str, str], limit: int | None) -> tuple[pa.Table, int]:
    """What a job is to read, and how many files were passed over for their names.

    The listing has ``id``, ``file`` (a path in the input's file system), ``group`` (a row group of
    a Parquet file, else -1) and ``most`` (how many images: of a row group its rows, -1 of a tar).

    Args:
        place: a folder, a file, a ``.txt`` list, or a pattern such as ``folder/*.tar``.
        columns: of a Parquet file, with the images and with the ids.
        limit: take the first so many images.

    Raises:
        FileNotFoundError: there is no such input.
        ValueError: there are no images in it, files of several kinds, or no such columns.
    """
    system, path = place.opened
    (folder, name), info = posixpath.split(path), system.get_file_info(path)
    infos, root = [info], folder
    if info.type.name == "Directory":
        infos, root = place.under(recursive=True), path
    elif not info.is_file and re.search(r"[*?[]", name):
        found = Place(place.uri.rpartition("/")[0]).under()
        infos = [f for f in found if fnmatch.fnmatchcase(f.base_name, name)]
    elif not info.is_file:
        raise FileNotFoundError(f"there is no input {place}")
    if info.is_file and name.endswith(".txt"):
        ids = [line for line in map(str.strip, place.read().decode().splitlines()) if line]
        rows = [(line, _listed(place, line), -1, 1) for line in ids]
        passed = 0
    else:
        kinds = {info.path: _kind(posixpath.relpath(info.path, root)) for info in infos}
        files = [file for file, kind in kinds.items() if kind]
        passed, held = len(kinds) - len(files), sorted({kinds[file] for file in files})
        if len(held) > 1:
            raise ValueError(f"input {place} holds {' and '.join(held)}: give a pattern of one")
        if held == ["parquet"]:
            rows = [row for file in files for row in _row_groups(system, file, root, columns)]
        else:
            most = -1 if held == ["tar"] else 1
            rows = [(posixpath.relpath(file, root), file, -1, most) for file in files]
    if limit is not None:
        if any(row[3] < 0 for row in rows):
            raise ValueError("limit does not go with tar files, whose images are not counted")
        before = accumulate((row[3] for row in rows), initial=0)
        rows = [
            (*r[:3], min(r[3], limit - n)) for r, n in zip(rows, before, strict=False) if n < limit
        ]
    if not rows:
        raise ValueError(f"input {place} holds no images")
    types = {"id": "string", "file": "string", "group": "int32", "most": "int32"}
    schema = pyarrow().schema([(n, pyarrow().type_for_alias(t)) for n, t in types.items()])
    named = dict(zip(types, map(list, zip(*rows, strict=True)), strict=True))
    return pyarrow().table(named, schema=schema), passed


def _listed(place: Place, line: str) -> str:
    """The path of what a line of a list names: a URI, or a path as a shell would have it."""
    scheme, _, path = line.rpartition("://")
    if scheme not in ("", place.uri.partition("://")[0] if "://" in place.uri else "file"):
        raise ValueError(f"{line} is on another file system than the list, {place}")
    if scheme:
        return path
    if place.local:
        return os.path.abspath(line)
    return posixpath.join(posixpath.dirname(place.opened[1]), line)


def _kind(path: str) -> str:
    """What the name says that a file holds; nothing of hidden ones."""
    hidden = any(part.startswith((".", "_")) for part in path.split("/"))
    endings = {ending: kind for kind, some in KINDS.items() for ending in some}
    found = (kind for ending, kind in endings.items() if path.lower().endswith(ending))
    return "" if hidden else next(found, "")


def _row_groups(
    system: Any, file: str, root: str, columns: tuple[str, str]
) -> Iterator[tuple[str, str, int, int]]:
    from pyarrow.parquet import ParquetFile

    with system.open_input_file(file) as stream:
        held = ParquetFile(stream)
        for name, column in zip(("image", "id"), columns, strict=True):
            if column not in held.schema_arrow.names:
                known = ", ".join(held.schema_arrow.names)
                raise ValueError(f"{name}_column {column!r} is not in {file}, which has {known}")
        for group in range(held.num_row_groups):
            count = held.metadata.row_group(group).num_rows
            yield posixpath.relpath(file, root), file, group, count


def images(
    system: Any, listed: list[dict[str, Any]], columns: tuple[str, str]
) -> Iterator[tuple[str, Image]]:
    """The ids and images of a part, which is these rows of the listing."""
    for row in listed:
        if row["group"] >= 0:
            yield from _of_row_group(system, row, columns)
        elif row["most"] < 0:
            yield from _of_tar(system, row["file"])
        else:
            yield row["id"], partial(_read, system, row["file"])


def _of_tar(system: Any, file: str) -> Iterator[tuple[str, Image]]:
    """As webdataset has it: the id is the name up to the first dot of its last part."""
    try:
        with (
            system.open_input_stream(file, compression=None) as stream,
            tarfile.open(fileobj=stream, mode="r|*") as archive,
        ):
            for member in archive:
                if member.isfile() and _kind(posixpath.basename(member.name)) == "images":
                    folder, name = posixpath.split(member.name)
                    taken: Any = archive.extractfile(member)
                    yield posixpath.join(folder, name.partition(".")[0]), taken.read()
    except tarfile.TarError as error:
        raise ValueError(f"cannot read {file}: {error}; the job cannot go on with it") from error


def _of_row_group(
    system: Any, row: dict[str, Any], columns: tuple[str, str]
) -> Iterator[tuple[str, Image]]:
    from pyarrow.parquet import ParquetFile

    folder, left = posixpath.dirname(row["file"]), row["most"]
    with system.open_input_file(row["file"]) as stream:
        chosen = {"row_groups": [row["group"]], "columns": list(columns)}
        for batch in ParquetFile(stream).iter_batches(batch_size=64, **chosen):
            found = zip(*(batch.column(name).to_pylist() for name in columns), strict=True)
            for image, key in list(found)[:left]:
                if isinstance(image, dict):  # as Hugging Face's datasets have it
                    image = image.get("bytes") or image.get("path")
                if isinstance(image, str):
                    image = partial(_read, system, posixpath.join(folder, image))
                yield str(key), image or b""
            left -= len(batch)
            if left <= 0:
                return


class Ledger:
    """What has been tried of a part, so that an image that kills its process becomes an error row.

    After a death the part is done image by image, and each is named here before it is touched. One
    that was named at two deaths is blamed: one death may be of a machine.
    """

    def __init__(self, output: Place, index: int) -> None:
        self.output, self.name = output, f".attempts/part-{index:06d}.json"
        try:
            held = json.loads(output.read(self.name))
        except (OSError, ValueError):
            held = {"tries": 0, "now": None, "deaths": []}
        self.tries, self.deaths = held["tries"] + 1, Counter(held["deaths"])
        if held["now"] is not None:
            self.deaths[held["now"]] += 1
        if self.tries - 1 - self.deaths.total() > UNNAMED:
            raise RuntimeError(
                f"part {index} was given up: its process died {self.tries - 1} times, and no image "
                "is to blame; is there too little memory?"
            )
        self.save(None)

    def save(self, now: int | None) -> None:
        """Name the image that is touched next, by its place in the part; None for no one."""
        held = {"tries": self.tries, "now": now, "deaths": list(self.deaths.elements())}
        whose = {"pid": os.getpid(), "host": socket.gethostname()}
        self.output.write(self.name, json.dumps(held | whose).encode())

    def blames(self, place: int) -> bool:
        return self.deaths[place] >= 2

    def close(self) -> None:
        self.output.delete(self.name)
