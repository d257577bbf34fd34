"""Atomic writes of files and folders."""

import contextlib
import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_jax.core import reading
from vlm_jax.core.errors import UserError

if TYPE_CHECKING:  # slow to import, and every command imports this module
    from filelock import FileLock

_MARK = ".vlm_jax-"  # in the name of each temporary file or folder, before 16 random hex digits
_FULL_CODES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DISK_CODES = (
    *_FULL_CODES, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY,
    errno.ELOOP, errno.ENAMETOOLONG, errno.EIO, errno.ESTALE,
)  # fmt: skip
_FULL_TEXTS = ("No space left", "Disk quota exceeded", "File too large")
_DISK_TEXTS = (*_FULL_TEXTS, "Read-only file system", "Permission denied")
_open: set[Path] = set()  # temporary paths of running `atomic_write` blocks


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path with the suffix of `path`; its file or folder gets the name `path` when the block ends.

    A file replaces a file or a symbolic link (not its target); a folder replaces an empty folder alone. Contents are
    synced to disk before the rename. If the block raises, they are removed and `path` is unchanged. The temporary name
    is new: no file of anybody else is overwritten. Raises `UserError` where `path` is a device or a pipe: the rename
    would replace it.
    """
    _check_target(path)
    new = path.with_name(f".{path.stem[:64]}{_MARK}{os.urandom(8).hex()}{path.suffix}")
    _open.add(new)
    try:
        yield new
        for file in [new, *new.rglob("*")]:
            if file.is_file():
                with open(file, "rb") as handle:
                    os.fsync(handle)
        os.replace(new, path)
    except BaseException:
        _remove(new)
        raise
    finally:
        _open.discard(new)


def remove_temporary() -> None:
    """Removes what running `atomic_write` blocks have written, before the process is ended at once."""
    for path in list(_open):
        _remove(path)


def remove_stale(path: Path) -> None:
    """Removes what killed processes left of `path`. The caller holds a lock that every writer of `path` takes."""
    pattern = re.compile(rf"\.{re.escape(path.stem[:64])}{re.escape(_MARK)}[0-9a-f]{{16}}{re.escape(path.suffix)}")
    for other in path.parent.iterdir():
        if pattern.fullmatch(other.name) and other not in _open and not other.is_symlink():
            _remove(other)


def write_text(path: Path, text: str) -> None:
    """Writes `text` atomically."""
    with atomic_write(path) as new:
        new.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes `value` atomically as JSON, one field a line."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def file_lock(path: Path, **options: Any) -> "FileLock":
    """A lock on the file `path`; `options` are `FileLock`'s. Raises `UserError` where something else stands there: a
    link would create its target, and a folder cannot be locked.
    """
    from filelock import FileLock

    found = "link" if path.is_symlink() else reading.kind(path)
    if found not in ("", "file"):
        raise UserError(f"{path}: expected a lock file, got a {found} (remove it)")
    return FileLock(path, **options)


def disk_problem(error: BaseException) -> str | None:
    """The reason if `error` comes from a disk (full, read-only, no permission, a file in the place of a folder), also
    one that a library passes on as text; else None."""
    text = str(error).lower()
    if reason := next((message for message in _DISK_TEXTS if message.lower() in text), None):
        return reason
    if not isinstance(error, OSError) or error.errno not in _DISK_CODES:
        return None
    name = error.filename2 or error.filename
    return f"{error.strerror}: {name}" if name else error.strerror


def is_full(reason: str) -> bool:
    """Whether a reason of `disk_problem` is one of space."""
    return reason.startswith(_FULL_TEXTS)


def _check_target(path: Path) -> None:
    with contextlib.suppress(OSError, ValueError):  # what is missing can be written; the rest shows when it is
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise UserError(f"{path}: expected a file to write, got a device or a pipe (name a file)")
    if not path.name or path.absolute().parent == Path("/dev"):  # /dev/stdout is a link, even where output is a file
        raise UserError(f"{path}: expected the name of a file to write")


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # keeps the first error
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
