"""Digits of real writers and a few shapes, drawn on a canvas: everything the suite shows.

Promises: the instances behind "train" and "test" are disjoint, and the same on every machine; all drawing is a pure
function of its arguments (randomness comes in as a `numpy.random.Generator`); a canvas is uint8 RGB.

The handwriting is scikit-learn's copy of the UCI optical digits (8 x 8 pixels, 1,797 instances). An instance is kept
only where all of its nearest neighbours (ties too) carry its own label: the rest are digits that people read in two
ways, and would put a floor under every error.
"""

import functools
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from scipy import ndimage

from vlm_jax.core.errors import unknown
from vlm_jax.studies.glyphs.vocabulary import COLOURS

CANVAS = 64  # H, pixels a side
PALETTE = np.array(
    [(235, 50, 45), (45, 205, 70), (60, 110, 255), (245, 215, 50), (195, 75, 225), (245, 245, 245)], np.float32
)
WHITE = COLOURS.index("white")
SPLITS = ("train", "test")

_AGREEING_NEIGHBOURS = 10
_TEST_SHARE = 0.25
_SPLIT_SEED = 20240611
_SIDE = 20  # pixels a side of a glyph in the atlas
_BLOCK = 32  # images drawn at once, so that they stay in the cache
_PAD = 2  # empty border of the atlas, so that sampling needs no bounds check


class Atlas(NamedTuple):
    """Every glyph, larger than it is drawn: digit instances, the shapes in the vocabulary's order, blank."""

    ink: Float[np.ndarray, "glyphs side side"]  # 0 is paper, 1 is ink
    digit: Int[np.ndarray, " instances"]
    train: Int[np.ndarray, "10 most"]  # instances of every digit, the row repeated to fill
    test: Int[np.ndarray, "10 most"]
    train_counts: Int[np.ndarray, " 10"]
    test_counts: Int[np.ndarray, " 10"]


def _clear_digits() -> tuple[np.ndarray, np.ndarray]:
    """The instances whose nearest neighbours all agree with their label: ink in [0, 1], and the digit."""
    from sklearn.datasets import load_digits

    pixels, digit = load_digits(return_X_y=True)
    square = (pixels**2).sum(axis=1)  # of small whole numbers: exact, so all machines keep the same instances
    far = square[:, None] + square - 2 * pixels @ pixels.T
    nearest = np.partition(far, _AGREEING_NEIGHBOURS, axis=1)[:, [_AGREEING_NEIGHBOURS]]
    clear = np.all((digit == digit[:, None]) | (far > nearest), axis=1)
    return pixels[clear].reshape(-1, 8, 8).astype(np.float32) / 16, digit[clear].astype(np.int64)


def _enlarged(ink: np.ndarray) -> np.ndarray:
    """8 x 8 -> atlas size by cubic splines; the contrast is raised so that strokes stay strokes."""
    padded = np.pad(ink, ((0, 0), (1, 1), (1, 1)))
    at = (np.arange(_SIDE) + 0.5) * 8 / _SIDE + 0.5
    zoomed = ndimage.map_coordinates(
        padded, np.meshgrid(np.arange(len(ink)), at, at, indexing="ij"), order=3, prefilter=True
    )
    return np.clip((zoomed - 0.15) / 0.65, 0, 1).astype(np.float32)


def _shapes() -> np.ndarray:
    """The shapes by their distance functions, at atlas size."""
    y, x = (np.mgrid[:_SIDE, :_SIDE] + 0.5) / _SIDE * 2 - 1
    circle = np.hypot(x, y) - 0.92
    square = np.maximum(abs(x), abs(y)) - 0.8
    triangle = np.maximum(abs(x) * 0.88 - (y + 0.9) * 0.44, y - 0.82)
    diagonals = np.minimum(abs(x - y), abs(x + y)) / np.sqrt(2) - 0.24
    cross = np.maximum(diagonals, np.maximum(abs(x), abs(y)) - 0.88)
    distance = np.stack([circle, square, triangle, cross]) * _SIDE / 2
    return np.clip(0.5 - distance, 0, 1).astype(np.float32)


@functools.cache
def atlas() -> Atlas:
    """All glyphs and the fixed split of their instances. Computed once a process, in well under a second."""
    ink, digit = _clear_digits()
    rng = np.random.default_rng(_SPLIT_SEED)
    tables: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    for value in range(10):
        mine = rng.permutation(np.flatnonzero(digit == value))
        held_out = round(len(mine) * _TEST_SHARE)
        tables["test"].append(mine[:held_out])
        tables["train"].append(mine[held_out:])
    most = max(map(len, tables["train"]))
    train, test = (np.stack([np.resize(row, most) for row in tables[split]]) for split in SPLITS)
    counts = [np.array([len(row) for row in tables[split]]) for split in SPLITS]
    glyphs = np.concatenate([_enlarged(ink), _shapes(), np.zeros((1, _SIDE, _SIDE), np.float32)])
    return Atlas(np.pad(glyphs, ((0, 0), (_PAD, _PAD), (_PAD, _PAD))), digit, train, test, *counts)


def write(rng: np.random.Generator, split: str, digits: Int[np.ndarray, "*n"]) -> Int[np.ndarray, "*n"]:
    """A random instance of that split for every digit, as its number in the atlas."""
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    book = atlas()
    table, counts = (book.train, book.train_counts) if split == "train" else (book.test, book.test_counts)
    return table[digits, (rng.random(np.shape(digits)) * counts[digits]).astype(np.int64)]


def shape_glyphs(shapes: Int[np.ndarray, "*n"]) -> Int[np.ndarray, "*n"]:
    """The atlas numbers of shapes."""
    return len(atlas().digit) + np.asarray(shapes, np.int64)


class Placed(NamedTuple):
    """Glyphs on canvases: m of them on each of n. `size` 0 draws nothing."""

    glyph: Int[np.ndarray, "n m"]  # number in the atlas
    y: Float[np.ndarray, "n m"]  # centre, pixels from the top
    x: Float[np.ndarray, "n m"]
    size: Float[np.ndarray, "n m"]  # pixels a side
    colour: Float[np.ndarray, "n m 3"]  # 0 to 255
    angle: Float[np.ndarray, "n m"] | float = 0.0  # radians
    shear: Float[np.ndarray, "n m"] | float = 0.0
    stretch: Float[np.ndarray, "n m"] | float = 1.0  # height over width

    @property
    def warp(self) -> tuple[Any, ...]:
        """Size, angle, shear, stretch."""
        return self.size, *self[5:]


def draw(canvas: UInt8[np.ndarray, "n H H 3"], placed: Placed, window: int) -> UInt8[np.ndarray, "n H H 3"]:
    """Draws the glyphs, in order, over a copy of the canvases; ink covers what lies below in proportion to its alpha.

    `window` is the side in pixels of the square that is touched around each centre: it must hold the largest glyph.
    """
    warp = _inverse(*(np.broadcast_to(np.asarray(f, np.float32), placed.glyph.shape) for f in placed.warp))
    glyphs = np.where(placed.size > 0, placed.glyph, len(atlas().ink) - 1)
    margin = window // 2 + 1  # so that a window at the edge needs no bounds check
    drawn = []
    for start in range(0, len(canvas), _BLOCK):
        block = slice(start, start + _BLOCK)
        images = np.pad(canvas[block], ((0, 0), (margin, margin), (margin, margin), (0, 0))).astype(np.float32)
        for slot in np.flatnonzero(np.any(placed.size[block] > 0, axis=0)).tolist():
            y, x, colour = (field[block, slot] for field in (placed.y, placed.x, placed.colour))
            _stamp(images, glyphs[block, slot], y + margin, x + margin, warp[block, slot], colour, window)
        drawn.append((images[:, margin:-margin, margin:-margin] + 0.5).astype(np.uint8))
    return np.concatenate(drawn)


def _inverse(
    size: Float[np.ndarray, "n m"],
    angle: Float[np.ndarray, "n m"],
    shear: Float[np.ndarray, "n m"],
    stretch: Float[np.ndarray, "n m"],
) -> Float[np.ndarray, "n m 2 2"]:
    """From (y, x) on the canvas, seen from a glyph's centre, to (y, x) in the atlas."""
    scale = _SIDE / np.maximum(size, 1e-3)
    cos, sin, stretch = np.cos(angle) * scale, np.sin(angle) * scale, np.sqrt(stretch)
    down = np.stack([cos, sin], axis=-1) / stretch[..., None]
    across = np.stack([shear * cos - sin, shear * sin + cos], axis=-1) * stretch[..., None]
    return np.stack([down, across], axis=-2)


def _stamp(
    images: Float[np.ndarray, "n side side 3"],
    glyph: Int[np.ndarray, " n"],
    y: Float[np.ndarray, " n"],
    x: Float[np.ndarray, " n"],
    inverse: Float[np.ndarray, "n 2 2"],
    colour: Float[np.ndarray, "n 3"],
    window: int,
) -> None:
    """Draws one glyph on each image, in place: bilinear samples of the atlas are its alpha."""
    ink, side = atlas().ink, images.shape[1]
    wide = ink.shape[-1]
    corner_y, corner_x = (np.floor(c - window / 2 + 0.5).astype(np.int64)[:, None, None] for c in (y, x))
    at = np.arange(window)
    dy = (corner_y + at[:, None] + 0.5 - y[:, None, None]).astype(np.float32)
    dx = (corner_x + at + 0.5 - x[:, None, None]).astype(np.float32)
    middle = _SIDE / 2 + _PAD - 0.5
    v, u = (
        np.clip(dy * row[:, None, None, 0] + dx * row[:, None, None, 1] + middle, 0, wide - 1.001)
        for row in (inverse[:, 0], inverse[:, 1])
    )
    v0, u0 = v.astype(np.int32), u.astype(np.int32)
    fv, fu = v - v0, u - u0
    first = v0 * wide + u0 + (glyph * wide * wide)[:, None, None]
    samples = ink.reshape(-1)
    above = samples[first] * (1 - fu) + samples[first + 1] * fu
    under = samples[first + wide] * (1 - fu) + samples[first + wide + 1] * fu
    alpha = (above * (1 - fv) + under * fv)[..., None]

    pixels = images.reshape(-1, 3)
    spots = np.arange(len(images))[:, None, None] * side * side + (corner_y + at[:, None]) * side + corner_x + at
    below = pixels.take(spots, axis=0)
    pixels[spots] = below + alpha * (colour[:, None, None] - below)
