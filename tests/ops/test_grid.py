"""Patch-grid arithmetic against loops over places, and against the published lists."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.ops import grid as g

GRIDS = [(1, 1), (4, 4), (4, 6), (6, 4), (5, 7), (8, 8)]


def test_cells_are_the_ones_drawn():
    patches = jnp.arange(16)[None]
    cells = g.split_cells(patches, (4, 4), (2, 2))
    assert cells[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


@pytest.mark.parametrize(("grid", "shape"), [((4, 6), (2, 3)), ((4, 6), (1, 2)), ((6, 4), (3, 1)), ((3, 3), (3, 3))])
def test_cells_equal_a_loop(grid, shape):
    (h, w), (r, c) = grid, shape
    x = np.random.default_rng(0).normal(size=(2, h * w, 3))
    got = g.split_cells(jnp.asarray(x), grid, shape)
    for i, j in np.ndindex(r, c):
        rows, columns = range(i * h // r, (i + 1) * h // r), range(j * w // c, (j + 1) * w // c)
        want = np.stack([x[:, y * w + z] for y in rows for z in columns], axis=1)
        np.testing.assert_array_equal(got[:, i * c + j], want.astype(np.float32))


def test_rows_and_grid_are_inverse():
    x = jnp.arange(2 * 24 * 5).reshape(2, 24, 5)
    on_grid = g.to_grid(x, (4, 6))
    assert (on_grid[1, 2, 3] == x[1, 2 * 6 + 3]).all()
    assert (g.to_rows(on_grid) == x).all()


@pytest.mark.parametrize("grid", GRIDS)
def test_shapes_are_every_product_and_the_squarest(grid):
    pooled, cells = g.pooling_shapes(grid), g.cell_shapes(grid)
    assert list(pooled) == sorted({r * c for r in range(1, grid[0] + 1) for c in range(1, grid[1] + 1)})
    for tokens, (r, c) in pooled.items():
        assert r * c == tokens
        for other in range(1, grid[0] + 1):
            if tokens % other == 0 and tokens // other <= grid[1]:
                assert abs(np.log(r / c)) <= abs(np.log(other**2 / tokens)) + 1e-9
    for tokens in range(1, grid[0] * grid[1] + 1):
        pairs = [(r, tokens // r) for r in range(1, tokens + 1) if tokens % r == 0]
        exact = [(r, c) for r, c in pairs if grid[0] % r == 0 and grid[1] % c == 0]
        assert (tokens in cells) == bool(exact)
        assert not exact or cells[tokens] in exact
    assert list(cells) == sorted(cells)


def test_square_grids_give_the_published_counts_and_wide_ones_between():
    assert {1, 4, 16, 36, 64, 144, 576} <= set(g.cell_shapes((24, 24)))
    shapes = g.cell_shapes((8, 8))
    assert (shapes[1], shapes[2], shapes[4], shapes[8], shapes[16]) == ((1, 1), (1, 2), (2, 2), (2, 4), (4, 4))
    assert g.pooling_shapes((8, 8))[6] == (2, 3)
    assert 6 not in shapes


@pytest.mark.parametrize(("size", "parts"), [(8, 2), (8, 3), (7, 3), (5, 5), (27, 4), (1, 1)])
def test_bins_are_the_usual_adaptive_ones(size, parts):
    for i, weights in enumerate(g.bins(size, parts)):
        inside = range(int(np.floor(i * size / parts)), int(np.ceil((i + 1) * size / parts)))
        assert np.flatnonzero(weights).tolist() == list(inside)
        assert set(weights) <= {0.0, 1.0}


@pytest.mark.parametrize(("grid", "shape"), [((8, 8), (2, 4)), ((9, 6), (3, 2)), ((7, 5), (3, 2)), ((4, 4), (4, 4))])
def test_bilinear_equals_jax_image_resize(grid, shape):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, *grid, 3)), jnp.float32)
    mean, mask = g.weighted_mean(g.to_rows(x), None, g.bilinear(grid[0], shape[0]), g.bilinear(grid[1], shape[1]))
    want = jax.jit(lambda x: jax.image.resize(x, (2, *shape, 3), "linear", antialias=False))(x)
    assert mask is None
    np.testing.assert_allclose(mean, g.to_rows(want), atol=1e-5)


def test_weighted_mean_leaves_out_what_is_masked():
    rng = np.random.default_rng(0)
    x, mask = rng.normal(size=(2, 35, 3)), rng.random((2, 35)) < 0.5
    mask[0, :15] = False  # the first three rows of the first image: its first bin of rows is empty
    x[~mask] = np.nan
    rows, columns = g.bins(7, 3), g.bins(5, 2)
    mean, real = g.weighted_mean(jnp.asarray(x, jnp.float32), jnp.asarray(mask), rows, columns)
    for b, i, j in np.ndindex(2, 3, 2):
        places = [y * 5 + z for y in np.flatnonzero(rows[i]) for z in np.flatnonzero(columns[j]) if mask[b, y * 5 + z]]
        assert real[b, i * 2 + j] == bool(places)
        want = x[b, places].mean(0) if places else np.zeros(3)
        np.testing.assert_allclose(mean[b, i * 2 + j], want, atol=1e-6)
    assert not real[0, 0]
