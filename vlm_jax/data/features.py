"""Features of the frozen encoder, computed once for all cells with the same images and encoder that read the same.

A folder per key holds an array for each field of `Visual` that the encoder gives, such as `tokens.npy` [n,P,E] and
`taps.npy` [n,A,P,E] (memory-mapped; dtypes are those of `empty`), `index.npy` (the row of each image: equal files share
one), `bad.json` (images that cannot be decoded) and `meta.json`. It is written atomically, under a lock: one process
computes, others wait.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8
from rich.markup import escape
from rich.progress import track

from vlm_jax.core import reading, text
from vlm_jax.core.errors import UserError
from vlm_jax.core.files import atomic_write, file_lock, remove_stale
from vlm_jax.core.structs import Visual

Encode = Callable[[UInt8[np.ndarray, "B H H 3"]], Visual]
_BATCH = 128
# Fields whose values choose tokens are not rounded: a rounded value would choose others.
_DTYPES = {"mask": np.dtype(bool), "keys": np.dtype(np.float32), "salience": np.dtype(np.float32)}
_FILES = (*(f"{field}.npy" for field in Visual._fields), "index.npy", "bad.json")


class Images(NamedTuple):
    """The images of a dataset, by number. Its functions raise `UserError` for one that cannot be read."""

    count: int
    encoded: Callable[[int], bytes | Path]  # a file's bytes, or its path
    pixels: Callable[[int], UInt8[np.ndarray, "H H 3"]]  # decoded and prepared
    size: int  # H
    label: str  # of the progress bar


class Stored(NamedTuple):
    """An open store."""

    read: Callable[[Int[np.ndarray, " n"]], Visual]  # numbers of images -> features
    bad: dict[int, str]  # number -> why it cannot be decoded; its features are zero


def key(images_sha256: str, encoder_sha256: str, settings: dict[str, Any]) -> str:
    """Name of the folder, a hash of all that the features depend on. `settings` hold encoder fields and the dtype."""
    content = json.dumps([images_sha256, encoder_sha256, settings], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def open_or_compute(root: Path, name: str, images: Images, encode: Encode) -> Stored:
    """The features in `root/name`, which are computed first if they do not exist.

    Raises `UserError` where the first or last stored features differ from the encoder's, or the folder is unreadable.
    """
    root.mkdir(parents=True, exist_ok=True)
    folder = root / name
    with file_lock(root / f"{name}.lock"):
        if not (folder / "meta.json").exists():
            remove_stale(folder)  # of a killed process; they are large
            _remove_incomplete(folder)
            with atomic_write(folder) as new:
                new.mkdir()
                _compute(new, images, encode)
    try:
        stores, index, bad = _load(folder, images.count)
    except Exception as error:  # NumPy raises many types for a damaged header
        raise UserError(f"{folder}: unreadable features ({error}): delete the folder to compute them again") from error

    def read(numbers: Int[np.ndarray, " n"]) -> Visual:
        rows = index[numbers]
        return Visual(**{field: store[rows] for field, store in stores.items()})

    stored = Stored(read, bad)
    _check(folder, stored, images, encode)
    return stored


def empty(visual: Visual, rows: int) -> Visual:
    """Zeros for that many images, in the shapes of `visual` (arrays or shapes) and the dtypes of a store: float16, but
    float32 for keys and salience."""
    return Visual(
        *(
            None if value is None else np.zeros((rows, *value.shape[1:]), _dtype(field))
            for field, value in zip(Visual._fields, visual, strict=True)
        )
    )


def _dtype(field: str) -> np.dtype:
    return _DTYPES.get(field, np.dtype(np.float16))


def _load(folder: Path, count: int) -> tuple[dict[str, np.ndarray], Int[np.ndarray, " n"], dict[int, str]]:
    """The arrays of a folder by field, memory-mapped, and why images have no features. Raises `ValueError`, among
    others."""
    kinds = {name: reading.kind(folder / name) for name in _FILES}  # a pipe would block
    names = [field for field in Visual._fields if field == "tokens" or kinds[f"{field}.npy"]]
    stores = {field: np.load(folder / f"{field}.npy", mmap_mode="r") for field in names}
    index = np.load(folder / "index.npy")
    bad = {int(number): str(reason) for number, reason in reading.read_object(folder / "bad.json").items()}
    rows = {len(one) if one.ndim > 1 and one.dtype == _dtype(field) else 0 for field, one in stores.items()}
    fits = index.shape == (count,) and index.dtype.kind in "iu" and len(rows) == 1
    if not fits or not (index.min() >= 0 and index.max() < min(rows)) or not set(bad) <= set(range(count)):
        raise ValueError(f"expected a row for each of {count} images")
    return stores, index, bad


def _remove_incomplete(folder: Path) -> None:
    """Removes a folder of features without `meta.json`. Raises `UserError` where it holds anything else."""
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir() or not {path.name for path in folder.iterdir()} <= set(_FILES):
        raise UserError(f"{folder}: expected features with their meta.json, got something else: move it away")
    shutil.rmtree(folder)


def _compute(folder: Path, images: Images, encode: Encode) -> None:
    index, firsts = _unique(images)
    stores: dict[str, np.ndarray] = {}
    bad: dict[int, str] = {}
    for start in track(
        range(0, len(firsts), _BATCH),
        description=f"features of {escape(text.one_line(images.label, 60))}",
        transient=True,
    ):
        mine = firsts[start : start + _BATCH]
        visual = encode(_batch(images, mine, bad))
        for field, value in visual._asdict().items():
            if value is None:
                continue
            array = np.asarray(value).astype(_dtype(field))
            if field not in stores:
                stores[field] = _new_store(folder / f"{field}.npy", (len(firsts), *array.shape[1:]), array.dtype)
            stores[field][start : start + _BATCH] = array[: len(mine)]
    unusable = np.isin(index, [index[number] for number in bad])
    for store in stores.values():
        store[[index[number] for number in bad]] = 0
        store.flush()
    np.save(folder / "index.npy", index)
    reasons = {int(number): bad[int(firsts[index[number]])] for number in np.flatnonzero(unusable)}
    (folder / "bad.json").write_text(json.dumps(reasons))
    (folder / "meta.json").write_text(json.dumps({"images": images.count, "source": images.label}) + "\n")


def _new_store(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A writable memory map whose disk space is reserved: writing to a map of a full disk ends the process."""
    store = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return store


def _unique(images: Images) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " u"]]:
    """(row of each image, number of the first image of each row); images with equal bytes share a row."""
    rows: dict[Any, int] = {}
    index, firsts = np.zeros(images.count, np.int64), []
    for number in track(
        range(images.count), description=f"images of {escape(text.one_line(images.label, 60))}", transient=True
    ):
        content: Any = number
        with contextlib.suppress(UserError):
            encoded = images.encoded(number)
            content = hashlib.sha256(encoded).digest() if isinstance(encoded, bytes) else encoded
        if content not in rows:
            rows[content] = len(firsts)
            firsts.append(number)
        index[number] = rows[content]
    return index, np.array(firsts, np.int64)


def _batch(images: Images, numbers: Int[np.ndarray, " n"], bad: dict[int, str]) -> UInt8[np.ndarray, "B H H 3"]:
    """`_BATCH` images, so that all batches have one shape; those that cannot be decoded are zero, with the reason in
    `bad`."""
    out = np.zeros((_BATCH, images.size, images.size, 3), np.uint8)
    for row, number in enumerate(numbers.tolist()):
        try:
            out[row] = images.pixels(number)
        except UserError as error:
            bad[number] = str(error)
    return out


def _check(folder: Path, stored: Stored, images: Images, encode: Encode) -> None:
    """Raises `UserError` where stored features differ from the encoder's by more than the rounding of float16."""
    good = [number for number in range(images.count) if number not in stored.bad]
    if not good:
        raise UserError(f"{images.label}: expected a readable image, got none ({next(iter(stored.bad.values()))})")
    numbers = np.array([*good[: _BATCH - 1], good[-1]])
    encoded, kept = encode(_batch(images, numbers, {})), stored.read(numbers)
    for field, a, b in zip(Visual._fields, encoded, kept, strict=True):
        if (a is None) != (b is None):
            problem = "has no" if b is None else "has, beside what is read,"
            raise UserError(f"{folder}: {problem} {field}: delete the folder to compute the features again")
        if a is None:
            continue
        a, b = np.asarray(a, np.float32)[: len(numbers)], b.astype(np.float32)
        difference = float(np.max(np.abs(a - b)))
        # Salience is a share of an attention that all patches add up to: its size is far below 1.
        size = max(float(np.max(np.abs(b))), 0.0 if field == "salience" else 1.0)
        if not difference <= 4e-3 * size:  # also True for NaN
            raise UserError(f"{folder}: stored features differ from the encoder by {difference:.3g}: delete the folder")
