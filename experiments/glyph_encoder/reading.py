"""Dense glyph labels of every patch, which pre-train the encoder of the study on images like those of all families.

Promises: a batch is a pure function of (seed, split, size, step); "test" shows only instances and pictures that "train"
never shows. Training images are warped, shaded and noised in ways that keep the label; test images look as the suite's
images do.

A patch is labelled by the glyph whose centre lies in it, else by the glyph that covers most of it if that is at
least `_COVERED` of the patch, else as empty.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from vlm_jax.studies.glyphs import backdrops, glyphs, layouts
from vlm_jax.studies.glyphs.vocabulary import COLOURS, SHAPES

PATCH = 8  # pixels a side of a labelled patch
CLASSES = (11, len(SHAPES) + 1, len(COLOURS) + 1)  # digit, shape, colour; the last of each is "none"
NONE = tuple(n - 1 for n in CLASSES)

_GRIDS = (
    (4, 4),
    (4, 4),
    (4, 4),
    (6, 6),
    (8, 8),
    (3, 5),
    (3, 5),
    (3, 3),
    (5, 5),
)  # equally often; some are listed twice
_LARGEST = 20.0  # pixels a side
_COVERED = 0.4
_PHOTO_SHARE = 0.25
_SCENE_SHARE = 0.4  # images with shapes and colours; the others show white digits, as ocr and facts do


class _Warp(NamedTuple):
    """Ranges of the label-preserving changes."""

    angle: float  # radians
    shear: float
    stretch: float  # of the logarithm of height over width
    noise: float  # largest standard deviation, of 255
    faintest: float  # intensity of the ink


_WARPS = {"train": _Warp(0.17, 0.17, 0.17, 9.0, 0.6), "test": _Warp(0.0, 0.0, 0.0, 0.0, 0.75)}


def reading_batch(
    seed: int, split: str, batch: int, step: int = 0
) -> tuple[UInt8[np.ndarray, "B 64 64 3"], Int[np.ndarray, "B P 3"]]:
    """Images and, for every patch in row-major order, (digit, shape, colour) in the classes of `CLASSES`."""
    rng = np.random.default_rng([seed, glyphs.SPLITS.index(split), step])
    sizes = np.bincount((np.arange(batch) + rng.integers(len(_GRIDS))) % len(_GRIDS), minlength=len(_GRIDS))
    parts = [_part(rng, split, int(n), grid) for n, grid in zip(sizes, _GRIDS, strict=True) if n]
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    order = rng.permutation(batch)
    return images[order], labels[order]


def _part(rng: np.random.Generator, split: str, count: int, grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Images whose glyphs stand in the cells of one grid."""
    warp, shape = _WARPS[split], (count, grid[0] * grid[1])
    scene = rng.random((count, 1)) < _SCENE_SHARE
    drawn = rng.random(shape) < np.where(rng.random((count, 1)) < 0.5, 1.0, rng.uniform(0.2, 0.9, (count, 1)))
    is_shape = scene & (rng.random(shape) < 0.5)
    digit, kind = rng.integers(0, 10, shape), rng.integers(0, len(SHAPES), shape)
    colour = np.where(scene, rng.integers(0, len(COLOURS), shape), glyphs.WHITE)
    glyph = np.where(is_shape, glyphs.shape_glyphs(kind), glyphs.write(rng, split, digit))

    cell = min(glyphs.CANVAS / grid[0], glyphs.CANVAS / grid[1])
    size = np.where(drawn, np.minimum(cell * rng.uniform(0.7, 1.0, shape), _LARGEST), 0)
    slack = np.maximum((cell - size) / 2, 0.08 * cell)
    y, x = (c + rng.uniform(-1, 1, shape) * slack for c in layouts.grid_centres(*grid))
    ink = glyphs.PALETTE[colour] * rng.uniform(warp.faintest, 1.0, (*shape, 1))
    turned = (rng.uniform(-r, r, shape) for r in (warp.angle, warp.shear, warp.stretch))
    angle, shear, stretch = turned
    placed = glyphs.Placed(glyph, y, x, size, ink.astype(np.float32), angle, shear, np.exp(stretch))

    behind = np.where(
        rng.random((count, 1, 1, 1)) < _PHOTO_SHARE, backdrops.photo(rng, split, count), backdrops.paper(rng, count)
    )
    images = glyphs.draw(behind, placed, math.ceil(min(cell, _LARGEST) * (1.25 if warp.angle else 1.05)) + 1)
    if warp.noise:
        grain = rng.standard_normal(images.shape, np.float32) * rng.uniform(0, warp.noise, (count, 1, 1, 1))
        images = np.clip(images + grain, 0, 255).astype(np.uint8)
    names = np.stack([np.where(is_shape, NONE[0], digit), np.where(is_shape, kind, NONE[1]), colour], axis=-1)
    return images, patch_labels(y, x, size, names)


def patch_labels(
    y: Float[np.ndarray, "n m"],
    x: Float[np.ndarray, "n m"],
    size: Float[np.ndarray, "n m"],
    names: Int[np.ndarray, "n m 3"],
) -> Int[np.ndarray, "n P 3"]:
    """What covers every patch: `names` of the glyph that the module's rule picks, or `NONE`."""
    starts = np.arange(0, glyphs.CANVAS, PATCH)
    near = []
    inside = []
    for centre in (y, x):
        low, high = (centre - size / 2)[..., None], (centre + size / 2)[..., None]
        near.append(np.clip(np.minimum(high, starts + PATCH) - np.maximum(low, starts), 0, None) / PATCH)
        inside.append((centre[..., None] >= starts) & (centre[..., None] < starts + PATCH) & (size > 0)[..., None])
    covered = near[0][..., :, None] * near[1][..., None, :]
    covered = covered + (inside[0][..., :, None] & inside[1][..., None, :])
    covered = covered.reshape(*size.shape, -1)
    winner = covered.argmax(axis=1)
    labels = np.take_along_axis(names, winner[..., None], axis=1)
    empty = np.take_along_axis(covered, winner[:, None], axis=1)[:, 0] < _COVERED
    return np.where(empty[..., None], NONE, labels).astype(np.int32)
