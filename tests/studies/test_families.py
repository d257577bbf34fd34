"""ocr and facts: what is drawn is what is answered, in the frequencies that are promised."""

import collections

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from vlm_jax.studies.glyphs import glyphs, vocabulary
from vlm_jax.studies.glyphs.glyph_facts.builder import GlyphFacts, systematic, world
from vlm_jax.studies.glyphs.glyph_ocr.builder import GlyphOcr


@pytest.fixture(scope="module")
def reader():
    """Reads white digits at given places with nearest neighbours among scikit-learn's own 8 x 8 pictures."""
    pixels, digit = load_digits(return_X_y=True)
    knn = KNeighborsClassifier(3).fit(pixels / 16, digit)

    def read(images, rows, columns, size):
        gray = images[..., 0].astype(float)
        cells = []
        for row in range(rows):
            for column in range(columns):
                y, x = ((i + 0.5) * glyphs.CANVAS / n - size / 2 for i, n in ((row, rows), (column, columns)))
                at = [np.clip((start + (np.arange(8) + 0.5) * size / 8).astype(int), 0, 63) for start in (y, x)]
                cells.append(gray[:, at[0][:, None], at[1]].reshape(len(images), -1))
        cells = np.stack(cells, axis=1)
        cells = (cells - cells.min(axis=2, keepdims=True)) / np.ptp(cells, axis=2, keepdims=True)
        return knn.predict(cells.reshape(-1, 64)).reshape(len(images), rows, columns)

    return read


@pytest.mark.parametrize("split", glyphs.SPLITS)
def test_a_second_reader_finds_the_ocr_answers_in_the_picture(reader, tmp_path, split):
    chunk = GlyphOcr(config="grid4", data_dir=tmp_path).chunk(split, 0, np.random.default_rng(3), 64)
    seen = reader(chunk.images, 4, 4, 14)
    hits = []
    for grid, questions, answers in zip(seen, chunk.questions, chunk.answers, strict=True):
        for question, answer in zip(questions, answers, strict=True):
            _, what, which = question.split()
            line = (
                grid[vocabulary.ORDINALS.index(which)] if what == "row" else grid[:, vocabulary.ORDINALS.index(which)]
            )
            hits += [int(a) == b for a, b in zip(answer.split(), line, strict=True)]
    assert np.mean(hits) > 0.9


def test_every_ocr_config_asks_what_it_says(tmp_path):
    for name in GlyphOcr.builder_configs:
        builder = GlyphOcr(config=name, data_dir=tmp_path)
        side, chunk = builder.builder_config.side, builder.chunk("test", 0, np.random.default_rng(0), 2)
        assert chunk.images.shape == (2, 64, 64, 3)
        asked, answers = chunk.questions[0], [a.split() for a in chunk.answers[0]]
        rows = [a for q, a in zip(asked, answers, strict=True) if "row" in q]
        columns = [a for q, a in zip(asked, answers, strict=True) if "column" in q]
        everything = [a for q, a in zip(asked, answers, strict=True) if "all" in q]
        assert len(rows) in (0, side)
        assert all(len(row) == side for row in rows)
        assert not columns or [list(c) for c in zip(*rows, strict=True)] == columns
        assert all(len(a) == side * side for a in everything)
        assert len(set(asked)) == len(asked) > 0


@pytest.mark.parametrize("split", glyphs.SPLITS)
def test_the_rows_of_a_facts_picture_spell_the_entity_in_order(reader, tmp_path, split):
    builder = GlyphFacts(config="facts1000", data_dir=tmp_path)
    chunk = builder.chunk(split, 0, np.random.default_rng(3), 64)
    seen = reader(chunk.images, 3, 5, 12)
    triples = [tuple(np.bincount(row, minlength=10).argmax() for row in grid) for grid in seen]
    table = builder.world
    fact = {
        tuple(t): dict(zip(chunk.questions[0], row, strict=True))
        for t, row in zip(table.triples, table.facts, strict=True)
    }
    hits = [
        vocabulary.PEOPLE[fact[triple][q]] == a
        for triple, questions, answers in zip(triples, chunk.questions, chunk.answers, strict=True)
        for q, a in zip(questions, answers, strict=True)
    ]
    assert np.mean(hits) > 0.95


def test_a_fact_is_the_same_in_both_splits_and_its_seed_decides_it(tmp_path):
    builder = GlyphFacts(config="facts256", data_dir=tmp_path)
    known = {}
    for split in glyphs.SPLITS:
        chunk = builder.chunk(split, 0, np.random.default_rng(1), 256)
        entities = builder.drawn(split)[:256]
        for entity, questions, answers in zip(entities, chunk.questions, chunk.answers, strict=True):
            for question, answer in zip(questions, answers, strict=True):
                assert known.setdefault((entity, question), answer) == answer
    first, second = (world(256, 8, 16, seed) for seed in (1, 2))
    assert np.mean(first.facts == second.facts) == pytest.approx(1 / 16, abs=0.03)
    assert len(np.unique(first.triples, axis=0)) == 256


@pytest.mark.parametrize("split", glyphs.SPLITS)
def test_entities_follow_zipf_within_one_image(tmp_path, split):
    builder = GlyphFacts(config="facts1000", data_dir=tmp_path)
    drawn = builder.drawn(split)
    weight = [1 / (rank + 5) for rank in range(1, 1001)]
    seen = collections.Counter(drawn.tolist())
    for entity in range(1000):
        assert abs(seen[entity] - len(drawn) * weight[entity] / sum(weight)) < 1
    if split == "train":
        assert len(seen) == 1000  # every entity is met at least once


def test_systematic_draws_are_unbiased_in_order():
    drawn = systematic(np.random.default_rng(0), np.array([0.5, 0.3, 0.2]), 10_000)
    assert np.bincount(drawn).tolist() == [5000, 3000, 2000]
    pairs = np.bincount(drawn[:-1] * 3 + drawn[1:], minlength=9) / 9_999
    np.testing.assert_allclose(pairs, np.outer([0.5, 0.3, 0.2], [0.5, 0.3, 0.2]).ravel(), atol=0.015)
