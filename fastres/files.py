"""Files: written whole or not at all, targets looked at before any work, texts read bounded."""

import os
import secrets
import signal
import stat
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PathLike = str | os.PathLike[str]


def atomic_write(path: PathLike, data: bytes) -> None:
    """Replace the file at ``path`` by ``data`` so that a crash leaves the old file or the new.

    Raises OSError, as :func:`check_target` does, and where the disk is full.
    """
    target = check_target(path)
    temporary = target.with_name(f".{target.name[:100]}.{os.getpid()}.{secrets.token_hex(4)}")
    with exiting_on_signals():
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if target.exists():
                temporary.chmod(stat.S_IMODE(target.stat().st_mode))
            os.replace(temporary, target)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno:
                raise OSError(error.errno, error.strerror, str(path)) from error
            raise
        _sync_directory(target.parent)


def check_target(
    path: PathLike, suffixes: Sequence[str] = (), *, makes_folder: bool = False
) -> Path:
    """The file that a write to ``path`` replaces: where a symbolic link points, the link stays.

    suffixes: those that it may have, if not any.
    makes_folder: folders that are missing will be made.

    Raises ValueError for another suffix; FileNotFoundError where the folder is missing;
    PermissionError where it or the file cannot be written, or ``path`` is a folder, a pipe or a
    device; OSError for a ring of links.
    """
    if suffixes and Path(path).suffix not in suffixes:
        wanted = (" or " if len(suffixes) < 3 else ", ").join(suffixes)
        raise ValueError(f"path must end in {wanted}; got {str(path)!r}")
    target = Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)
    folder = target.parent
    if makes_folder:
        folder = next(p for p in target.absolute().parents if p.exists())
    if not folder.exists():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {folder}")
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write {path}: {folder} is not a folder to write in")
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        return target
    if not stat.S_ISREG(mode):
        raise PermissionError(f"cannot write {path}: it is no file but a folder, pipe or device")
    if not os.access(target, os.W_OK):
        raise PermissionError(f"cannot write {path}: it is write-protected")
    return target


@contextmanager
def exiting_on_signals() -> Iterator[None]:
    """In here SIGTERM and SIGHUP raise SystemExit (143, 129), so that temporary files are swept.

    A signal that the program handles or ignores stays as it is; so does all in other threads than
    the main one, which alone may set handlers.
    """
    ours = []
    if threading.current_thread() is threading.main_thread():
        known = (getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP"))
        ours = [n for n in known if n is not None and signal.getsignal(n) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, _exit)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _exit(number: int, _: Any) -> None:
    sys.exit(128 + number)


def _sync_directory(folder: Path) -> None:
    """Make a rename durable, where the system lets a directory be opened (Windows does not)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_text(path: PathLike, most: int) -> str:
    """A text file of at most ``most`` bytes; nothing is waited for, and no more is read.

    Raises OSError for a pipe, a folder or a device, ValueError for a larger file or no UTF-8.
    """
    # Without waiting: a pipe that nobody writes into would be opened for ever.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | _NO_WAIT)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(f"{path} is no regular file")
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{path} is larger than {most} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error


_NO_WAIT = getattr(os, "O_NONBLOCK", 0)
