"""What a scene is: objects in cells, every object of a colour of its own, so that its colour names it."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from vlm_jax.studies.glyphs.vocabulary import COLOURS, SHAPES

SIDE = 4  # cells a side
_HELD_OUT_ONE_IN = 8


class Scenes(NamedTuple):
    """n scenes, by colour: c runs over `COLOURS`. Absent things are -1."""

    value: Int[np.ndarray, "n c"]  # 0 to 9 where the object of that colour is a digit
    shape: Int[np.ndarray, "n c"]  # number in `SHAPES` where it is a shape; every shape at most once
    cells: Int[np.ndarray, "n c copies"]  # where it stands, row by row

    @property
    def present(self) -> Bool[np.ndarray, "n c"]:
        return self.cells[..., 0] >= 0

    @property
    def named(self) -> Int[np.ndarray, "n names"]:
        """The colour of the object that each name (a colour, or a shape) means."""
        colours = np.where(self.present, np.arange(len(COLOURS)), -1)
        shown = self.shape[:, None, :] == np.arange(len(SHAPES))[:, None]
        return np.concatenate([colours, np.where(shown.any(axis=2), shown.argmax(axis=2), -1)], axis=1)


def held_out(value: Int[np.ndarray, "n c"]) -> Bool[np.ndarray, " n"]:
    """Scenes whose digits, taken together, are kept for the test split."""
    code = np.zeros(len(value), np.uint64)
    for column in (value.T + 1).astype(np.uint64):
        code = code * np.uint64(11) + column
    mixed = (code * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
    return mixed % np.uint64(_HELD_OUT_ONE_IN) == 0


class SceneLayout(NamedTuple):
    """How much there is to see."""

    digits: int
    shapes: int
    colours: int  # of the first so many of `COLOURS`
    copies: int  # how often each object is drawn
    places: str  # "free": any cells; "rows": colour by colour, in the order of `COLOURS`


def sample(rng: np.random.Generator, split: str, count: int, layout: SceneLayout) -> Scenes:
    """Random scenes; those of the test split show digits that training never shows together."""
    digits, shapes, colours, copies, places = layout
    rows = np.arange(count)[:, None]
    order = rng.permuted(np.tile(np.arange(colours), (count, 1)), axis=1)
    value, shape = (np.full((count, len(COLOURS)), -1, np.int8) for _ in range(2))
    kinds = rng.permuted(np.tile(np.arange(len(SHAPES)), (count, 1)), axis=1)[:, :shapes]
    shape[rows, order[:, digits : digits + shapes]] = kinds
    todo = np.arange(count)
    while len(todo):
        value[todo[:, None], order[todo, :digits]] = rng.integers(0, 10, (len(todo), digits))
        todo = todo[held_out(value[todo]) != (split == "test")]
    cells = np.full((count, len(COLOURS), copies), -1, np.int8)
    shown = np.sort(order[:, : digits + shapes], axis=1)
    cell = np.tile(np.arange(SIDE * SIDE), (count, 1))
    if places == "free":
        cell = rng.permuted(cell, axis=1)
    cells[rows, shown] = cell[:, : (digits + shapes) * copies].reshape(count, -1, copies)
    return Scenes(value, shape, cells)
