"""The arrays of a row: the drawing of `core.structs.Inputs`, and a second packer that walks through the ids."""

import numpy as np
import pytest

from tests.data import mixtures
from vlm_jax.core.errors import UserError
from vlm_jax.data import rows
from vlm_jax.data.conversations import IMAGE
from vlm_jax.data.packing import RowLayout
from vlm_jax.data.rows import RowPlan
from vlm_jax.data.tokenized import Mixture

TWO = RowLayout(2)
READ, ROW, TWO_, WHO, IS, IT, ADA = range(20, 27)  # words


@pytest.fixture(scope="module")
def drawn() -> Mixture:
    """Two questions about one image, each a conversation of its own."""
    text = f"<image> {READ} {ROW} {TWO_} | 4 7 | <image> {WHO} {IS} {IT} | {ADA}"
    return mixtures.mixture(mixtures.dataset([mixtures.example("a", text, [mixtures.png(0)])], separate=True))


def check(inputs, expected: dict[str, list]) -> None:
    for name, row in expected.items():
        np.testing.assert_array_equal(getattr(inputs, name)[0], row, err_msg=name)


def test_the_drawn_row(drawn: Mixture) -> None:
    """A copy of the image's tokens for each question: two segments that name the same view."""
    inputs, views = rows.pack(drawn, [RowPlan((0, 1), (7, 6))], TWO, 17)
    expected = {
        "tokens": [0, 0, READ, ROW, TWO_, 4, 7, 1, 0, 0, WHO, IS, IT, ADA, 1, 0, 0],
        "segment": [1] * 8 + [2] * 7 + [0] * 2,
        "position": [*range(8), *range(7), 0, 0],
        "order": [*range(8), *range(7), 0, 0],
        "visual": [0, 1, *[-1] * 6, 0, 1, *[-1] * 5, -1, -1],
        "weight": [0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0],
    }
    check(inputs, expected)
    assert inputs.part is None
    assert [(v.row, v.view, v.part, v.image) for v in views] == [(0, 0, 0, 0)]
    prefix, _ = rows.pack(drawn, [RowPlan((0, 1), (7, 6))], RowLayout(2, "prefix"), 17)
    check(prefix, expected | {"order": [*[0] * 5, 5, 6, 7, *[0] * 5, 5, 6, 0, 0]})


def test_a_view_for_each_question_that_is_read(drawn: Mixture) -> None:
    inputs, views = rows.pack(drawn, [RowPlan((0, 1), (7, 6))], RowLayout(2, reads_question=True), 17)
    check(inputs, {"visual": [0, 1, *[-1] * 6, 2, 3, *[-1] * 5, -1, -1]})
    assert [(v.view, v.image, v.conversation) for v in views] == [(0, 0, 0), (1, 0, 1)]


def test_a_shared_image_is_in_front_of_all_questions(drawn: Mixture) -> None:
    inputs, views = rows.pack(drawn, [RowPlan((0, 1), (7, 6))], RowLayout(2, shares_image=True), 15)
    expected = {
        "tokens": [0, 0, READ, ROW, TWO_, 4, 7, 1, WHO, IS, IT, ADA, 1, 0, 0],
        "segment": [-1] * 2 + [1] * 6 + [2] * 5 + [0] * 2,
        "position": [0, 1, *range(2, 8), *range(2, 7), 0, 0],
        "visual": [0, 1, *[-1] * 13],
        "weight": [0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0],
    }
    check(inputs, expected)
    assert len(views) == 1
    one, _ = rows.pack(drawn, [RowPlan((0,), (7,))], RowLayout(2, shares_image=True), 8)
    check(one, {"segment": [1] * 8})  # one question shares with no other


def test_evaluation_rows_have_no_weights_and_blind_rows_no_views(drawn: Mixture) -> None:
    inputs, views = rows.pack(drawn, [RowPlan((0,), (4,)), RowPlan((), ())], RowLayout(0), 5, learn=False)
    assert inputs.weight is None
    assert inputs.tokens.tolist() == [[READ, ROW, TWO_, 0, 0], [0] * 5]
    assert (inputs.visual == -1).all()
    assert views == []


def test_a_row_without_room_is_an_error(drawn: Mixture) -> None:
    with pytest.raises(UserError, match=r"^data.row_tokens: expected at least 15 for these rows, got 14"):
        rows.pack(drawn, [RowPlan((0, 1), (7, 6))], TWO, 14)


def walk(mixed: Mixture, plans: list[RowPlan], layout: RowLayout, length: int) -> dict[str, list[list]]:
    """The same rows, one position at a time."""
    out = {name: [] for name in ("tokens", "segment", "position", "order", "visual", "weight", "part")}
    for plan in plans:
        row = {name: [] for name in out}
        first_view, views = {}, 0
        for segment, (number, used) in enumerate(zip(plan.conversation, plan.ids, strict=True), start=1):
            part = max(p for p, start in enumerate(mixed.starts) if start <= number)
            dataset, index = mixed.parts[part], number - mixed.starts[part]
            ids, target = (a.tolist() for a in dataset.conversation(index))
            key = number if layout.reads_question else (part, dataset.item[index])
            if key not in first_view:
                first_view[key] = views
                views += ids.count(IMAGE)
            image, position, learning = first_view[key], 0, False
            for i, word in enumerate(ids[:used]):
                learning = learning or target[i]
                for v in range(layout.visual_tokens if word == IMAGE else 1):
                    row["tokens"].append(0 if word == IMAGE else word)
                    row["segment"].append(segment)
                    row["position"].append(position)
                    row["order"].append(0 if layout.mask == "prefix" and not learning else position)
                    row["visual"].append(image * layout.visual_tokens + v if word == IMAGE else -1)
                    row["weight"].append(0.0)
                    row["part"].append(part)
                    if target[i] and position:
                        row["weight"][-2] = 1.0  # it is the target of the position before
                    position += 1
                image += word == IMAGE
        for name, values in row.items():
            out[name].append(values + [-1 if name == "visual" else 0] * (length - len(values)))
    return out


@pytest.mark.parametrize("mask", ["causal", "prefix"])
@pytest.mark.parametrize("visual_tokens", [0, 1, 3])
@pytest.mark.parametrize("reads_question", [False, True])
def test_rows_equal_those_of_a_packer_that_walks_through_the_ids(
    mask: str, visual_tokens: int, reads_question: bool
) -> None:
    mixed = mixtures.mixture(
        mixtures.dataset(mixtures.random_examples(30, seed=3)),
        mixtures.dataset(mixtures.question_sets(5, 4, seed=4, images=2), separate=True),
    )
    layout = RowLayout(visual_tokens, mask, reads_question)
    rng = np.random.default_rng(0)
    plans = []
    for _ in range(12):
        numbers = rng.permutation(len(mixed))[: rng.integers(0, 7)].tolist()
        ends = []
        for number in numbers:
            part, index = mixed.locate(number)
            dataset = mixed.parts[part]
            turns = dataset.turn_ends[dataset.turn_bounds[index] : dataset.turn_bounds[index + 1]]
            ends.append(int(rng.choice(turns)))
        plans.append(RowPlan(numbers, ends))
    inputs, views = rows.pack(mixed, plans, layout, 250)
    for name, expected in walk(mixed, plans, layout, 250).items():
        np.testing.assert_array_equal(getattr(inputs, name), expected, err_msg=name)
    shown = {(v.row, v.view) for v in views}
    assert len(shown) == len(views)
    if visual_tokens:
        named = {(row, v // visual_tokens) for row, used in enumerate(inputs.visual) for v in used[used >= 0].tolist()}
        assert named <= shown
