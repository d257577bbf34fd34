"""SHA-256 digests of a checkpoint's files, written and verified.

`sign` runs before a checkpoint gets its final name, so that one without digests is incomplete: object stores rename a
folder file by file, and a run may die in between.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vlm_jax.core.errors import UserError
from vlm_jax.core.files import write_json
from vlm_jax.core.reading import read_object

_DIGESTS = "sha256.json"
_MAX_BYTES = 2**28
# Written by Orbax after the digests, and not needed to restore.
_UNSIGNED = ("_CHECKPOINT_METADATA", "commit_success.txt")
_REQUIRED = ("state", "progress")


def sign(folder: Path) -> None:
    """Writes the digest and size of every file under `folder`."""
    write_json(folder / _DIGESTS, _digests(folder, _files(folder)))


def damage(folder: Path) -> str:
    """The first problem of a checkpoint, "" if it is intact."""
    for name in _REQUIRED:
        if not (folder / name).is_dir():
            return f"half-written: {name} is missing"
    if not (folder / _DIGESTS).exists():
        return f"half-written: {_DIGESTS} is missing"
    try:
        expected = sorted(read_object(folder / _DIGESTS, _MAX_BYTES).items())
        sizes = {name: int(entry["bytes"]) for name, entry in expected}
        digests = {name: entry["sha256"] for name, entry in expected}
    except (UserError, ValueError, TypeError, KeyError, OverflowError) as error:
        return f"{_DIGESTS} cannot be read ({type(error).__name__})"
    if not sizes:
        return f"{_DIGESTS} lists no files"
    try:
        for name, size in sizes.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, expected {size}"
        actual = _digests(folder, list(digests))
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    changed = [name for name, digest in digests.items() if actual[name]["sha256"] != digest]
    return f"{changed[0]} has changed since it was written" if changed else ""


def _files(folder: Path) -> list[str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [str(path.relative_to(folder)) for path in paths if path.name not in _UNSIGNED and path.parent != folder]


def _digests(folder: Path, names: list[str]) -> dict[str, dict[str, str | int]]:
    """In threads: hashing releases the GIL."""

    def digest(name: str) -> dict[str, str | int]:
        with open(folder / name, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            return {"sha256": sha256, "bytes": file.tell()}

    with ThreadPoolExecutor(8) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))
