"""Patch grid arithmetic: P = h w patches in row-major order, and reductions of the h x w grid to r x c.

grid 4 x 4, shape 2 x 2:    0  1 |  2  3        cell 0 holds patches 0 1 4 5
                            4  5 |  6  7        cell 1           2 3 6 7
                            -----+------        cell 2           8 9 12 13
                            8  9 | 10 11        cell 3           10 11 14 15
                           12 13 | 14 15
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from vlm_jax.ops.grid_shapes import (  # noqa: F401
    GridShape,
    cell_shapes,
    pooling_shapes,
    square_tokens,
    weighted_mean_flops,
)


def to_grid(tokens: Shaped[Array, "B P *rest"], grid: GridShape) -> Shaped[Array, "B h w *rest"]:
    """Patches laid out on their grid."""
    return tokens.reshape(tokens.shape[0], *grid, *tokens.shape[2:])


def to_rows(tokens: Shaped[Array, "B h w *rest"]) -> Shaped[Array, "B P *rest"]:
    """The inverse of `to_grid`."""
    return tokens.reshape(tokens.shape[0], -1, *tokens.shape[3:])


def split_cells(tokens: Shaped[Array, "B P *rest"], grid: GridShape, shape: GridShape) -> Shaped[Array, "B V S *rest"]:
    """The patches of each of the r x c equal cells, V = r c cells of S = P / V patches. r divides h and c divides w."""
    (h, w), (r, c) = grid, shape
    rest = tokens.shape[2:]
    parts = jnp.swapaxes(tokens.reshape(-1, r, h // r, c, w // c, *rest), 2, 3)
    return parts.reshape(tokens.shape[0], r * c, -1, *rest)


def bins(size: int, parts: int) -> Float[np.ndarray, "parts size"]:
    """Weights of adaptive average pooling on one axis: row i is 1 from floor(i size / parts) up to
    ceil((i + 1) size / parts), so neighbouring bins may share an element.
    """
    start = np.arange(parts) * size // parts
    stop = -(-np.arange(1, parts + 1) * size // parts)
    index = np.arange(size)[None, :]
    return ((start[:, None] <= index) & (index < stop[:, None])).astype(np.float32)


def bilinear(size: int, parts: int) -> Float[np.ndarray, "parts size"]:
    """Weights of linear down-sampling on one axis (pixel centres, no antialiasing), parts <= size: row i interpolates
    at (i + 1/2) size / parts - 1/2.
    """
    point = (np.arange(parts) + 0.5) * size / parts - 0.5
    distance = np.abs(point[:, None] - np.arange(size)[None, :])
    return np.maximum(0.0, 1.0 - distance).astype(np.float32)


def bicubic(size: int, parts: int) -> Float[np.ndarray, "parts size"]:
    """Weights of cubic convolution on one axis (a = -3/4, Keys 1981; pixel centres, borders repeated)."""
    point = (np.arange(parts) + 0.5) * size / parts - 0.5
    out, a = np.zeros((parts, size)), -0.75
    for tap in range(-1, 3):
        index = np.floor(point).astype(int) + tap
        d = np.abs(point - index)
        near, far = ((a + 2) * d - (a + 3)) * d**2 + 1, ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        np.add.at(out, (np.arange(parts), np.clip(index, 0, size - 1)), np.where(d <= 1, near, far))
    return out


def sincos(grid: GridShape, width: int) -> Float[np.ndarray, "P width"]:
    """Fixed positions: the first half from the column, the second from the row, each sines then cosines of the index
    times 10000 ** (-4 i / width) (as MAE's, arXiv 2111.06377)."""
    frequency = 10_000.0 ** (-np.arange(width // 4) / (width / 4))
    row, column = (index.reshape(-1, 1) * frequency for index in np.indices(grid))
    return np.concatenate([np.sin(column), np.cos(column), np.sin(row), np.cos(row)], axis=1).astype(np.float32)


def resize(table: Float[np.ndarray, "N E"], grid: GridShape, new_grid: GridShape) -> Float[np.ndarray, "M E"]:
    """A table of positions interpolated to another grid with `bicubic`."""
    rows, columns = (bicubic(old, new) for old, new in zip(grid, new_grid, strict=True))
    out = np.einsum("ri,cj,ije->rce", rows, columns, table.reshape(*grid, -1), optimize=True)
    return out.reshape(-1, table.shape[1]).astype(np.float32)


def weighted_mean(
    tokens: Float[Array, "B P E"],
    mask: Bool[Array, "B P"] | None,
    rows: Float[np.ndarray, "r h"],
    columns: Float[np.ndarray, "c w"],
) -> tuple[Float[Array, "B V E"], Bool[Array, "B V"] | None]:
    """The mean of the valid tokens with weights rows[i, y] * columns[j, x] for each (i, j), and its mask.

    mask: True where a token is valid; None: all, and then the second output is None too. An output without any valid
        token is zero, and its mask False.
    """
    if mask is None:
        total = _sum(tokens, rows, columns)
        return (total / (rows.sum(1)[:, None] * columns.sum(1)).reshape(1, -1, 1)).astype(tokens.dtype), None
    real = mask[..., None]
    total = _sum(jnp.where(real, tokens, 0), rows, columns)
    share = _sum(real.astype(tokens.dtype), rows, columns)
    mean = total / jnp.where(share > 0, share, 1.0)
    return mean.astype(tokens.dtype), share[..., 0] > 0


def _sum(tokens: Float[Array, "B P E"], rows: Float[np.ndarray, "r h"], columns: Float[np.ndarray, "c w"]) -> Array:
    grid = to_grid(tokens, (rows.shape[1], columns.shape[1]))
    by_row = jnp.einsum("bhwe,rh->brwe", grid, rows.astype(tokens.dtype), preferred_element_type=jnp.float32)
    return to_rows(jnp.einsum("brwe,cw->brce", by_row, columns, preferred_element_type=jnp.float32))
