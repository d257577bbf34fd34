"""Files and folders that are complete or not there at all."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A new path beside `path` for the block to write a file or a folder to; it replaces `path` when the block ends.

    A reader finds the old content or the new one. What was written is on disk before it gets its name; where the block
    raises, it is removed and `path` stays as it was. The suffix of `path` is kept, for libraries that go by it.
    """
    new = path.with_name(f"{path.stem}.partial-{os.getpid()}{path.suffix}")
    _remove(new)  # of a killed process that had the same number
    try:
        yield new
        for file in [new, *new.rglob("*")]:
            if file.is_file():
                _sync(file)
        if new.is_dir() and path.is_dir():  # a folder with something in it cannot be replaced
            shutil.rmtree(path)
        os.replace(new, path)
    except BaseException:
        _remove(new)
        raise


def write_text(path: Path, text: str) -> None:
    """Replaces the file in one step."""
    with atomic_write(path) as new:
        new.write_text(text)


def write_json(path: Path, value: Any) -> None:
    """The same, as JSON with a line for each field."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def _sync(file: Path) -> None:
    with open(file, "rb") as handle:
        os.fsync(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        with contextlib.suppress(OSError):  # such as a disk that became read-only: the first error is the one to see
            path.unlink()
