"""Which conversations share a row: every example once an epoch, nothing beyond a row, whole turns."""

import itertools

import numpy as np
import pytest

from tests.data import mixtures
from vlm_jax.core.errors import UserError
from vlm_jax.data import packing
from vlm_jax.data.packing import RowLayout, Rows
from vlm_jax.data.tokenized import Mixture


def rows_of(
    mixed: Mixture, layout: RowLayout = mixtures.LAYOUT, seed: int = 5, epochs: int = 1, **fields
) -> list[Rows]:
    spec = mixtures.spec(**fields)
    sizes = packing.lengths(mixed, spec, layout)
    return [packing.epoch_rows(mixed, spec, sizes, layout, seed, epoch) for epoch in range(epochs)]


@pytest.fixture(scope="module")
def mixed() -> Mixture:
    return mixtures.mixture(mixtures.dataset(mixtures.random_examples(60, seed=1)))


@pytest.fixture(scope="module")
def sets() -> Mixture:
    """12 examples of 5 questions."""
    return mixtures.mixture(mixtures.dataset(mixtures.question_sets(12, 5), separate=True))


@pytest.mark.parametrize("pack", ["none", "fit"])
def test_an_epoch_draws_every_example_once_in_an_order_of_its_own(mixed: Mixture, pack: str) -> None:
    epochs = rows_of(mixed, pack=pack, epochs=3)
    for rows in epochs:
        assert sorted(rows.conversation.tolist()) == list(range(60))
        assert rows.examples == 60
    orders = {tuple(tuple(sorted(rows[r].tolist())) for r in range(len(rows))) for rows in epochs}
    assert len(orders) == 3
    again, other = rows_of(mixed, pack=pack)[0], rows_of(mixed, pack=pack, seed=6)[0]
    np.testing.assert_array_equal(epochs[0].conversation, again.conversation)
    np.testing.assert_array_equal(epochs[0].bounds, again.bounds)
    assert epochs[0].conversation.tolist() != other.conversation.tolist()


@pytest.mark.parametrize("pack", ["none", "fit"])
def test_weights_are_passes(pack: str) -> None:
    """Two passes, half a pass and one and a half, whose halves are others in each epoch."""
    parts = [mixtures.dataset(mixtures.random_examples(n, seed=n)) for n in (10, 12, 20)]
    mixed = mixtures.mixture(*parts, passes=(2.0, 0.5, 1.5))
    halves = []
    for rows in rows_of(mixed, pack=pack, epochs=4):
        counts = np.bincount(rows.conversation, minlength=42)
        assert (counts[:10] == 2).all()
        assert sorted(counts[10:22]) == [0] * 6 + [1] * 6
        assert sorted(counts[22:]) == [1] * 10 + [2] * 10
        assert rows.examples == 20 + 6 + 30
        halves.append(tuple(counts[10:22]))
    assert len(set(halves)) > 1


@pytest.mark.parametrize("reads_question", [False, True])
@pytest.mark.parametrize("visual_tokens", [0, 1, 4])
def test_no_row_exceeds_its_positions_or_its_views(visual_tokens: int, reads_question: bool) -> None:
    mixed = mixtures.mixture(
        mixtures.dataset(mixtures.random_examples(60, seed=1)),
        mixtures.dataset(mixtures.question_sets(12, 5, images=2), separate=True),
    )
    layout = RowLayout(visual_tokens, reads_question=reads_question)
    batches = mixtures.batches(mixed, layout, row_tokens=40, row_images=3, batch_rows=1)
    for step in range(len(batches.epoch(0))):  # `pack` raises for a row that is too long
        inputs = batches[step]
        if visual_tokens:
            assert inputs.visual.max() < 3 * visual_tokens
            assert inputs.views.pixels.shape[:2] == (1, 3)


@pytest.mark.parametrize("pack", ["fit", "none"])
def test_rows_have_padding_for_what_absent_views_lose_inside_the_decoder(pack: str) -> None:
    """A stage of the decoder shortens every row by three tokens for each of its four views."""
    mixed = mixtures.mixture(mixtures.dataset(mixtures.random_examples(60, seed=1)))
    batches = mixtures.batches(mixed, RowLayout(5, leaving=3), row_tokens=34, row_images=4, batch_rows=1, pack=pack)
    assert batches.sizes.cut > 0
    full = 0
    for step in range(len(batches.epoch(0))):
        inputs = batches[step]
        absent = 4 - len(set((inputs.visual[inputs.visual >= 0] // 5).tolist()))
        padding = int((inputs.segment == 0).sum())
        assert padding >= 3 * absent
        full += padding == 3 * absent
    assert full > 0


def test_each_question_has_its_own_view_where_tokens_leave_inside_the_decoder() -> None:
    mixed = mixtures.mixture(mixtures.dataset(mixtures.question_sets(12, 2), separate=True))
    for inputs in map(mixtures.batches(mixed, RowLayout(2, leaving=1), row_tokens=40).__getitem__, range(3)):
        for row in range(4):
            views = inputs.visual[row, inputs.visual[row] >= 0] // 2
            assert len(set(views.tolist())) == inputs.segment[row].max() == len(views) / 2


def test_questions_about_an_image_stay_in_one_row_where_they_fit(sets: Mixture) -> None:
    (rows,) = rows_of(sets, row_tokens=80)
    item = sets.parts[0].item
    groups = [set(item[rows[r]].tolist()) for r in range(len(rows))]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 12
    (split,) = rows_of(sets, row_tokens=20)  # five questions exceed a row
    assert sorted(split.conversation.tolist()) == list(range(60))


@pytest.mark.parametrize("pack", ["none", "fit"])
def test_questions_are_drawn_without_repeats_and_evenly(sets: Mixture, pack: str) -> None:
    counts = np.zeros(60, int)
    for rows in rows_of(sets, pack=pack, questions_per_example=2, epochs=100):
        drawn = np.bincount(rows.conversation, minlength=60)
        assert drawn.max() == 1
        assert (drawn.reshape(12, 5).sum(axis=1) == 2).all()
        counts += drawn
    assert counts.sum() == 12 * 2 * 100
    # Each is binomial with mean 40 and deviation 4.9.
    assert 20 <= counts.min() <= counts.max() <= 60
    first = np.array([rows[0][0] % 5 for rows in rows_of(sets, pack="none", questions_per_example=1, epochs=200)])
    assert np.bincount(first, minlength=5).min() > 20


def test_a_long_conversation_is_cut_after_the_last_turn_that_fits() -> None:
    """Against all prefixes of whole turns, counted one by one."""
    items = mixtures.random_examples(80, seed=2, turns=5)
    mixed = mixtures.mixture(mixtures.dataset(items))
    for visual, limit in itertools.product((0, 1, 4), (12, 20, 40)):
        sizes = packing.lengths(mixed, mixtures.spec(row_tokens=limit), RowLayout(visual))
        cut = dropped = 0
        for number, item in enumerate(items):
            prefixes, tokens, ids = [(0, 0)], 0, 0
            for question, answer in zip(item.turns[::2], item.turns[1::2], strict=True):
                turn = [*mixtures.words(question.text), *mixtures.words(answer.text), mixtures.END]
                tokens += sum(visual if word < 0 else 1 for word in turn)
                ids += len(turn)
                if tokens <= limit:
                    prefixes.append((ids, tokens))
            assert (sizes.ids[number], sizes.tokens[number] * (sizes.ids[number] > 0)) == prefixes[-1]
            cut += 0 < prefixes[-1][0] < ids
            dropped += prefixes[-1][0] == 0
        assert (sizes.cut, sizes.dropped) == (cut, dropped)
        whole = packing.lengths(mixed, mixtures.spec(row_tokens=limit, long="drop"), RowLayout(visual))
        assert (whole.cut, whole.dropped) == (0, cut + dropped)
        assert (whole.ids > 0).sum() == 80 - cut - dropped


def test_dropped_conversations_are_never_drawn(mixed: Mixture) -> None:
    spec = mixtures.spec(row_tokens=20, long="drop")
    kept = np.flatnonzero(packing.lengths(mixed, spec, mixtures.LAYOUT).ids)
    assert 0 < len(kept) < 60
    for pack in ("none", "fit"):
        (rows,) = rows_of(mixed, row_tokens=20, long="drop", pack=pack)
        assert sorted(rows.conversation.tolist()) == kept.tolist()


def test_a_conversation_with_more_images_than_a_row_is_dropped() -> None:
    items = [mixtures.example("a", "<image> <image> 5 | 6", [mixtures.png(0)] * 2), mixtures.example("b", "5 | 6")]
    mixed = mixtures.mixture(mixtures.dataset(items))
    sizes = packing.lengths(mixed, mixtures.spec(row_images=1), mixtures.LAYOUT)
    assert (sizes.ids.tolist(), sizes.cut, sizes.dropped) == ([0, 3], 0, 1)
    blind = packing.lengths(mixed, mixtures.spec(row_images=1), RowLayout(0))
    assert blind.tokens.tolist() == [3, 3]
    only = mixtures.mixture(mixtures.dataset(items[:1]))
    with pytest.raises(UserError, match=r"^data.row_images: expected at least 2, the images of .*, got 1"):
        packing.lengths(only, mixtures.spec(row_images=1), mixtures.LAYOUT)


@pytest.mark.parametrize("long", ["cut", "drop"])
def test_a_row_that_holds_nothing_is_an_error(mixed: Mixture, long: str) -> None:
    with pytest.raises(
        UserError, match=r"^data.row_tokens: expected room for a conversation of part0.*got 2"
    ) as caught:
        packing.lengths(mixed, mixtures.spec(row_tokens=2, long=long), mixtures.LAYOUT)
    assert "\n" not in str(caught.value)


def test_questions_that_do_not_fit_into_a_row_together_are_an_error_before_training(sets: Mixture) -> None:
    """With `pack="none"`, a row holds all questions of its example."""
    with pytest.raises(UserError, match=r"^data.row_tokens: expected at least \d+ .*got 30"):
        mixtures.batches(sets, pack="none", row_tokens=30)
    tokens = packing.lengths(sets, mixtures.spec(), mixtures.LAYOUT).tokens
    needed = int(tokens.reshape(12, 5).sum(axis=1).max())
    mixtures.batches(sets, pack="none", row_tokens=needed)
    with pytest.raises(UserError, match=rf"^data.row_tokens: expected at least {needed} "):
        mixtures.batches(sets, pack="none", row_tokens=needed - 1)
    most = int(np.sort(tokens.reshape(12, 5))[:, -3:].sum(axis=1).max())
    mixtures.batches(sets, pack="none", row_tokens=most, questions_per_example=3)
    shared = RowLayout(4, shares_image=True)  # four copies fewer
    mixtures.batches(sets, shared, pack="none", row_tokens=needed - 4 * 4)
    with pytest.raises(UserError, match=rf"^data.row_tokens: expected at least {needed - 16} "):
        mixtures.batches(sets, shared, pack="none", row_tokens=needed - 4 * 4 - 1)


def test_a_part_too_small_for_its_weight_is_an_error() -> None:
    """Half a pass over the one conversation that fits rounds to none: an epoch without rows would never end."""
    long = mixtures.example("long", f"<image> {'5 ' * 80} | 6", [mixtures.png(0)])
    part = mixtures.dataset([mixtures.example("a", "5 | 6"), *[long] * 9])
    with pytest.raises(UserError, match="expected at least one example in an epoch"):
        mixtures.batches(mixtures.mixture(part, passes=(0.2,)))[0]


def test_a_view_for_each_question_needs_room_in_the_row(sets: Mixture) -> None:
    layout = RowLayout(4, reads_question=True)
    with pytest.raises(UserError, match=r"^data.row_images: expected at least 5, .*, got 4"):
        mixtures.batches(sets, layout, pack="none", row_tokens=200)
    inputs = mixtures.batches(sets, layout, pack="none", row_tokens=200, row_images=1, questions_per_example=3)[0]
    assert inputs.views.pixels.shape[:2] == (4, 3)
