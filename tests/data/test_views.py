"""The images of rows: the right one in each view, and images that cannot be read."""

from pathlib import Path

import numpy as np
import pytest

from tests.data import mixtures
from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import EvaluationSpec
from vlm_jax.data import images, pipeline
from vlm_jax.data.examples import BadItem, Example
from vlm_jax.data.packing import RowLayout
from vlm_jax.data.tokenized import Mixture

BROKEN = mixtures.png(0)[:60]  # a truncated file


@pytest.fixture(scope="module")
def mixed() -> Mixture:
    """Two sources with several images in an item, text-only items, and separate questions."""
    return mixtures.mixture(
        mixtures.dataset(mixtures.random_examples(15, seed=1)),
        mixtures.dataset(mixtures.question_sets(5, 3, seed=2, images=2), separate=True),
    )


def views_of(batches: pipeline.Batches, step: int) -> list[tuple[int, int, int, int, bytes]]:
    """(row, view, part, number of the image, file) of every image that a placeholder names."""
    mixed, inputs, out = batches.data.mixture, batches[step], []
    for row, plan in enumerate(batches.rows(step)):
        for segment, number in enumerate(plan.conversation, start=1):
            mine = inputs.visual[row, (inputs.segment[row] == segment) & (inputs.visual[row] >= 0)]
            part, index = mixed.locate(number)
            dataset = mixed.parts[part]
            files = dataset.source[int(dataset.item[index])].images
            views = list(dict.fromkeys((mine // batches.data.layout.visual_tokens).tolist()))
            first = int(dataset.first_image[index])
            out += [(row, view, part, first + i, files[i]) for i, view in enumerate(views)]
    return out


@pytest.mark.parametrize("reads_question", [False, True])
def test_placeholders_name_the_view_with_their_image(mixed: Mixture, reads_question: bool) -> None:
    batches = mixtures.batches(mixed, RowLayout(4, reads_question=reads_question), row_images=8)
    stored = batches.data._replace(features=(mixtures.numbered(0), mixtures.numbered(1)))
    features = pipeline.Batches(stored, batches.seed)
    seen = 0
    for step in range(3):
        pixels, tokens = batches[step].views.pixels, features[step].views.features.tokens
        for row, view, part, number, file in views_of(batches, step):
            decoded = images.fit([images.read_image(file, "test")], batches.data.encoder)[0]
            np.testing.assert_array_equal(pixels[row, view], decoded)
            assert (tokens[row, view] == 1000 * part + number).all()
            seen += 1
    assert seen > 20


def test_text_alone_has_views_that_nothing_names() -> None:
    mixed = mixtures.mixture(mixtures.dataset(mixtures.random_examples(8, images=0)))
    inputs = mixtures.batches(mixed)[0]
    assert inputs.views.pixels.shape == (4, 4, 16, 16, 3)
    assert not inputs.views.pixels.any()
    assert (inputs.visual == -1).all()


def test_questions_are_cut_to_their_tokens() -> None:
    items = [
        mixtures.example("a", "<image> 5 6 7 8 9 | 10", [mixtures.png(0)]),
        mixtures.example("b", "<image> 5 | 6", [mixtures.png(1)]),
    ]
    mixed = mixtures.mixture(mixtures.dataset(items))
    inputs = mixtures.batches(mixed, RowLayout(4, reads_question=True), question_tokens=3, batch_rows=1)[0]
    assert inputs.views.question.shape == (1, 4, 3)
    assert sorted(inputs.views.question[0, :2].tolist()) == [[5, -1, -1], [5, 6, 7]]


@pytest.fixture
def dirty(tmp_path: Path) -> list[Example]:
    """Broken: the second image of "broken", and the file of "gone"."""
    good = [mixtures.example(f"good{n}", f"<image> 5 | 6 | 7 | {n + 8}", [mixtures.png(n)]) for n in range(6)]
    broken = mixtures.example("broken", "<image> <image> 5 | 6 | 7 | 20", [mixtures.png(9), BROKEN])
    gone = mixtures.example("gone", "<image> 5 | 21", [tmp_path / "gone.png"])
    return [*good[:3], broken, *good[3:], gone]


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("stored", [False, True])
def test_a_broken_image_takes_the_weight_of_its_conversations_alone(
    dirty: list[Example], stored: bool, separate: bool
) -> None:
    mixed = mixtures.mixture(mixtures.dataset(dirty, separate))
    whole = mixtures.mixture(
        mixtures.dataset([e._replace(images=(mixtures.png(0),) * len(e.images)) for e in dirty], separate)
    )
    batches = mixtures.batches(mixed, max_bad_share=0.25)
    if stored:
        batches = pipeline.Batches(batches.data._replace(features=(mixtures.numbered(0),)), batches.seed)
        batches.data.bad.add(0, 4, "not an image")
        batches.data.bad.add(0, 8, "no such file")
    expected = mixtures.batches(whole)
    seen = set()
    for step in range(3):
        inputs, clean = batches[step], expected[step]
        for name in ("tokens", "segment", "position", "visual"):
            np.testing.assert_array_equal(getattr(inputs, name), getattr(clean, name))
        for row, plan in enumerate(batches.rows(step)):
            for segment, number in enumerate(plan.conversation, start=1):
                mine, id = inputs.segment[row] == segment, mixed.id_of(number)
                weight = 0 * clean.weight[row, mine] if id in ("broken", "gone") else clean.weight[row, mine]
                np.testing.assert_array_equal(inputs.weight[row, mine], weight)
                seen.add(id)
    assert len(seen) == 8
    assert sorted(batches.data.bad.found) == [(0, 4), (0, 8)]


def test_too_many_broken_images_stop_the_run(dirty: list[Example]) -> None:
    """Counted by items, with those that were skipped before, through the threads of the pipeline."""
    mixed = mixtures.mixture(mixtures.dataset([*dirty, BadItem("missing image", "x")]))
    mixtures.data(mixed, max_bad_share=1 / 9)
    with pytest.raises(UserError, match=r"data.max_bad_share=0.1 of .* got 1 of 9: listed: missing image: 1"):
        mixtures.data(mixed, max_bad_share=0.1)
    batches = mixtures.batches(mixed, max_bad_share=0.3)
    with pytest.raises(UserError, match=r"data.max_bad_share=0.3 of unusable items, got 3 of 9: ") as caught:
        list(pipeline.train_batches(batches, 0, 4))
    assert "\n" not in str(caught.value)
    two = mixtures.example("two", "<image> <image> 5 | 6", [BROKEN, BROKEN])
    batches = mixtures.batches(mixtures.mixture(mixtures.dataset([two, *dirty[:3]])), max_bad_share=0.25)
    list(pipeline.train_batches(batches, 0, 2))  # two images of one item
    assert len(batches.data.bad.found) == 2


def test_an_item_whose_images_cannot_be_read_later_is_a_broken_image() -> None:
    """A source may find out only when it reads the image."""

    class Late(mixtures.Listed):
        def __getitem__(self, index: int) -> Example:
            example = super().__getitem__(index)
            if example.id == "good1":
                raise BadItem("unreadable file", "good1", "shard 3")
            return example

        def without_images(self, index: int) -> Example:
            return self.items[index]

        def images_fingerprint(self) -> str:
            return "0"

    items = [mixtures.example(f"good{n}", f"<image> 5 | {n + 6}", [mixtures.png(n)]) for n in range(4)]
    batches = mixtures.batches(mixtures.mixture(mixtures.dataset(Late(items))), max_bad_share=0.25)
    batches[0]
    assert list(batches.data.bad.found.values()) == ["listed, item good1: unreadable file (shard 3)"]


def test_questions_about_a_broken_image_are_not_asked(dirty: list[Example]) -> None:
    data = mixtures.data(mixtures.mixture(mixtures.dataset(dirty)), max_bad_share=0.25)
    batches = list(pipeline.evaluation_batches(data, EvaluationSpec(0, 1, 4, 4)))
    example = np.concatenate([batch.example for batch in batches])
    assert example.tolist() == [0, 1, 2, -1, 4, 5, 6, -1]
    answer = np.concatenate([batch.answer for batch in batches])
    assert (answer[example < 0] == -1).all()
