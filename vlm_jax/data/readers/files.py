"""Files of a data set: which ones a path means, their hashes, and images whose suffix is not that of the data."""

import contextlib
import difflib
import glob
import hashlib
import os
import re
import time
from collections.abc import Collection
from pathlib import Path

from vlm_jax.core import reading
from vlm_jax.core.errors import UserError
from vlm_jax.core.files import write_text

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".avif")
_SETTLED_NS = 2 * 10**9  # a file changed more recently may change again within the resolution of its time stamps


def data_files(path: str, suffixes: Collection[str]) -> list[Path]:
    """The files that `path` means, sorted: a file, all files with one of `suffixes` below a folder, a glob pattern, or
    names in braces ("data/{a,b}.json", in the order given). Raises `UserError` where there are none.
    """
    if not path:
        raise UserError("path: expected a file or folder, got '' (set the path of this source)")
    whole = Path(path).expanduser()
    braces = re.fullmatch(r"(.*)\{([^{}]*)\}(.*)", path)
    found = "" if braces else reading.kind(whole)
    if found == "file":
        return [whole]
    if found == "folder":
        inside = sorted(file for file in whole.rglob("*") if file.suffix.lower() in suffixes and file.is_file())
        inside = [file for file in inside if not any(part.startswith(".") for part in file.relative_to(whole).parts)]
        if not inside:
            raise UserError(f"{path}: expected files that end in {' or '.join(sorted(suffixes))}, got none")
        return inside
    if braces:
        before, names, after = braces.groups()
        return [file for name in names.split(",") for file in data_files(f"{before}{name.strip()}{after}", suffixes)]
    if any(letter in path for letter in "*?["):
        if matches := [Path(match) for match in sorted(glob.glob(str(whole), recursive=True)) if os.path.isfile(match)]:
            return matches
        raise UserError(f"{path}: expected a pattern that matches files, got no match")
    raise missing_path(whole)


def missing_path(path: Path, kind: str = "a file or folder") -> UserError:
    """The error for a path that does not exist, with the nearest name in its folder."""
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "check the path"
    where = "no such file" if path.parent.is_dir() else f"no folder {path.parent}"
    return UserError(f"{path}: expected {kind}, got {where} ({hint})")


def image_folder(path: str, default: Path) -> Path:
    """The folder that image paths are relative to. Raises `UserError` where it does not exist."""
    folder = Path(path).expanduser() if path else default
    if reading.kind(folder) != "folder":
        raise missing_path(folder, "a folder of images")
    return folder


def find_image(folder: Path, name: str) -> Path | None:
    """The image file `name`, or the one of that stem with another suffix: LLaVA's json says .jpg where OCR-VQA has .gif
    and .png files. None where there is none. Contents are not read.
    """
    path = folder / name
    with contextlib.suppress(OSError, ValueError):  # a name that is too long, or holds a zero byte
        if path.is_file():
            return path
        for stem in dict.fromkeys((path.with_suffix("") if path.name else path, path)):
            for suffix in IMAGE_SUFFIXES:
                for spelling in (suffix, suffix.upper()):
                    other = stem.with_name(stem.name + spelling)
                    if other.is_file():
                        return other
    return None


def file_sha256(path: Path, cache_dir: Path) -> str:
    """SHA-256 of a file's contents, in hex. It is stored in `cache_dir` for as long as size, inode and times of the
    file stay the same.
    """
    stat = path.stat()
    stamp = f"{stat.st_size} {stat.st_ino} {stat.st_mtime_ns} {stat.st_ctime_ns}"
    stored = cache_dir / "file_hashes" / hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]
    with contextlib.suppress(OSError, ValueError):
        before, _, digest = stored.read_text().rpartition(" ")
        if before == stamp and len(digest) == 64:
            return digest
    with reading.open_regular(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > _SETTLED_NS:
        with contextlib.suppress(OSError):
            stored.parent.mkdir(parents=True, exist_ok=True)
            write_text(stored, f"{stamp} {digest}")
    return digest


def combined(*parts: object) -> str:
    """One hash of several values with a stable `repr`."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()
