"""Bin packing: valid, and full for conversations as long as LLaVA's."""

import numpy as np
import pytest

from vlm_jax.data import bins

ROW = 2048


def check(sizes: np.ndarray, views: np.ndarray, rows: np.ndarray, size: int, limit: int) -> None:
    """Every item in one row, no row beyond its limits, and none without an item."""
    assert rows.shape == sizes.shape
    assert np.bincount(rows, sizes).max(initial=0) <= size
    assert np.bincount(rows, views).max(initial=0) <= limit
    assert (np.bincount(rows) > 0).all()


@pytest.mark.parametrize("method", [bins.pack, bins.best_fit, bins.even_fit, bins.pair_fit])
def test_rows_are_within_their_limits(method) -> None:
    rng = np.random.default_rng(0)
    for count, size, limit in ((0, 10, 1), (1, 10, 1), (50, 10, 1), (200, 40, 2), (300, 100, 5), (300, 100, 100)):
        sizes, views = rng.integers(1, size + 1, count), rng.integers(0, limit + 1, count)
        check(sizes, views, method(sizes, views, size, limit), size, limit)
    ones = np.ones(30, int)
    check(ones, ones, method(ones, ones, 10, 3), 10, 3)
    assert method(ones, ones, 10, 3).max() + 1 == 10  # views fill these rows, not positions
    assert method(ones, 0 * ones, 10, 3).max() + 1 == 3


def test_items_without_a_view_fill_rows_without_room_for_one() -> None:
    sizes, views = np.array([4, 4, 2]), np.array([1, 1, 0])
    assert bins.pack(sizes, views, 10, 2).max() == 0
    assert bins.pack(sizes[[0, 2, 2, 2]], np.array([1, 0, 0, 0]), 10, 1).max() == 0


def test_the_row_of_an_item_is_a_function_of_the_sizes() -> None:
    sizes = np.random.default_rng(1).integers(1, 400, 500)
    first, again = (bins.pack(sizes, np.ones(500, int), 1000, 8) for _ in range(2))
    np.testing.assert_array_equal(first, again)


def drawn(visual: int) -> tuple[np.ndarray, np.ndarray]:
    """(positions, views) of conversations of one image each."""
    rng = np.random.default_rng(2)
    spread = np.sqrt(2 * np.log(230 / 120))
    sizes = np.clip(120 * np.exp(spread * rng.standard_normal(8000)), 8, None).astype(int) + visual
    return np.minimum(sizes, ROW), np.ones(len(sizes), int)


@pytest.mark.parametrize("visual", [1, 16, 144, 576])
def test_rows_are_95_percent_full_for_lengths_like_llavas(visual: int) -> None:
    """Tokens of text lognormal with median 120 and mean 230, at most 2,048 with the image; an image each."""
    sizes, views = drawn(visual)
    rows = bins.pack(sizes, views, ROW, 16)
    check(sizes, views, rows, ROW, 16)
    assert sizes.sum() / (ROW * (rows.max() + 1)) >= 0.95


@pytest.mark.parametrize("visual", [1, 16, 64, 144, 576])
def test_few_views_are_left_empty_beside_long_conversations(visual: int) -> None:
    """With hardly more views than there are images in a full row, long and short conversations share rows, and few
    more of them are needed than full rows."""
    sizes, views = drawn(visual)
    full = int(sizes.sum()) / ROW
    limit = int(np.ceil(len(sizes) / full))
    rows = bins.pack(sizes, views, ROW, limit)
    check(sizes, views, rows, ROW, limit)
    least = max(full, len(sizes) / limit)
    assert rows.max() + 1 <= 1.03 * least
