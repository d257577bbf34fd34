"""Whether the files of a checkpoint are those that were written: a SHA-256 of each, kept beside them.

`sign` runs before a checkpoint gets its final name, so one without digests is damaged: on a bucket, where a folder is
renamed file by file, a run may have died in between.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vlm_jax.core.files import write_json

_DIGESTS = "sha256.json"
# Written by Orbax when the digests have been taken, and not needed to restore.
_LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")
_NEEDED = ("state", "cursor")


def sign(folder: Path) -> None:
    """Writes the digest and size of every file under `folder`."""
    write_json(folder / _DIGESTS, _digests(folder, _files(folder)))


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint, in a few words; "" if nothing is."""
    missing = [name for name in _NEEDED if not (folder / name).is_dir()]
    if missing:
        return f"half-written: {missing[0]} is missing"
    try:
        written = json.loads((folder / _DIGESTS).read_bytes())
        names = sorted(written)
        sizes = {name: int(written[name]["bytes"]) for name in names}
        digests = {name: written[name]["sha256"] for name in names}
    except FileNotFoundError:
        return f"half-written: {_DIGESTS} is missing"
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"{_DIGESTS} cannot be read ({type(error).__name__})"
    for name in names:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != sizes[name]:
            return f"{name} has {path.stat().st_size} bytes, {sizes[name]} were written"
    try:
        found = _digests(folder, names)
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    changed = [name for name in names if found[name]["sha256"] != digests[name]]
    return f"{changed[0]} is not what was written" if changed else ""


def _files(folder: Path) -> list[str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [str(path.relative_to(folder)) for path in paths if path.name not in _LATER and path.parent != folder]


def _digests(folder: Path, names: list[str]) -> dict[str, dict[str, str | int]]:
    """On several threads: hashing gives the interpreter free."""

    def digest(name: str) -> dict[str, str | int]:
        with open(folder / name, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            return {"sha256": sha256, "bytes": file.tell()}

    with ThreadPoolExecutor(8) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))
