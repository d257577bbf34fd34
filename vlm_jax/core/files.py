"""Atomic writes of files and folders."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path with the suffix of `path`; its file or folder replaces `path` when the block ends.

    Contents are synced to disk before the rename. If the block raises, they are removed and `path` is unchanged.
    """
    new = path.with_name(f"{path.stem}.partial-{os.getpid()}{path.suffix}")
    _remove(new)  # left by a killed process with the same pid
    try:
        yield new
        for file in [new, *new.rglob("*")]:
            if file.is_file():
                with open(file, "rb") as handle:
                    os.fsync(handle)
        if new.is_dir() and path.is_dir():  # os.replace needs an empty target folder
            shutil.rmtree(path)
        os.replace(new, path)
    except BaseException:
        _remove(new)
        raise


def remove_partial(path: Path) -> None:
    """Removes what killed processes left of `path`. For the holder of its lock."""
    for left in path.parent.glob(f"{path.stem}.partial-*{path.suffix}"):
        _remove(left)


def write_text(path: Path, text: str) -> None:
    """Writes `text` atomically."""
    with atomic_write(path) as new:
        new.write_text(text)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` atomically as JSON, one field a line."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        with contextlib.suppress(OSError):  # keeps the first error
            path.unlink()
