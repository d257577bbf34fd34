"""Tokens that leave inside the decoder: one pass, prefill and decode_step, scanned and unrolled layers agree."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import builders
from vlm_jax.compress import catalog, contract
from vlm_jax.core.structs import Inputs, Views, Visual
from vlm_jax.inference import sampling
from vlm_jax.models.decoder import unstack_layers
from vlm_jax.models.vlm import Vlm
from vlm_jax.sizing import compression, cost

STAGED = [name for name, row in catalog.ROWS.items() if row.stages is not contract.no_stages]
INSIDE = [*STAGED, *(name for name, row in catalog.ROWS.items() if row.segments is not contract.no_segments)]
QUESTION, ANSWER = 3, 4


def built(name, tokens=4, depth=4, **decoder):
    model = Vlm(builders.model(name, tokens, depth=depth, **decoder), builders.COMPUTE)
    return model, jax.tree.map(jnp.asarray, builders.params(model))


def unrolled(model, params):
    compute = sampling.compute_for_decoding(model.compute)
    return Vlm(model.spec, compute), {**params, "decoder": unstack_layers(params["decoder"], model.spec.decoder.depth)}


def conversation(model, rows=2, before=1):
    """Rows of text, one view, a question and an answer; the last row is padded in front."""
    rng, entering = np.random.default_rng(3), model.visual_tokens
    length = before + entering + QUESTION + ANSWER
    index = np.arange(length) - before
    visual = np.where((index >= 0) & (index < entering), index, -1)
    segment, position = np.ones((rows, length + 1), np.int32), np.tile(np.arange(length + 1), (rows, 1))
    fields = [
        np.zeros((rows, length + 1), np.int32),
        segment,
        position.copy(),
        position.copy(),
        np.full_like(segment, -1),
    ]
    for row in range(rows):
        shift = int(row == rows - 1)  # padding behind the other rows, in front of this one
        own = slice(shift, shift + length)
        fields[0][row, own] = np.where(visual < 0, rng.integers(2, 32, length), 0)
        fields[4][row, own] = visual
        segment[row] = 0
        segment[row, own] = 1
        fields[2][row, own] = fields[3][row, own] = np.arange(length)
    weight = np.zeros(segment.shape, np.float32)
    for row in range(rows):
        end = int(row == rows - 1) + length - 1
        weight[row, end - ANSWER : end] = 1
    views = Views(jnp.asarray(rng.integers(0, 256, (rows, 1, 16, 16, 3)), jnp.uint8))
    return Inputs(*map(jnp.asarray, fields), views=views, weight=jnp.asarray(weight))


@pytest.mark.parametrize("name", INSIDE)
def test_prefill_and_decode_equal_the_pass_without_a_cache(name):
    model, params = built(name)
    whole = conversation(model)
    hidden = jax.jit(lambda inputs: model.forward(params, inputs)[0])(whole)
    decoding, apart = unrolled(model, params)
    again = jax.jit(lambda inputs: decoding.forward(apart, inputs)[0])(whole)
    np.testing.assert_allclose(again, hidden, atol=2e-5)
    ends = [whole.tokens.shape[1] - 1 - ANSWER, whole.tokens.shape[1] - ANSWER]
    question = [slice(0, ends[0]), slice(1, ends[1])]  # the last row starts one later

    def part(row, start, stop):
        return jax.tree.map(lambda leaf: leaf[row : row + 1, start:stop], whole._replace(views=None, weight=None))

    for row, own in enumerate(question):
        views = Views(whole.views.pixels[row : row + 1])
        prompt = part(row, own.start, own.stop)._replace(views=views)

        @jax.jit
        def decode(prompt, answer):
            prefilled = sampling.prefill(decoding, apart, prompt, ANSWER)
            states, cache = [prefilled.hidden], prefilled.cache
            for at in range(ANSWER):
                inputs = sampling.continuation(answer[:, at : at + 1], cache)
                state, cache = decoding.forward(apart, inputs, cache)
                states.append(state)
            return jnp.concatenate(states, axis=1), cache

        answer = whole.tokens[row : row + 1, own.stop : own.stop + ANSWER]
        states, cache = decode(prompt, answer)
        np.testing.assert_allclose(states[0], hidden[row, own.stop - 1 : own.stop + ANSWER], atol=2e-5)
        kept = [tokens for _, tokens in compression.cached(model.spec)]
        text = own.stop - own.start - model.visual_tokens + ANSWER
        assert [part.metadata.segment.shape[1] - text for part in (cache, *cache.later)] == kept


@pytest.mark.parametrize("name", STAGED)
def test_packed_equals_alone(name):
    model, params = built(name)
    packed = builders.inputs(rows=2, questions=2, visual_tokens=model.visual_tokens, views=2)
    hidden = jax.jit(lambda inputs: model.forward(params, inputs)[0])
    together = hidden(packed)
    for segment, one in enumerate(builders.apart(packed), start=1):
        own = slice(segment - 1, segment)
        views = jax.tree.map(lambda leaf, own=own: leaf[:, own], packed.views)
        one = one._replace(views=views, visual=np.where(one.visual < 0, -1, one.visual % model.visual_tokens))
        expected = hidden(one)
        shown = np.asarray(one.visual) < 0
        np.testing.assert_allclose(together[packed.segment == segment][shown.ravel()], expected[shown], atol=2e-5)


@pytest.mark.parametrize("name", INSIDE)
def test_a_dead_patch_moves_nothing(name):
    model, params = built(name)
    whole = conversation(model)
    rng = np.random.default_rng(0)
    mask = rng.random((2, 1, 16)) < 0.7
    tokens = rng.normal(size=(2, 1, 16, 16)).astype(np.float32)
    other = np.where(mask[..., None], tokens, rng.normal(size=tokens.shape)).astype(np.float32)
    run = jax.jit(lambda features: model.forward(params, whole._replace(views=Views(features=features)))[0])
    before, after = (run(Visual(jnp.asarray(x), mask=jnp.asarray(mask))) for x in (tokens, other))
    text = (np.asarray(whole.visual) < 0) & (np.asarray(whole.segment) > 0)
    np.testing.assert_allclose(after[text], before[text], atol=1e-6)
    assert np.abs(run(Visual(jnp.asarray(other)))[text] - before[text]).max() > 1e-3


@pytest.mark.parametrize("name", INSIDE)
def test_what_the_patches_say_reaches_the_answer(name):
    """And every parameter of the model, the last layers included, gets a gradient."""
    model, params = built(name)
    whole = conversation(model)

    def last(params):
        return jnp.sum(jnp.square(model.forward(params, whole)[0] * whole.weight[..., None]))

    gradients = jax.jit(jax.grad(last))(params)
    for part in ("encoder", "connector"):
        assert all(
            jnp.abs(leaf).max() > 0
            for leaf in jax.tree.leaves(
                gradients[part]["projector"] if part == "connector" else gradients[part]["patch"]
            )
        )
    layers = jax.tree.map(lambda leaf: jnp.abs(leaf).reshape(len(leaf), -1).max(1), gradients["decoder"]["blocks"])
    assert all((leaf > 0).all() for leaf in jax.tree.leaves(layers))


def products(function, *arguments):
    """FLOPs of the matrix products of a program with unrolled layers."""
    total = 0

    def walk(jaxpr):
        nonlocal total
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                (left, _), _ = equation.params["dimension_numbers"]
                summed = np.prod([equation.invars[0].aval.shape[axis] for axis in left], dtype=int)
                total += 2 * equation.outvars[0].aval.size * summed
            for inner in jax.tree.leaves(tuple(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                if hasattr(inner, "eqns"):
                    walk(inner)

    walk(jax.make_jaxpr(function)(*arguments).jaxpr)
    return total


@pytest.mark.parametrize("name", INSIDE)
def test_prefill_flops_are_those_of_the_program(name):
    model, params = unrolled(*built(name))
    text = 5
    length = model.visual_tokens + text
    position = jnp.arange(length)[None]
    visual = jnp.where(position < model.visual_tokens, position, -1)
    inputs = Inputs(jnp.zeros_like(position), jnp.ones_like(position), position, position, visual)
    features = Visual(jnp.zeros((1, 1, 16, 16)))

    def prefill(params, inputs, features):
        views = Views(features=features, question=jnp.zeros((1, 1, text), jnp.int32))
        return model.logits(params, sampling.prefill(model, params, inputs._replace(views=views), 1).hidden)

    parts = cost.flops(model.spec, text, 1)
    counted = products(prefill, params, inputs, features)
    # The average over one reader is a product too: 2 L a stage that scores.
    alive = [tokens for _, tokens in compression.alive(model.spec)]
    averages = sum(
        2 * (n + text) for n, cut in zip(alive, catalog.stages(model.spec), strict=False) if cut.score == "attention"
    )
    assert counted - averages == parts.compressor + parts.projector + parts.prefill.total


def test_positions_are_kept_or_counted_anew():
    for name, recounted in (("fastv", False), ("pyramiddrop", True)):
        spec = builders.model(name, 4, depth=4)
        (cut,) = catalog.stages(spec)
        assert (cut.positions == "recounted") == recounted


def test_stages_as_published():
    spec = dataclasses.replace(builders.model("pyramiddrop", 4).compressor, grid=(24, 24), tokens=72, depth=3)
    cuts = catalog.row("pyramiddrop").stages(spec, 32)
    assert [(cut.layer, cut.keep) for cut in cuts] == [(8, 288), (16, 144), (24, 72)]
    fastv = dataclasses.replace(spec, name="fastv", tokens=288, depth=2)
    (cut,) = catalog.row("fastv").stages(fastv, 32)
    assert (cut.layer, cut.keep, cut.scored_by) == (2, 288, 1)


def test_questions_share_a_summary():
    """Two questions behind one image and its summary have the states of each alone."""
    model, params = built("voco")
    packed = builders.inputs(rows=2, questions=2, visual_tokens=model.visual_tokens)
    shared = builders.share_image(packed, model.visual_tokens)
    hidden = jax.jit(lambda inputs: model.forward(params, inputs)[0])
    together = hidden(shared)
    for segment, one in enumerate(builders.apart(packed), start=1):
        text = np.asarray(one.visual) < 0
        np.testing.assert_allclose(together[shared.segment == segment], hidden(one)[text], atol=2e-5)
