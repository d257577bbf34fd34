"""Handwriting: which instances are kept, how they are split, and that drawing is geometry."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sklearn.datasets import load_digits

from vlm_jax.core.errors import UserError
from vlm_jax.studies.glyphs import backdrops, glyphs


def _placed(glyph, y, x, size, colour=(255.0, 255.0, 255.0), **warp):
    fields = [np.full((1, 1), v, np.float32) for v in (y, x, size)]
    warp = {name: np.full((1, 1), v, np.float32) for name, v in warp.items()}
    return glyphs.Placed(np.array([[glyph]]), *fields, np.array(colour, np.float32).reshape(1, 1, 3), **warp)


def _black():
    return np.zeros((1, glyphs.CANVAS, glyphs.CANVAS, 3), np.uint8)


def _square():
    return int(glyphs.shape_glyphs(np.array([1]))[0])


def test_no_writing_is_shown_in_both_splits():
    book = glyphs.atlas()
    assert not set(book.train.ravel()) & set(book.test.ravel())
    assert set(book.train.ravel()) | set(book.test.ravel()) == set(range(len(book.digit)))


def test_the_disjoint_instances_are_also_different_pictures():
    ink = glyphs.atlas().ink[: len(glyphs.atlas().digit)]
    assert len(np.unique(ink.reshape(len(ink), -1), axis=0)) == len(ink)


def test_only_digits_whose_neighbours_agree_are_kept():
    pixels, digit = load_digits(return_X_y=True)
    far = cdist(pixels, pixels)
    np.fill_diagonal(far, np.inf)
    clear = []
    for i, row in enumerate(far):
        near = np.flatnonzero(row <= np.sort(row)[9] + 1e-9)
        if all(digit[j] == digit[i] for j in near):
            clear.append(i)
    np.testing.assert_array_equal(glyphs.atlas().digit, digit[clear])


@pytest.mark.parametrize("split", glyphs.SPLITS)
def test_write_picks_the_digit_and_every_instance_of_the_split(split):
    digits = np.repeat(np.arange(10), 3000).reshape(10, 3000)
    written = glyphs.write(np.random.default_rng(0), split, digits)
    np.testing.assert_array_equal(glyphs.atlas().digit[written], digits)
    assert set(written.ravel()) == set(getattr(glyphs.atlas(), split).ravel())


def test_an_unknown_split_is_named():
    with pytest.raises(UserError, match=r"unknown split 'tset'.*'test'"):
        glyphs.write(np.random.default_rng(0), "tset", np.array([1]))


def test_moving_a_glyph_by_whole_pixels_moves_its_picture():
    here = glyphs.draw(_black(), _placed(3, 20.3, 30.6, 14), 18)
    there = glyphs.draw(_black(), _placed(3, 27.3, 25.6, 14), 18)
    np.testing.assert_allclose(np.roll(here, (7, -5), (1, 2)).astype(int), there, atol=1)
    assert here.max() > 200


@pytest.mark.parametrize(("size", "stretch"), [(8, 1.0), (16, 1.0), (20, 1.4)])
def test_the_square_has_the_area_that_its_size_says(size, stretch):
    image = glyphs.draw(_black(), _placed(_square(), 32, 32, size, stretch=stretch), 34)
    area = image[..., 0].sum() / 255
    assert area == pytest.approx((0.8 * size) ** 2, rel=0.13)
    rows, columns = (np.ptp(np.flatnonzero(image[0, ..., 0].max(axis=axis) > 127)) + 1 for axis in (1, 0))
    assert rows / columns == pytest.approx(stretch, rel=0.15)


def test_a_quarter_turn_of_the_square_changes_nothing():
    still = glyphs.draw(_black(), _placed(_square(), 32, 32, 16), 26)
    turned = glyphs.draw(_black(), _placed(_square(), 32, 32, 16, angle=np.pi / 2), 26)
    np.testing.assert_allclose(still.astype(int), turned, atol=2)


def test_size_zero_draws_nothing_and_the_canvas_is_not_written_to():
    canvas = np.full((1, 64, 64, 3), 9, np.uint8)
    np.testing.assert_array_equal(glyphs.draw(canvas, _placed(0, 32, 32, 0), 16), canvas)
    glyphs.draw(canvas, _placed(0, 32, 32, 16), 20)
    assert (canvas == 9).all()


def test_ink_takes_its_colour_and_a_glyph_over_the_edge_is_cut():
    image = glyphs.draw(_black(), _placed(_square(), 32, 32, 16, (200, 100, 50)), 18)
    np.testing.assert_array_equal(image[0, 32, 32], (200, 100, 50))
    cut = glyphs.draw(_black(), _placed(_square(), 0, 63.5, 16), 18)
    assert cut[0, 0, 63].min() == 255
    assert cut[0, 10:].max() == 0


def test_backdrops_differ_between_the_splits_and_stay_dark():
    assert not set(backdrops.PICTURES["train"]) & set(backdrops.PICTURES["test"])
    for name in ("paper", "photo"):
        assert backdrops.backdrop(np.random.default_rng(0), name, "train", 50).max() < 130
    with pytest.raises(UserError, match="unknown backdrop 'foto': did you mean 'photo'"):
        backdrops.backdrop(np.random.default_rng(0), "foto", "train", 1)
