"""Dense reading: labels by the stated rule, disjoint splits, nothing hidden in a global state."""

import numpy as np
import pytest

from experiments.glyph_encoder import reading
from vlm_jax.studies.glyphs import glyphs


def test_labels_follow_the_rule_patch_by_patch():
    rng = np.random.default_rng(0)
    n, m = 20, 9
    y, x, size = rng.uniform(0, 64, (n, m)), rng.uniform(0, 64, (n, m)), rng.uniform(6, 20, (n, m))
    size[rng.random((n, m)) < 0.3] = 0
    names = rng.integers(0, 5, (n, m, 3))
    labels = reading.patch_labels(y, x, size, names)
    for image in range(n):
        for patch in range(64):
            top, left = patch // 8 * 8, patch % 8 * 8
            best, covered = None, 0.0
            for g in range(m):
                if not size[image, g]:
                    continue
                low, high = ([c - size[image, g] / 2 for c in (y[image, g], x[image, g])] for _ in range(2))
                high = [v + size[image, g] for v in low]
                part = max(0, min(high[0], top + 8) - max(low[0], top)) * max(
                    0, min(high[1], left + 8) - max(low[1], left)
                )
                inside = top <= y[image, g] < top + 8 and left <= x[image, g] < left + 8
                if part / 64 + inside > covered:
                    best, covered = g, part / 64 + inside
            expected = names[image, best] if covered >= 0.4 else reading.NONE
            np.testing.assert_array_equal(labels[image, patch], expected)


@pytest.mark.parametrize("split", glyphs.SPLITS)
def test_a_batch_is_a_function_of_its_arguments(split):
    image, label = reading.reading_batch(3, split, 40, step=7)
    again = reading.reading_batch(3, split, 40, step=7)
    np.testing.assert_array_equal(image, again[0])
    np.testing.assert_array_equal(label, again[1])
    assert not np.array_equal(image, reading.reading_batch(3, split, 40, step=8)[0])
    assert image.shape == (40, 64, 64, 3)
    assert image.dtype == np.uint8
    assert label.shape == (40, 64, 3)


@pytest.mark.parametrize("batch", [1, 5, 9, 50])
def test_any_size_of_batch(batch):
    assert len(reading.reading_batch(0, "test", batch)[0]) == batch


def test_all_classes_occur_and_no_patch_is_half_named():
    _, label = reading.reading_batch(0, "train", 300)
    for kind, classes in enumerate(reading.CLASSES):
        assert set(np.unique(label[..., kind])) == set(range(classes))
    digit, shape, colour = (label[..., k] != reading.NONE[k] for k in range(3))
    np.testing.assert_array_equal(digit | shape, colour)
    assert not (digit & shape).any()


@pytest.mark.parametrize("split", glyphs.SPLITS)
def test_only_instances_of_the_split_are_shown(split, monkeypatch):
    shown = []
    draw = glyphs.draw
    monkeypatch.setattr(glyphs, "draw", lambda c, placed, w: shown.append(placed.glyph) or draw(c, placed, w))
    reading.reading_batch(0, split, 60)
    shown = {g for glyph in shown for g in glyph.ravel().tolist() if g < len(glyphs.atlas().digit)}
    assert shown <= set(getattr(glyphs.atlas(), split).ravel().tolist())
    assert len(shown) > 200


def test_named_patches_are_lit_by_a_glyph():
    image, label = reading.reading_batch(0, "test", 200)
    patches = image.reshape(200, 8, 8, 8, 8, 3).transpose(0, 1, 3, 2, 4, 5).reshape(200, 64, 64, 3).astype(int)
    brightest = patches.max(axis=(2, 3))
    named = label[..., 2] != reading.NONE[2]
    assert (brightest[named] > 150).mean() > 0.97
    saturation = np.ptp(patches, axis=3).max(axis=2)
    coloured = named & (label[..., 2] != glyphs.WHITE)
    assert np.median(saturation[coloured]) > 100
