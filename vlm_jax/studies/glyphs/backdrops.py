"""What lies behind the glyphs: plain dark paper, or dimmed photographs and scans of scikit-image.

The pictures behind "train" and "test" are different ones.
"""

import functools

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vlm_jax.core.errors import unknown
from vlm_jax.studies.glyphs.glyphs import CANVAS, SPLITS

PICTURES = {
    "train": ("astronaut", "brick", "camera", "chelsea", "coffee", "coins", "page", "moon", "immunohistochemistry"),
    "test": ("rocket", "grass", "text", "clock", "hubble_deep_field"),
}
_PICTURE_SIDE = 192  # every picture is brought to this size before it is cropped, so that crops show things
_LIGHT = (0.2, 0.5)  # share of a picture's light that is left: the glyphs stay the brightest


@functools.cache
def _pictures(split: str) -> UInt8[np.ndarray, "pictures side side 3"]:
    from skimage import data

    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    pictures = (Image.fromarray(getattr(data, name)()).convert("RGB") for name in PICTURES[split])
    return np.stack([np.asarray(p.resize((_PICTURE_SIDE, _PICTURE_SIDE), Image.Resampling.LANCZOS)) for p in pictures])


def paper(rng: np.random.Generator, count: int) -> UInt8[np.ndarray, "n H H 3"]:
    """Dark canvases, each of its own shade."""
    shade = rng.integers(4, 28, (count, 1, 1, 1), dtype=np.uint8)
    return np.tile(shade, (1, CANVAS, CANVAS, 3))


def photo(rng: np.random.Generator, split: str, count: int) -> UInt8[np.ndarray, "n H H 3"]:
    """Random crops of the split's pictures, mirrored at random and dimmed."""
    pictures = _pictures(split)
    which = rng.integers(len(pictures), size=(count, 1, 1))
    top, left = rng.integers(_PICTURE_SIDE - CANVAS, size=(2, count, 1, 1))
    across = np.where(rng.random((count, 1, 1)) < 0.5, np.arange(CANVAS), np.arange(CANVAS)[::-1])
    crops = pictures[which, top + np.arange(CANVAS)[:, None], left + across]
    return (crops * rng.uniform(*_LIGHT, (count, 1, 1, 1))).astype(np.uint8)


def backdrop(rng: np.random.Generator, name: str, split: str, count: int) -> UInt8[np.ndarray, "n H H 3"]:
    """`count` canvases of the kind that a config names."""
    if name == "paper":
        return paper(rng, count)
    if name == "photo":
        return photo(rng, split, count)
    raise unknown("backdrop", name, ("paper", "photo"))
