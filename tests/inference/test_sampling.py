"""Prefill, decode_step and sample against a naive loop that runs the whole model again for every token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import builders
from vlm_jax.core.structs import AttentionMetadata, Cache, Inputs
from vlm_jax.inference import sampling
from vlm_jax.models.decoder import unstack_layers
from vlm_jax.models.vlm import Vlm

NEW = 5
QUESTIONS = (2, 3, 5, 1)  # tokens of each row's question
CASES = {
    "causal": dict(compressor="resampler"),
    "prefix": dict(compressor="pool", mask="prefix", qk_norm=True),
    "window": dict(compressor="quecc", window=3, window_pattern=2, sandwich_norm=True, logit_softcap=3.0),
    "blind": dict(compressor="blind", tokens=0),
}


def prompts(visual_tokens: int, mask: str) -> Inputs:
    """One question a row, of different lengths, padded on the right."""
    rng = np.random.default_rng(3)
    length = visual_tokens + max(QUESTIONS)
    position = np.tile(np.arange(length, dtype=np.int32), (4, 1))
    real = position < visual_tokens + np.array(QUESTIONS)[:, None]
    packed = builders.inputs(rows=4, questions=1, visual_tokens=visual_tokens)
    return Inputs(
        np.where(real & (position >= visual_tokens), rng.integers(2, 32, (4, length)), 0).astype(np.int32),
        real.astype(np.int32),
        np.where(real, position, 0),
        np.where(real & (mask == "causal"), position, 0),
        np.where(position < visual_tokens, position, -1),
        packed.views,
    )


def naive(model: Vlm, params: dict, inputs: Inputs) -> np.ndarray:
    """Row by row: the prompt and the tokens so far through `forward`, scanned and without a cache, once a token."""
    length = inputs.tokens.shape[1] + NEW
    logits = jax.jit(lambda inputs: model.logits(params, model.forward(params, inputs)[0]))
    out = []
    for row in range(4):
        start = int(inputs.segment[row].sum())
        one = jax.tree.map(lambda leaf, row=row: leaf[row, None], inputs)
        fields = [np.pad(part[:, :start], ((0, 0), (0, length - start))) for part in one[:4]]
        visual = np.pad(one.visual[:, :start], ((0, 0), (0, length - start)), constant_values=-1)
        tokens, segment, position, order = fields
        for at in range(start, start + NEW):
            found = logits(Inputs(tokens, segment, position, order, visual, one.views))
            tokens[0, at] = np.argmax(found[0, at - 1])
            segment[0, at], position[0, at], order[0, at] = 1, at, at
        out.append(tokens[0, start : start + NEW])
    return np.array(out)


@pytest.mark.parametrize("case", CASES)
def test_greedy_equals_the_naive_loop(case: str) -> None:
    """Every row as if it were alone; behind the end token, nothing but end tokens."""
    spec = builders.model(**CASES[case])
    scanned = Vlm(spec, builders.COMPUTE)
    params = jax.tree.map(jnp.asarray, builders.params(scanned))
    inputs = prompts(spec.compressor.tokens, spec.mask)
    free = naive(scanned, params, inputs)
    end = int(free[1, 2])  # so that at least one row ends early
    expected = free.copy()
    for row in expected:
        if end in row:
            row[row.tolist().index(end) :] = end
    assert len(np.unique(free)) > 3  # a decoder that repeats one word would prove little
    model = Vlm(spec, sampling.compute_for_decoding(builders.COMPUTE))
    unrolled = {**params, "decoder": unstack_layers(params["decoder"], spec.decoder.depth)}

    @jax.jit
    def greedy(inputs: Inputs) -> jax.Array:
        prefilled = sampling.prefill(model, unrolled, inputs, NEW)
        return sampling.sample(model, unrolled, prefilled, sampling.greedy, (end,), NEW, NEW)[0]

    np.testing.assert_array_equal(greedy(inputs), expected)


def test_the_nucleus_of_a_vocabulary_is_that_of_the_sorted_probabilities() -> None:
    """numpy, in float64; ties are kept together. Rows have their own `top_p`."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6, 5000)).astype(np.float32) * np.float32([[1], [3], [1e-3], [30], [1], [2]])
    logits[4] = np.round(logits[4])
    top_p = np.float32([[0.5], [0.9], [0.25], [0.99], [0.7], [1.0]])
    found = np.isfinite(sampling.nucleus(jnp.asarray(logits), jnp.asarray(top_p)))
    probability = np.exp(logits.astype(np.float64))
    probability /= probability.sum(axis=1, keepdims=True)
    for row, limit, kept in zip(probability, top_p[:, 0], found, strict=True):
        more_likely = np.array([row[row > each].sum() for each in row])
        differs = kept != (more_likely < limit)
        assert np.all(np.abs(more_likely[differs] - limit) < 1e-5)
        assert kept[np.argmax(row)]
    assert found[5].all()


def test_draws_have_the_probabilities_of_the_softmax() -> None:
    logits = jnp.tile(jnp.log(jnp.array([0.5, 0.3, 0.2])) * 2, (20_000, 1))
    drawn = sampling.sampler(jax.random.split(jax.random.key(0), 20_000), 2.0)(logits, jnp.int32(4))
    np.testing.assert_allclose(np.bincount(drawn) / len(drawn), [0.5, 0.3, 0.2], atol=0.015)


@pytest.mark.parametrize(("top_p", "kept"), [(0.05, 1), (0.49, 1), (0.6, 2), (0.8, 2), (0.81, 3), (1.0, 4)])
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(top_p: float, kept: int) -> None:
    probability = np.array([[0.1, 0.5, 0.1, 0.3], [0.5, 0.1, 0.3, 0.1]])
    probability[:, [0, 2]] += [[-0.01, 0.01], [0, 0]]  # no ties in the first row
    found = np.isfinite(sampling.nucleus(jnp.log(probability), top_p))
    ranked = np.sort(probability[0])[::-1]
    fewest = int(np.argmax(np.cumsum(ranked) >= top_p - 1e-6)) + 1
    assert found[0].sum() == fewest == kept
    assert set(np.flatnonzero(found[0])) == set(np.argsort(-probability[0])[:kept])


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1e-30), (1.0, 1e-50), (1.2e-38, 1.0), (1e-30, 0.5)])
def test_the_smallest_settings_draw_the_likeliest_word(temperature: float, top_p: float) -> None:
    logits = jnp.array([[-30.0, -10.0, -20.0], [5.0, 4.0, 6.0]])
    keys = jax.random.split(jax.random.key(0), 2)
    drawn = sampling.sampler(keys, jnp.float32(temperature), jnp.float32(top_p))(logits, jnp.int32(4))
    assert drawn.tolist() == [1, 2]


class Successor(Vlm):
    """A model whose token n + 1 follows n; `params` hear of every call."""

    def forward(self, params: list, inputs: Inputs, cache: Cache | None = None) -> tuple[jax.Array, Cache]:
        jax.debug.callback(lambda n: params.append(int(n)), cache.length)
        return inputs.tokens[..., None].astype(jnp.float32), cache._replace(length=cache.length + 1)

    def logits(self, params: list, hidden: jax.Array) -> jax.Array:
        return jax.nn.one_hot(hidden[..., 0].astype(jnp.int32) + 1, 100)


def test_decoding_stops_when_every_row_has_ended() -> None:
    """Rows end at 7 or 9: the loop runs until the later one, and fills with the first of the end tokens."""
    calls, zeros = [], jnp.zeros((2, 1), jnp.int32)
    model = Successor(builders.model(), builders.COMPUTE)
    cache = Cache((), (), AttentionMetadata(zeros, zeros, zeros), jnp.int32(1))

    def run(limit: jax.Array) -> jax.Array:
        first = sampling.Prefilled(jnp.array([[[4.0]], [[2.0]]]), cache)
        return sampling.sample(model, calls, first, sampling.greedy, (9, 7), limit, 12)[0]

    program = jax.jit(run)
    np.testing.assert_array_equal(program(12), [[5, 6, 7] + [9] * 9, [3, 4, 5, 6, 7] + [9] * 7])
    jax.effects_barrier()
    assert sorted(calls) == [1, 2, 3, 4]
    np.testing.assert_array_equal(program(2)[:, :2], [[5, 6], [3, 4]])


def test_each_row_stops_at_its_limit_and_the_loop_may_run_in_pieces() -> None:
    """Limits of 2 and 4: what follows a limit is filled; a limit that falls to the count so far ends the row."""
    calls, zeros = [], jnp.zeros((2, 1), jnp.int32)
    model = Successor(builders.model(), builders.COMPUTE)
    cache = Cache((), (), AttentionMetadata(zeros, zeros, zeros), jnp.int32(1))
    first = sampling.Prefilled(jnp.array([[[20.0]], [[40.0]]]), cache)
    out, _ = sampling.sample(model, calls, first, sampling.greedy, (9, 7), jnp.array([2, 4]), 6)
    np.testing.assert_array_equal(out, [[21, 22, 9, 9, 9, 9], [41, 42, 43, 44, 9, 9]])
    state = sampling.start(model, calls, first, sampling.greedy, (9, 7), 6)
    for limits, until in (([6, 6], 2), ([6, 6], 3), ([3, 6], 5), ([3, 6], 6)):
        state = sampling.decode(model, calls, state, sampling.greedy, (9, 7), jnp.array(limits), until)
        assert int(state.count) == until
    np.testing.assert_array_equal(state.out, [[21, 22, 23, 9, 9, 9], [41, 42, 43, 44, 45, 46]])


def test_a_row_draws_by_its_own_settings_wherever_it_stands_in_a_batch() -> None:
    """Greedy, warm and nucleus rows in one batch draw what each draws alone."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(4, 50)), jnp.float32)
    seed, row = jnp.array([3, 3, 8, 3], jnp.uint32), jnp.array([0, 1, 0, 0])
    heat, top_p = jnp.array([0.0, 1.0, 2.0, 1.0]), jnp.array([1.0, 0.9, 0.3, 1.0])
    keys = sampling.row_keys(seed, row)
    draw = jax.jit(sampling.sampler(keys, heat, top_p))
    drawn = [draw(logits, jnp.int32(n)) for n in range(30)]
    for i in (3, 2, 1, 0):
        key = jax.random.fold_in(jax.random.key(int(seed[i])), int(row[i]))[None]
        alone = jax.jit(sampling.sampler(key, heat[i], top_p[i])) if i else sampling.greedy
        expected = [alone(logits[i : i + 1], jnp.int32(n))[0] for n in range(30)]
        np.testing.assert_array_equal([d[i] for d in drawn], expected)
    assert len({int(d[3]) for d in drawn}) > 5
