"""Shapes to which `ops.grid` reduces a patch grid, and the FLOPs of that. Imports no jax."""

import functools
from collections.abc import Mapping
from types import MappingProxyType

GridShape = tuple[int, int]  # rows, columns


@functools.cache
def pooling_shapes(grid: GridShape) -> Mapping[int, GridShape]:
    """V -> (r, c) for every V = r c with r <= h, c <= w: the squarest shape, and of two the wider."""
    return _squarest(range(1, grid[0] + 1), range(1, grid[1] + 1))


@functools.cache
def cell_shapes(grid: GridShape) -> Mapping[int, GridShape]:
    """V -> (r, c) for every V = r c where r divides h and c divides w: the squarest shape, and of two the wider."""
    return _squarest(*([n for n in range(1, size + 1) if size % n == 0] for size in grid))


def _squarest(rows: range | list[int], columns: range | list[int]) -> Mapping[int, GridShape]:
    best: dict[int, GridShape] = {}
    for shape in sorted(((r, c) for r in rows for c in columns), key=lambda s: (max(s) / min(s), s[0])):
        best.setdefault(shape[0] * shape[1], shape)
    return MappingProxyType(dict(sorted(best.items())))


def square_tokens(grid: GridShape) -> tuple[int, ...]:
    """V = n^2 for n up to the shorter side."""
    return tuple(n * n for n in range(1, min(grid) + 1))


def weighted_mean_flops(grid: GridShape, shape: GridShape, width: int) -> float:
    """FLOPs of `weighted_mean` for one image; a multiply-add counts as two."""
    (h, w), (r, c) = grid, shape
    return 2.0 * width * (r * h * w + r * c * w)
