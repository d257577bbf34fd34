"""Frozen-encoder features, computed once and shared by every cell that uses the same images, encoder and taps.

A folder per key holds `tokens.npy` [n,P,E], `taps.npy` [n,A,P,E] (float16, memory-mapped on use) and `meta.json`. The
folder appears under its name only when it is complete; a lock lets one process compute while others wait.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from rich.progress import track

from vlm_jax.core.errors import UserError
from vlm_jax.core.files import atomic_write
from vlm_jax.core.structs import Visual

Encode = Callable[[np.ndarray], Visual]  # uint8[B,H,H,3] -> Visual
_BATCH = 128


def key(images_sha256: str, encoder_sha256: str, how: dict[str, Any]) -> str:
    """Name of the folder: what the features depend on. `how` are the encoder's choices and the dtype it computes in."""
    return hashlib.sha256(json.dumps([images_sha256, encoder_sha256, how], sort_keys=True).encode()).hexdigest()[:16]


def open_or_compute(
    root: Path, name: str, images: Callable[[np.ndarray], np.ndarray], count: int, encode: Encode, label: str
) -> Callable[[np.ndarray], Visual]:
    """`indices -> Visual` of numpy arrays, from `root/name`, computed there first if need be.

    Args:
        images: indices -> uint8[B,H,H,3].
        count: number of examples of the split.
        encode: the live encoder; also used to check the first and last stored examples against it.
        label: for the progress bar.

    Raises:
        UserError: the stored features disagree with the live encoder, or cannot be read.
    """
    root.mkdir(parents=True, exist_ok=True)
    folder = root / name
    with FileLock(root / f"{name}.lock"):
        if not (folder / "meta.json").exists():
            for stale in root.glob(f"{name}.partial-*"):
                shutil.rmtree(stale)  # of a process that was killed; they are large
            with atomic_write(folder) as new:
                new.mkdir()
                _compute(new, images, count, encode, label)
    try:
        tokens = np.load(folder / "tokens.npy", mmap_mode="r")
        taps = np.load(folder / "taps.npy", mmap_mode="r") if (folder / "taps.npy").exists() else None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: unreadable features ({error}): delete the folder, it is computed again") from error

    def read(indices: np.ndarray) -> Visual:
        return Visual(tokens[indices], None if taps is None else taps[indices])

    _check(folder, read, images, count, encode)
    return read


def _compute(folder: Path, images: Callable[[np.ndarray], np.ndarray], count: int, encode: Encode, label: str) -> None:
    stores: dict[str, np.ndarray] = {}
    for start in track(range(0, count, _BATCH), description=f"features of {label}", transient=True):
        # The last batch is filled up so that one compiled program serves all.
        indices = np.minimum(np.arange(start, start + _BATCH), count - 1)
        visual = encode(images(indices))
        for field, value in (("tokens", visual.tokens), ("taps", visual.taps)):
            if value is None:
                continue
            array = np.asarray(value).astype(np.float16)
            if field not in stores:
                stores[field] = np.lib.format.open_memmap(
                    folder / f"{field}.npy", mode="w+", dtype=np.float16, shape=(count, *array.shape[1:])
                )
            stores[field][start : start + _BATCH] = array[: min(_BATCH, count - start)]
    for store in stores.values():
        store.flush()
    (folder / "meta.json").write_text(json.dumps({"examples": count, "source": label}) + "\n")


def _check(
    folder: Path,
    read: Callable[[np.ndarray], Visual],
    images: Callable[[np.ndarray], np.ndarray],
    count: int,
    encode: Encode,
) -> None:
    """Stored features equal the live encoder's to the rounding of float16."""
    indices = np.minimum(np.arange(_BATCH), count - 1)
    indices[-1] = count - 1
    live, stored = encode(images(indices)), read(indices)
    for a, b in zip((live.tokens, live.taps), (stored.tokens, stored.taps), strict=True):
        if a is None:
            continue
        difference = float(np.max(np.abs(np.asarray(a, np.float32) - b.astype(np.float32))))
        if not difference <= 4e-3 * max(float(np.max(np.abs(b))), 1.0):  # not a number is no agreement
            raise UserError(f"{folder}: stored features differ from the encoder by {difference:.3g}: delete the folder")
