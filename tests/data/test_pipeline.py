"""Batches: the drawing of `core.structs.Inputs`, a second packer, and Grain's promises."""

import itertools
import json

import jax
import numpy as np
import pytest
from vlm_jax.data.sources import Split

from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import DataSpec, EvaluationSpec
from vlm_jax.core.structs import Visual
from vlm_jax.data import glyph_tokenizer, pipeline


def _split(examples):
    """A split from [[(question, answer), ...], ...]."""
    shape = len(examples), len(examples[0])
    pairs = [pair for example in examples for pair in example]
    questions, asked = glyph_tokenizer.encode_table([q for q, _ in pairs])
    answers, replied = glyph_tokenizer.encode_table([a for _, a in pairs], end=(glyph_tokenizer.END_ID,))
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
        np.where(np.arange(questions.shape[1]) < asked[:, None], questions, -1).reshape(*shape, -1),
    )


@pytest.fixture(scope="module")
def split():
    """37 examples with 5 questions each, of uneven lengths."""
    rng = np.random.default_rng(0)
    words = glyph_tokenizer.vocabulary.WORDS[2:]
    text = lambda most: " ".join(rng.choice(words, rng.integers(1, most + 1)))  # noqa: E731
    return _split([[(text(5), text(4)) for _ in range(5)] for _ in range(37)])


def _spec(batch_examples=8, questions=3, text_tokens=40):
    return DataSpec("made", "up", "train", "test", batch_examples, questions, text_tokens, True)


def _features(indices):
    return Visual(np.stack([indices] * 2, axis=1).astype(np.float32)[:, :, None])


LAYOUT = pipeline.RowLayout(2)


def _take(split, spec, count, **options):
    options = {"seed": 5, "layout": LAYOUT, "features": _features, **options}
    return list(itertools.islice(pipeline.train_batches(split, spec, **options), count))


def _equal(a, b):
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(left, right)


def _examples(inputs):
    """The examples of a batch, from their features."""
    return inputs.views.features.tokens[:, 0, 0, 0].astype(int)


def test_the_drawn_example():
    split = _split([[("read row one", "3 3 8 0"), ("read row two", "4 7 1 9")]])
    packed = pipeline.pack(split, np.array([0]), np.array([[1, 0]]), LAYOUT, 18)
    words = lambda text: [0 if w in "I." else glyph_tokenizer.vocabulary.WORDS.index(w) for w in text.split()]  # noqa: E731
    end = glyph_tokenizer.vocabulary.END
    expected = {
        "tokens": words(f"I I read row two 4 7 1 9 {end} I I read row one 3 3 8 0 {end} . ."),
        "weight": [0, 0, 0, 0, 1, 1, 1, 1, 1, 0] * 2 + [0, 0],
        "segment": [1] * 10 + [2] * 10 + [0, 0],
        "position": [*range(10), *range(10), 0, 0],
        "order": [*range(10), *range(10), 0, 0],
        "visual": ([0, 1] + [-1] * 8) * 2 + [-1, -1],
    }
    for name, row in expected.items():
        np.testing.assert_array_equal(getattr(packed, name)[0], row, err_msg=name)
    prefix = pipeline.pack(split, np.array([0]), np.array([[1, 0]]), LAYOUT._replace(mask="prefix"), 18)
    np.testing.assert_array_equal(prefix.order[0], ([0] * 5 + [5, 6, 7, 8, 9]) * 2 + [0, 0])
    once = pipeline.pack(split, np.array([0]), np.array([[1, 0]]), LAYOUT._replace(shares_image=True), 18)
    expected = {
        "tokens": words(f"I I read row two 4 7 1 9 {end} read row one 3 3 8 0 {end} . ."),
        "weight": [0, 0, *[0, 0, 1, 1, 1, 1, 1, 0] * 2, 0, 0],
        "segment": [-1] * 2 + [1] * 8 + [2] * 8 + [0, 0],
        "position": [0, 1, *range(2, 10), *range(2, 10), 0, 0],
        "visual": [0, 1] + [-1] * 18,
    }
    for name, row in expected.items():
        np.testing.assert_array_equal(getattr(once, name)[0], row, err_msg=name)
    assert not pipeline.pack(
        split, np.array([-1]), np.array([[1, 0]]), LAYOUT._replace(shares_image=True), 18
    ).segment.any()
    own = pipeline.pack(split, np.array([0]), np.array([[1, 0]]), LAYOUT._replace(reads_question=True), 18)
    np.testing.assert_array_equal(own.visual[0], [0, 1, *[-1] * 8, 2, 3, *[-1] * 8, -1, -1])


@pytest.mark.parametrize("visual_tokens", [0, 1, 3])
def test_packing_equals_a_packer_that_walks_through_the_words(split, visual_tokens):
    rng = np.random.default_rng(1)
    for questions in (1, 3, 5):
        example = rng.integers(-1, 37, 16)
        chosen = np.stack([rng.permutation(5)[:questions] for _ in example])
        packed = pipeline.pack(split, example, chosen, pipeline.RowLayout(visual_tokens), 50)
        for b, number in enumerate(example):
            rows = {name: [] for name in ("tokens", "weight", "segment", "position", "visual")}
            for segment, k in enumerate(chosen[b] if number >= 0 else ()):
                question = split.question_tokens[number, k, : split.question_lengths[number, k]].tolist()
                answer = split.answer_tokens[number, k, : split.answer_lengths[number, k]].tolist()
                whole = [None] * visual_tokens + question + answer
                for t, token in enumerate(whole):
                    rows["tokens"].append(token or 0)
                    rows["weight"].append(float(visual_tokens + len(question) - 1 <= t < len(whole) - 1))
                    rows["segment"].append(segment + 1)
                    rows["position"].append(t)
                    rows["visual"].append(t if token is None else -1)
            for name, row in rows.items():
                fill = [-1 if name == "visual" else 0] * (50 + questions * visual_tokens - len(row))
                np.testing.assert_array_equal(getattr(packed, name)[b], row + fill, err_msg=name)


def test_each_question_has_a_view_of_its_own_where_it_is_read(split):
    """The question of a view is that of the segment whose placeholders name it."""
    layout = LAYOUT._replace(reads_question=True)
    (inputs, _), *_ = _take(split, _spec(), 1, layout=layout)
    assert inputs.views.question.shape[:2] == (8, 3)
    for row in range(8):
        for segment in (1, 2, 3):
            mine = (inputs.segment[row] == segment) & (inputs.visual[row] < 0)
            view = inputs.visual[row, (inputs.segment[row] == segment) & (inputs.visual[row] >= 0)] // 2
            (number,) = set(view.tolist())
            question = [t for t in inputs.views.question[row, number].tolist() if t >= 0]
            assert inputs.tokens[row, mine].tolist()[: len(question)] == question
            assert inputs.weight[row, mine].tolist()[: len(question)] == [0.0] * (len(question) - 1) + [1.0]


def test_blind_rows_carry_no_images(split):
    (inputs, _), *_ = _take(split, _spec(), 1, layout=pipeline.RowLayout(0))
    assert inputs.views is None
    assert (inputs.visual == -1).all()


def test_a_row_that_exactly_fills_t_is_whole(split):
    needed = pipeline.longest_row(split, 5)
    (batch, _), *_ = _take(split, _spec(37, 5, needed), 1)
    assert ((batch.segment > 0) & (batch.visual < 0)).sum(axis=1).max() == needed
    with pytest.raises(UserError, match=rf"text_tokens: expected at least {needed}.*got {needed - 1}: set it"):
        _take(split, _spec(37, 5, needed - 1), 1)
    with pytest.raises(UserError, match=r"text_tokens: .*got 3: .*fewer questions"):
        pipeline.pack(split, np.array([0]), np.array([[0, 1, 2]]), LAYOUT, 3)


def test_every_epoch_is_another_permutation(split):
    order = np.concatenate([_examples(b) for b, _ in _take(split, _spec(), 14)])
    epochs = [order[:37], order[37:74], order[74:111]]
    for epoch in epochs:
        assert sorted(epoch) == list(range(37))
    assert list(epochs[0]) != list(epochs[1]) != list(epochs[2])


def test_questions_are_chosen_evenly_without_repeats_and_by_the_seed(split):
    first, again, other = ([b.tokens for b, _ in _take(split, _spec(), 3, seed=seed)] for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    split = _split(
        [[("read row one", "0"), ("read row two", "1"), ("read row three", "2"), ("read row four", "3")]] * 8
    )
    asked = (
        np.concatenate([b.tokens[:, 5::7] for b, _ in _take(split, _spec(8, 2, 12), 100)])[:, :2]
        - glyph_tokenizer.encode("0")[0]
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
        _equal(mine, jax.tree.map(lambda leaf: leaf[list(rows)], batch))


def test_the_ids_of_a_step_are_those_of_its_batch(split):
    for step, (batch, _) in enumerate(_take(split, _spec(), 12), 1):
        assert pipeline.drawn_ids(split, _spec(), 5, step) == tuple(split.ids[i] for i in _examples(batch))


@pytest.mark.parametrize("questions", [6, 0])
def test_a_spec_that_the_split_cannot_serve_is_an_error(split, questions):
    with pytest.raises(UserError, match="expected 1 to 5"):
        _take(split, _spec(8, questions), 1)


def _evaluation(split, evaluation, **options):
    return list(pipeline.evaluation_batches(split, evaluation, LAYOUT, _features, **options))


@pytest.mark.parametrize(("examples", "questions", "rows"), [(0, 2, 74), (10, 5, 50), (16, 1, 16), (1000, 1, 37)])
def test_evaluation_asks_every_pair_once_in_order(split, examples, questions, rows):
    evaluation = EvaluationSpec(examples, questions, 8, 4)
    batches = _evaluation(split, evaluation)
    assert all(b.inputs.tokens.shape == (8, 2 + split.question_lengths.max()) for b in batches)
    example = np.concatenate([b.example for b in batches])
    assert (example[:rows] == np.repeat(np.arange(rows // questions), questions)).all()
    assert (example[rows:] == -1).all()
    assert len(example) == -(-rows // 8) * 8
    asked = set()
    for batch in batches:
        filler = batch.example < 0
        assert not batch.inputs.segment[filler].any()
        assert (batch.answer[filler] == -1).all()
        assert (batch.inputs.segment[~filler].max(axis=1) == 1).all()
        np.testing.assert_array_equal(_examples(batch.inputs), np.maximum(batch.example, 0))
        for row in np.flatnonzero(~filler):
            number, text = batch.example[row], batch.inputs.tokens[row][batch.inputs.visual[row] < 0]
            (k,) = (
                k
                for k in range(5)
                if text[: split.question_lengths[number, k]].tolist()
                == split.question_tokens[number, k, : split.question_lengths[number, k]].tolist()
                and not text[split.question_lengths[number, k] :].any()
            )
            answer = split.answer_tokens[number, k, : split.answer_lengths[number, k]]
            assert [t for t in batch.answer[row].tolist() if t >= 0] == answer.tolist()
            asked.add((number, k))
    assert len(asked) == rows
    for batch, again in zip(batches, _evaluation(split, evaluation), strict=True):
        _equal(batch, again)


def test_a_subset_is_the_first_images(split):
    evaluation = EvaluationSpec(0, 2, 8, 4)
    whole, subset = _evaluation(split, evaluation), _evaluation(split, evaluation, examples=4)
    assert len(subset) == 1
    _equal(subset[0], whole[0])


def test_evaluation_asks_all_stored_questions_equally_often():
    split = _split([[(f"read row {n}", "0") for n in ("one", "two", "three", "four", "five")]] * 20)
    batches = _evaluation(split, EvaluationSpec(0, 3, 10, 4))
    asked = np.concatenate([b.inputs.tokens[:, 4] for b in batches])
    assert sorted(np.unique(asked, return_counts=True)[1]) == [12] * 5


def test_evaluation_rows_are_shared_out_among_processes(split):
    evaluation = EvaluationSpec(0, 2, 8, 4)
    rows = np.array_split(np.arange(8), 2)
    parts = [_evaluation(split, evaluation, rows=mine) for mine in rows]
    for batch, *shares in zip(_evaluation(split, evaluation), *parts, strict=True):
        joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *shares)
        _equal(joined, batch)
