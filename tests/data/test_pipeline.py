"""Batches: a function of the step, for any number of processes; questions of an evaluation."""

import itertools

import jax
import numpy as np
import pytest

from tests.data import mixtures
from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import EvaluationSpec
from vlm_jax.data import packing, pipeline
from vlm_jax.data.packing import RowLayout
from vlm_jax.data.tokenized import Mixture


@pytest.fixture(scope="module")
def mixed() -> Mixture:
    """Conversations of several turns, and examples of five questions; twice as many passes over the second."""
    return mixtures.mixture(
        mixtures.dataset(mixtures.random_examples(20, seed=1)),
        mixtures.dataset(mixtures.question_sets(7, 5, seed=2), separate=True),
        passes=(1.0, 2.0),
    )


def equal(a, b) -> None:
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("pack", ["none", "fit"])
def test_epochs_follow_each_other_without_a_gap(mixed: Mixture, pack: str) -> None:
    """The batches' rows are those of epoch 0, 1, 2, ... in order, whatever the step that is asked first."""
    batches = mixtures.batches(mixed, pack=pack, batch_rows=8)
    rows = [batches.epoch(epoch)[r].tolist() for epoch in range(4) for r in range(len(batches.epoch(epoch)))]
    for step in (5, 0, 1, 2, 3, 4):
        found = [list(plan.conversation) for plan in mixtures.batches(mixed, pack=pack, batch_rows=8).rows(step)]
        assert found == rows[8 * step : 8 * step + 8]
        assert found == [list(plan.conversation) for plan in batches.rows(step)]


def test_a_batch_may_be_longer_than_an_epoch(mixed: Mixture) -> None:
    batches = mixtures.batches(mixed, batch_rows=64)
    drawn = np.bincount([n for plan in batches.rows(0) for n in plan.conversation], minlength=len(mixed))
    rows = len(batches.epoch(0))
    assert rows < 64
    assert drawn.min() >= 64 // rows


@pytest.mark.parametrize("first", [0, 3, 10])
def test_batches_resume_at_any_step(mixed: Mixture, first: int) -> None:
    """Of a fresh pipeline, across the ends of epochs."""
    whole = list(pipeline.train_batches(mixtures.batches(mixed), 0, 14))
    assert len(mixtures.batches(mixed).epoch(0)) < 14 * 4
    rest = list(pipeline.train_batches(mixtures.batches(mixed), first, 14))
    assert len(rest) == 14 - first
    for a, b in zip(whole[first:], rest, strict=True):
        equal(a, b)


@pytest.mark.parametrize("slots", [(0, 1, 2, 3), (4, 5, 6, 7), (0, 1, 6, 7), (5,)])
def test_a_process_makes_its_rows_of_the_same_batches(mixed: Mixture, slots: tuple[int, ...]) -> None:
    whole = mixtures.batches(mixed, RowLayout(4, reads_question=True), batch_rows=8)
    mine = mixtures.batches(mixed, RowLayout(4, reads_question=True), slots=np.array(slots), batch_rows=8)
    for step in range(6):
        equal(mine[step], jax.tree.map(lambda leaf: leaf[list(slots)], whole[step]))
        assert mine.ids(step) == whole.ids(step)


def test_the_ids_of_a_step_are_those_of_its_conversations(mixed: Mixture) -> None:
    batches = mixtures.batches(mixed)
    for step in range(8):
        expected = [
            mixed.parts[part].source[int(mixed.parts[part].item[index])].id
            for plan in batches.rows(step)
            for part, index in map(mixed.locate, plan.conversation)
        ]
        assert batches.ids(step) == tuple(dict.fromkeys(expected))


def test_the_seed_decides(mixed: Mixture) -> None:
    equal(mixtures.batches(mixed)[3], mixtures.batches(mixed)[3])
    assert not np.array_equal(mixtures.batches(mixed)[3].tokens, mixtures.batches(mixed, seed=6)[3].tokens)


def test_blind_rows_have_no_views(mixed: Mixture) -> None:
    inputs = mixtures.batches(mixed, RowLayout(0))[0]
    assert inputs.views is None
    assert (inputs.visual == -1).all()


def test_every_position_has_its_source(mixed: Mixture) -> None:
    """Counted by hand from the rows' plans."""
    batches = mixtures.batches(mixed)
    inputs = batches[0]
    for row, plan in enumerate(batches.rows(0)):
        for segment, number in enumerate(plan.conversation, start=1):
            assert set(inputs.part[row, inputs.segment[row] == segment].tolist()) == {int(number >= 20)}


# Evaluation: 37 examples with 5 questions each.


@pytest.fixture(scope="module")
def sets() -> Mixture:
    return mixtures.mixture(mixtures.dataset(mixtures.question_sets(37, 5, seed=3), separate=True))


def evaluation_of(mixed: Mixture, evaluation: EvaluationSpec, layout: RowLayout = mixtures.LAYOUT, **options):
    data = mixtures.data(mixed, layout, **options.pop("fields", {}))
    return list(pipeline.evaluation_batches(data, evaluation, **options))


@pytest.mark.parametrize(("examples", "questions", "rows"), [(0, 2, 74), (10, 5, 50), (16, 1, 16), (1000, 1, 37)])
def test_evaluation_asks_every_pair_once_in_order(sets: Mixture, examples: int, questions: int, rows: int) -> None:
    evaluation = EvaluationSpec(examples, questions, 8, 4)
    batches = evaluation_of(sets, evaluation)
    longest = max(int(np.flatnonzero(sets.parts[0].conversation(i)[1])[0]) for i in range(len(sets)))
    assert all(b.inputs.tokens.shape[0] == 8 and b.inputs.tokens.shape[1] <= 3 + longest for b in batches)
    example = np.concatenate([b.example for b in batches])
    np.testing.assert_array_equal(example[:rows], np.repeat(np.arange(rows // questions), questions))
    assert (example[rows:] == -1).all()
    assert len(example) == -(-rows // 8) * 8
    asked = set()
    for batch in batches:
        filler = batch.example < 0
        assert not batch.inputs.segment[filler].any()
        assert (batch.answer[filler] == -1).all()
        for row in np.flatnonzero(~filler):
            number, shown = int(batch.example[row]), batch.inputs.segment[row] == 1
            text = batch.inputs.tokens[row][shown & (batch.inputs.visual[row] < 0)].tolist()
            answer = [t for t in batch.answer[row].tolist() if t >= 0]
            turns = sets.parts[0].source[number].turns
            question = answer[0] - 2  # as `question_sets` numbers its answers
            assert text == mixtures.words(turns[2 * question].text.removeprefix("<image>"))
            assert answer == [*mixtures.words(turns[2 * question + 1].text), mixtures.END]
            asked.add((number, question))
    assert len(asked) == rows
    for batch, again in zip(batches, evaluation_of(sets, evaluation), strict=True):
        equal(batch, again)


def test_a_subset_is_the_first_examples(sets: Mixture) -> None:
    evaluation = EvaluationSpec(0, 2, 8, 4)
    data = mixtures.data(sets)
    whole, subset = (pipeline.evaluation_pairs(data, evaluation, examples) for examples in (None, 4))
    np.testing.assert_array_equal(subset, whole[:8])
    (batch,) = evaluation_of(sets, evaluation, examples=4)
    assert batch.example.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_evaluation_asks_all_questions_equally_often() -> None:
    mixed = mixtures.mixture(mixtures.dataset(mixtures.question_sets(20, 5), separate=True))
    pairs = pipeline.evaluation_pairs(mixtures.data(mixed), EvaluationSpec(0, 3, 10, 4))
    assert np.bincount(pairs[:, 1] % 5).tolist() == [12] * 5
    for example, number in pairs.tolist():
        assert number // 5 == example
    assert pairs[:6, 1].tolist() == [0, 1, 2, 8, 9, 5]  # i q, i q + 1, ... modulo 5


def test_a_batch_is_as_long_as_its_own_questions() -> None:
    """One question of 200 words among short ones lengthens its batch alone; the others are padded to a bucket."""
    items = [mixtures.example(str(n), f"{'5 ' * (200 if n == 7 else 2 + n % 3)}| 6") for n in range(24)]
    mixed, fields = mixtures.mixture(mixtures.dataset(items)), {"row_tokens": 300}
    batches = evaluation_of(mixed, EvaluationSpec(0, 1, 4, 4), fields=fields)
    lengths = [batch.inputs.tokens.shape[1] for batch in batches]
    assert lengths[1] == 200
    assert {*lengths[:1], *lengths[2:]} == {20}  # 16 and the four visual tokens of an absent image


def test_evaluation_rows_are_divided_among_processes(sets: Mixture) -> None:
    evaluation = EvaluationSpec(0, 2, 8, 4)
    parts = [evaluation_of(sets, evaluation, slots=mine) for mine in np.array_split(np.arange(8), 2)]
    for batch, *shares in zip(evaluation_of(sets, evaluation), *parts, strict=True):
        equal(jax.tree.map(lambda *leaves: np.concatenate(leaves), *shares), batch)


def test_a_conversation_is_asked_up_to_its_last_answer() -> None:
    """Earlier answers are part of the question."""
    items = [
        mixtures.example("a", "<image> 5 | 6 7 | 8 | 9", [mixtures.png(0)]),
        mixtures.example("b", "10 | 11 12 13"),
    ]
    mixed = mixtures.mixture(mixtures.dataset(items))
    (batch,) = evaluation_of(mixed, EvaluationSpec(0, 1, 2, 4))
    assert batch.inputs.tokens.tolist() == [[0, 0, 0, 0, 5, 6, 7, 1, 8], [10, *[0] * 8]]
    assert batch.inputs.segment.tolist() == [[1] * 9, [1] + [0] * 8]
    assert batch.answer.tolist() == [[9, 1, -1, -1], [11, 12, 13, 1]]
    assert batch.inputs.weight is None


def test_conversations_that_do_not_fit_whole_are_not_asked() -> None:
    items = mixtures.random_examples(30, seed=4, turns=5)
    mixed = mixtures.mixture(mixtures.dataset(items))
    tokens = packing.lengths(mixed, mixtures.spec(row_tokens=500), mixtures.LAYOUT).tokens
    limit = int(np.median(tokens))
    pairs = pipeline.evaluation_pairs(mixtures.data(mixed, row_tokens=limit), EvaluationSpec(0, 2, 8, 4))
    assert pairs[:, 1].tolist() == np.flatnonzero(tokens <= limit).tolist()
    assert pairs[:, 0].tolist() == list(range(len(pairs)))
    with pytest.raises(UserError, match=r"^data.row_tokens: expected room"):
        pipeline.evaluation_pairs(
            mixtures.data(mixed, row_tokens=int(tokens.min()) - 1, long="drop"), EvaluationSpec(0, 2, 8, 4)
        )


def test_examples_of_two_sources_with_equal_numbers_are_two() -> None:
    """The last usable item of one source and the first of the next have the same index."""
    bad = mixtures.BadItem("malformed", "x")
    parts = [
        [mixtures.example("a", "5 | 6")],
        [mixtures.example("b", "7 | 8"), bad],
        [bad, mixtures.example("c", "9 | 10")],
    ]
    mixed = mixtures.mixture(*(mixtures.dataset(part) for part in parts))
    pairs = pipeline.evaluation_pairs(mixtures.data(mixed, max_bad_share=0.5), EvaluationSpec(0, 1, 2, 4))
    assert pairs.tolist() == [[0, 0], [1, 1], [2, 2]]


def test_threads_that_ask_for_old_epochs_get_the_same_rows(mixed: Mixture) -> None:
    """Only two epochs are kept; one that is gone is made again."""
    batches = mixtures.batches(mixed)
    first = [plan.conversation for plan in batches.rows(0)]
    batches.rows(100)
    assert [plan.conversation for plan in batches.rows(0)] == first


def test_grain_ends_with_the_steps(mixed: Mixture) -> None:
    assert list(itertools.islice(pipeline.train_batches(mixtures.batches(mixed), 3, 3), 2)) == []
