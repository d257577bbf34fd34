"""Batches: the example of `core.structs.Batch`, a second packer, and Grain's promises."""

import itertools
import json

import numpy as np
import pytest

from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import DataSpec, EvaluationSpec
from vlm_jax.core.structs import Visual
from vlm_jax.data import pipeline, tokenizer
from vlm_jax.data.sources import Split


def _split(examples):
    """A split from [[(question, answer), ...], ...]."""
    shape = len(examples), len(examples[0])
    pairs = [pair for example in examples for pair in example]
    questions, asked = tokenizer.encode_table([q for q, _ in pairs])
    answers, replied = tokenizer.encode_table([a for _, a in pairs], end=(tokenizer.END_ID,))
    return Split(
        "made/up:train",
        "ocr",
        "0" * 64,
        tuple(f"id{i}" for i in range(shape[0])),
        (b"",) * shape[0],
        questions.reshape(*shape, -1),
        asked.reshape(shape),
        answers.reshape(*shape, -1),
        replied.reshape(shape),
    )


@pytest.fixture(scope="module")
def split():
    """37 examples with 5 questions each, of uneven lengths."""
    rng = np.random.default_rng(0)
    words = tokenizer.vocabulary.WORDS[2:]
    text = lambda most: " ".join(rng.choice(words, rng.integers(1, most + 1)))  # noqa: E731
    return _split([[(text(5), text(4)) for _ in range(5)] for _ in range(37)])


def _spec(batch_examples=8, questions=3, text_tokens=40):
    return DataSpec("made", "up", "train", "test", batch_examples, questions, text_tokens, True)


def _features(indices):
    return Visual(np.stack([indices] * 2, axis=1).astype(np.float32)[:, :, None])


def _take(split, spec, count, **options):
    options = {"seed": 5, "features": _features, **options}
    return list(itertools.islice(pipeline.train_batches(split, spec, **options), count))


def _equal(a, b):
    assert a._fields == b._fields
    for left, right in zip(a, b, strict=True):
        if isinstance(left, Visual):
            left, right = left.tokens, right.tokens
        np.testing.assert_array_equal(left, right)


def test_the_drawn_example():
    split = _split([[("read row one", "3 3 8 0"), ("read row two", "4 7 1 9")]])
    packed = pipeline.pack(split, np.array([0]), np.array([[1, 0]]), 18)
    words = lambda text: [0 if w == "pad" else tokenizer.vocabulary.WORDS.index(w) for w in text.split()]  # noqa: E731
    end = tokenizer.vocabulary.END
    expected = {
        "text": words(f"read row two 4 7 1 9 {end} read row one 3 3 8 0 {end} pad pad"),
        "target": words(f"row two 4 7 1 9 {end} pad row one 3 3 8 0 {end} pad pad pad"),
        "weight": [0, 0, 1, 1, 1, 1, 1, 0] * 2 + [0, 0],
        "segment": [1] * 8 + [2] * 8 + [0, 0],
        "position": [*range(8), *range(8), 0, 0],
        "question": [1, 1, 1, 0, 0, 0, 0, 0] * 2 + [0, 0],
    }
    for name, row in expected.items():
        np.testing.assert_array_equal(packed[name][0], row, err_msg=name)


def test_packing_equals_a_packer_that_walks_through_the_words(split):
    rng = np.random.default_rng(1)
    for questions in (1, 3, 5):
        example = rng.integers(-1, 37, 16)
        chosen = np.stack([rng.permutation(5)[:questions] for _ in example])
        packed = pipeline.pack(split, example, chosen, 50)
        for b, number in enumerate(example):
            rows = {name: [] for name in packed}
            for segment, k in enumerate(chosen[b] if number >= 0 else ()):
                question = split.question_tokens[number, k, : split.question_lengths[number, k]].tolist()
                answer = split.answer_tokens[number, k, : split.answer_lengths[number, k]].tolist()
                pair = question + answer
                for t, token in enumerate(pair):
                    following = pair[t + 1] if t + 1 < len(pair) else None
                    rows["text"].append(token)
                    rows["target"].append(following or 0)
                    rows["weight"].append(float(following is not None and t + 1 >= len(question)))
                    rows["segment"].append(segment + 1)
                    rows["position"].append(t)
                    rows["question"].append(t < len(question))
            for name, row in rows.items():
                np.testing.assert_array_equal(packed[name][b], row + [0] * (50 - len(row)), err_msg=name)


def test_a_row_that_exactly_fills_t_is_whole(split):
    needed = pipeline.longest_row(split, 5)
    (batch, _), *_ = _take(split, _spec(37, 5, needed), 1)
    assert (batch.segment > 0).sum(axis=1).max() == needed
    with pytest.raises(UserError, match=rf"text_tokens is {needed - 1}.*set it to {needed}"):
        _take(split, _spec(37, 5, needed - 1), 1)
    with pytest.raises(UserError, match=r"text_tokens is 3, .*fewer questions"):
        pipeline.pack(split, np.array([0]), np.array([[0, 1, 2]]), 3)


def test_every_epoch_is_another_permutation(split):
    order = np.concatenate([b.example for b, _ in _take(split, _spec(), 14)])
    epochs = [order[:37], order[37:74], order[74:111]]
    for epoch in epochs:
        assert sorted(epoch) == list(range(37))
    assert list(epochs[0]) != list(epochs[1]) != list(epochs[2])


def test_questions_are_chosen_evenly_without_repeats_and_by_the_seed(split):
    first, again, other = ([b.text for b, _ in _take(split, _spec(), 3, seed=seed)] for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    split = _split(
        [[("read row one", "0"), ("read row two", "1"), ("read row three", "2"), ("read row four", "3")]] * 8
    )
    asked = (
        np.concatenate([b.text[:, 3::5] for b, _ in _take(split, _spec(8, 2, 12), 100)])[:, :2]
        - tokenizer.encode("0")[0]
    )
    assert (asked[:, 0] != asked[:, 1]).all()
    assert np.ptp(np.bincount(asked.ravel(), minlength=4)) < 0.15 * asked.size / 4


@pytest.mark.parametrize("at", [0, 3, 10])
def test_a_cursor_resumes_after_its_batch(split, at):
    whole = _take(split, _spec(), 14)
    cursor = json.loads(json.dumps(whole[at][1]))
    rest = _take(split, _spec(), 13 - at, cursor=cursor)
    for (a, cursor_a), (b, cursor_b) in zip(whole[at + 1 :], rest, strict=True):
        _equal(a, b)
        assert cursor_a == cursor_b


@pytest.mark.parametrize("rows", [(0, 1, 2, 3), (4, 5, 6, 7), (0, 1, 6, 7)])
def test_a_process_holds_its_rows_of_the_same_batches(split, rows):
    """Which rows are packed changes neither the order of the examples, nor their questions, nor the cursor."""
    whole, part = _take(split, _spec(), 10), _take(split, _spec(), 10, rows=np.array(rows))
    for (batch, cursor), (mine, my_cursor) in zip(whole, part, strict=True):
        assert cursor == my_cursor
        for name in ("example", "text", "weight"):
            np.testing.assert_array_equal(getattr(mine, name), getattr(batch, name)[list(rows)])


def test_the_ids_of_a_step_are_those_of_its_batch(split):
    for step, (batch, _) in enumerate(_take(split, _spec(), 12), 1):
        assert pipeline.drawn_ids(split, _spec(), 5, step) == tuple(split.ids[i] for i in batch.example)


def test_features_belong_to_their_examples(split):
    (batch, _), *_ = _take(split, _spec(), 1)
    np.testing.assert_array_equal(batch.features.tokens[:, 0, 0], batch.example)
    assert batch.image is None


@pytest.mark.parametrize("questions", [6, 0])
def test_a_spec_that_the_split_cannot_serve_is_an_error(split, questions):
    with pytest.raises(UserError, match="stores 5"):
        _take(split, _spec(8, questions), 1)


@pytest.mark.parametrize(("examples", "questions", "rows"), [(0, 2, 74), (10, 5, 50), (16, 1, 16), (1000, 1, 37)])
def test_evaluation_asks_every_pair_once_in_order(split, examples, questions, rows):
    evaluation = EvaluationSpec(examples, questions, 8, 4)
    batches = list(pipeline.evaluation_batches(split, _spec(), evaluation, _features))
    assert all(b.text.shape == (8, split.pair_tokens) for b in batches)
    example = np.concatenate([b.example for b in batches])
    assert (example[:rows] == np.repeat(np.arange(rows // questions), questions)).all()
    assert (example[rows:] == -1).all()
    assert len(example) == -(-rows // 8) * 8
    for batch in batches:
        fills = batch.example < 0
        assert not batch.segment[fills].any()
        assert not batch.weight[fills].any()
        assert (batch.segment[~fills].max(axis=1) == 1).all()
    texts = {(e, *t) for b in batches for e, t in zip(b.example.tolist(), b.text.tolist(), strict=True) if e >= 0}
    assert len(texts) == rows
    for batch, again in zip(batches, pipeline.evaluation_batches(split, _spec(), evaluation, _features), strict=True):
        _equal(batch, again)


def test_evaluation_asks_all_stored_questions_equally_often():
    split = _split([[(f"read row {n}", "0") for n in ("one", "two", "three", "four", "five")]] * 20)
    batches = pipeline.evaluation_batches(split, _spec(), EvaluationSpec(0, 3, 10, 4), _features)
    asked = np.concatenate([b.text[:, 2] for b in batches])
    assert sorted(np.unique(asked, return_counts=True)[1]) == [12] * 5


def test_evaluation_rows_are_shared_out_among_processes(split):
    evaluation = EvaluationSpec(0, 2, 8, 4)
    whole = list(pipeline.evaluation_batches(split, _spec(), evaluation, _features))
    rows = np.array_split(np.arange(8), 2)
    parts = [list(pipeline.evaluation_batches(split, _spec(), evaluation, _features, mine)) for mine in rows]
    for batch, *shares in zip(whole, *parts, strict=True):
        np.testing.assert_array_equal(np.concatenate([share.text for share in shares]), batch.text)
