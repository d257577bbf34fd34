"""Conversations that share a row have the logits that each has alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import builders
from tests.data import mixtures
from vlm_jax import build
from vlm_jax.core.specs import views_of_row
from vlm_jax.data import rows
from vlm_jax.data.packing import RowLayout
from vlm_jax.data.rows import RowPlan
from vlm_jax.data.tokenized import Mixture
from vlm_jax.data.views import make_views
from vlm_jax.models.vlm import Vlm


@functools.cache
def model_of(compressor: str, tokens: int, mask: str):
    model = Vlm(builders.model(compressor, tokens, mask), builders.COMPUTE)
    params = jax.tree.map(jnp.asarray, builders.params(model))
    return model, jax.jit(lambda inputs: model.logits(params, model.forward(params, inputs)[0]))


def compare(mixed: Mixture, layout: RowLayout, compressor: str, **fields: object) -> tuple[int, int]:
    """(rows, conversations); raises where the logits of a conversation in its row and alone differ."""
    model, logits = model_of(compressor, layout.visual_tokens - layout.leaving, layout.mask)
    assert (model.visual_tokens, model.reads_question) == (layout.visual_tokens, layout.reads_question)
    batches = mixtures.batches(mixed, layout, **fields)
    data, length = batches.data, batches.data.spec.row_tokens
    epoch = batches.epoch(0)
    views = views_of_row(data.spec, layout.own_views)
    tokens, alone, where = [], [], []
    for step in range(-(-len(epoch) // data.spec.batch_rows)):
        together = np.asarray(logits(batches[step]))
        inputs = batches[step]
        for row, plan in enumerate(batches.rows(step)[: len(epoch) - step * data.spec.batch_rows]):
            for segment, (number, ids) in enumerate(zip(plan.conversation, plan.ids, strict=True), start=1):
                mine = (inputs.segment[row] == segment) | (inputs.segment[row] == -1)  # and shared images
                where.append(together[row, mine])
                tokens.append(inputs.tokens[row, mine])
                alone.append(RowPlan((number,), (ids,)))
    seen = 0
    for start in range(0, len(alone), data.spec.batch_rows):
        plans = alone[start : start + data.spec.batch_rows]
        plans += [RowPlan((), ())] * (data.spec.batch_rows - len(plans))
        inputs, named = rows.pack(mixed, plans, layout, length)
        inputs = inputs._replace(views=make_views(data, named, len(plans), views))
        expected = np.asarray(logits(inputs))
        for row, plan in enumerate(plans):
            if not plan.conversation:
                continue
            mine = inputs.segment[row] > 0
            np.testing.assert_array_equal(inputs.tokens[row, mine], tokens[seen])
            np.testing.assert_allclose(expected[row, mine], where[seen], atol=1e-5)
            seen += 1
    assert seen == len(alone)
    return len(epoch), len(alone)


@pytest.mark.parametrize(
    ("compressor", "tokens", "mask"),
    [
        ("blind", 0, "causal"),
        ("resampler", 1, "causal"),
        ("resampler", 4, "causal"),
        ("resampler", 4, "prefix"),
        ("quecc", 4, "causal"),
        ("qformer_question", 2, "causal"),
        ("llava_mini", 4, "causal"),
        ("vision_zip", 2, "causal"),
        ("divprune", 2, "prefix"),
        ("fastv", 2, "causal"),
        ("fastv", 2, "prefix"),
        ("pyramiddrop", 1, "causal"),
        ("victor", 2, "causal"),
    ],
)
def test_packed_conversations_have_the_logits_of_each_alone(compressor: str, tokens: int, mask: str) -> None:
    """Random conversations of several turns, with no, one or two images anywhere in the questions, some of them cut.
    Where tokens leave inside the decoder, rows have the padding that their absent views lose."""
    mixed = mixtures.mixture(
        mixtures.dataset(mixtures.random_examples(14, seed=1)),
        mixtures.dataset(mixtures.question_sets(3, 3, seed=2), separate=True),
    )
    model, _ = model_of(compressor, tokens, mask)
    layout = build.row_layout(model, mixtures.spec())
    row_tokens = 20 + 4 * layout.leaving
    sizes = mixtures.batches(mixed, layout, row_tokens=row_tokens).sizes
    assert sizes.cut > 0
    count, conversations = compare(mixed, layout, compressor, row_tokens=row_tokens)
    assert conversations == 14 + 9 - sizes.dropped
    assert count < conversations


@pytest.mark.parametrize("images", [1, 2])
def test_a_shared_image_gives_the_logits_of_a_copy_for_each_question(images: int) -> None:
    mixed = mixtures.mixture(mixtures.dataset(mixtures.question_sets(5, 3, images=images), separate=True))
    fields = dict(pack="none", row_tokens=64, format="prefix")
    layout = RowLayout(4, shares_image=True)
    assert (mixtures.batches(mixed, layout, **fields)[0].segment == -1).sum() == 4 * 4 * images
    assert compare(mixed, layout, "resampler", **fields) == (5, 15)


def test_a_row_shares_only_leading_images() -> None:
    """Where an image is elsewhere in one of the questions, each question has its own copy."""
    items = [mixtures.example("a", "<image> 5 | 6 | 7 <image> 8 | 9", [mixtures.png(0)])]
    mixed = mixtures.mixture(mixtures.dataset(items, separate=True))
    assert compare(mixed, RowLayout(4, shares_image=True), "resampler", pack="none", format="prefix") == (1, 2)


def test_question_dependent_views_hold_the_question_of_their_conversation() -> None:
    """The view that a conversation's placeholders name is of its own image and question."""
    part = mixtures.dataset(mixtures.question_sets(6, 3, images=2), separate=True)
    batches = mixtures.batches(mixtures.mixture(part), RowLayout(4, reads_question=True), row_images=6)
    for step in range(3):
        inputs = batches[step]
        for row, plan in enumerate(batches.rows(step)):
            for segment, number in enumerate(plan.conversation, start=1):
                mine = inputs.visual[row, (inputs.segment[row] == segment) & (inputs.visual[row] >= 0)]
                views = sorted(set((mine // 4).tolist()))
                assert len(views) == 2
                asked = inputs.views.question[row, views]
                for question in asked:
                    assert [t for t in question.tolist() if t >= 0] == part.question(number).tolist()
