"""Features of the frozen encoder, computed once for all cells with the same images, encoder and taps.

A folder per key holds `tokens.npy` [n,P,E], `taps.npy` [n,A,P,E] (float16, memory-mapped) and `meta.json`. It is
written atomically, under a lock: one process computes, others wait.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from rich.markup import escape
from rich.progress import track

from vlm_jax.core.errors import UserError
from vlm_jax.core.files import atomic_write
from vlm_jax.core.structs import Visual

Encode = Callable[[np.ndarray], Visual]  # uint8[B,H,H,3] -> Visual
_BATCH = 128


def key(images_sha256: str, encoder_sha256: str, settings: dict[str, Any]) -> str:
    """Name of the folder, a hash of all that the features depend on. `settings` hold encoder fields and the dtype."""
    content = json.dumps([images_sha256, encoder_sha256, settings], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def open_or_compute(
    root: Path, name: str, images: Callable[[np.ndarray], np.ndarray], count: int, encode: Encode, label: str
) -> Callable[[np.ndarray], Visual]:
    """`indices -> Visual` of numpy arrays from `root/name`, which is computed first if it does not exist.

    Args:
        images: indices -> uint8[B,H,H,3].
        count: number of examples of the split.
        encode: the encoder; the first and last stored examples are compared with its output.
        label: of the progress bar.

    Raises `UserError` where the stored features differ from the encoder's, or cannot be read.
    """
    root.mkdir(parents=True, exist_ok=True)
    folder = root / name
    with FileLock(root / f"{name}.lock"):
        if not (folder / "meta.json").exists():
            for stale in root.glob(f"{name}.partial-*"):
                shutil.rmtree(stale)  # of a killed process; they are large
            with atomic_write(folder) as new:
                new.mkdir()
                _compute(new, images, count, encode, label)
    try:
        tokens = np.load(folder / "tokens.npy", mmap_mode="r")
        taps = np.load(folder / "taps.npy", mmap_mode="r") if (folder / "taps.npy").exists() else None
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{folder}: unreadable features ({error}): delete the folder to compute them again") from error

    def read(indices: np.ndarray) -> Visual:
        return Visual(tokens[indices], None if taps is None else taps[indices])

    _check(folder, read, images, count, encode)
    return read


def _compute(folder: Path, images: Callable[[np.ndarray], np.ndarray], count: int, encode: Encode, label: str) -> None:
    stores: dict[str, np.ndarray] = {}
    for start in track(range(0, count, _BATCH), description=f"features of {escape(label)}", transient=True):
        # The last batch is padded so that all have one shape.
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
    """Raises `UserError` where stored features differ from the encoder's by more than the rounding of float16."""
    indices = np.minimum(np.arange(_BATCH), count - 1)
    indices[-1] = count - 1
    encoded, stored = encode(images(indices)), read(indices)
    for a, b in zip((encoded.tokens, encoded.taps), (stored.tokens, stored.taps), strict=True):
        if a is None:
            continue
        difference = float(np.max(np.abs(np.asarray(a, np.float32) - b.astype(np.float32))))
        if not difference <= 4e-3 * max(float(np.max(np.abs(b))), 1.0):  # also True for NaN
            raise UserError(f"{folder}: stored features differ from the encoder by {difference:.3g}: delete the folder")
