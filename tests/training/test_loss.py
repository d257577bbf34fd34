"""Loss sums, and their gradients, against numpy in float64 with the logits of the whole vocabulary."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import builders
from vlm_jax.core.structs import Inputs
from vlm_jax.models.decoder import Head
from vlm_jax.ops import cross_entropy
from vlm_jax.training import loss

WORDS, WIDTH = 48, 16
END = 33


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """48 words become four blocks of 12, and a prime number of words blocks of which the last is padded."""
    monkeypatch.setattr(cross_entropy, "_MIN_BLOCK", 10)
    monkeypatch.setattr(cross_entropy, "_ALIGN", 5)
    monkeypatch.setattr(cross_entropy, "_MAX_BYTES", 64)
    monkeypatch.setattr(cross_entropy, "_FEW_BYTES", 0)


def problem(scale: float = 1.0, words: int = WORDS) -> tuple[np.ndarray, np.ndarray, Inputs]:
    """States, table and batch; `scale` makes logits large."""
    rng = np.random.default_rng(0)
    inputs = builders.inputs(rows=3, visual_tokens=0)
    inputs.tokens[:, 4] = END  # the last word of the first answer
    states = scale * rng.standard_normal((*inputs.tokens.shape, WIDTH)).astype(np.float32)
    return states, rng.standard_normal((words, WIDTH)).astype(np.float32), inputs


def targets(inputs: Inputs) -> np.ndarray:
    return np.roll(inputs.tokens, -1, axis=1)


def reference(states: np.ndarray, table: np.ndarray, inputs: Inputs, softcap: float | None) -> tuple:
    """(nll, count, hits, answers), d nll / d states, d nll / d table."""
    states, table = states.astype(np.float64), table.astype(np.float64)
    z = states @ table.T
    slope = np.ones_like(z)
    if softcap:
        z = softcap * np.tanh(z / softcap)
        slope = 1 - (z / softcap) ** 2
    top = z.max(-1, keepdims=True)
    p = np.exp(z - top) / np.exp(z - top).sum(-1, keepdims=True)
    truth = np.eye(len(table))[targets(inputs)]
    nll = -np.log(p[truth > 0]).reshape(inputs.tokens.shape)
    hits = z.argmax(-1) == targets(inputs)
    pull = (p - truth) * slope * inputs.weight[..., None]
    answers = inputs.weight * (targets(inputs) != END)
    sums = ((nll * inputs.weight).sum(), inputs.weight.sum(), (hits * answers).sum(), answers.sum())
    return sums, pull @ table, np.einsum("btw,btd->wd", pull, states)


@pytest.mark.parametrize(
    ("scale", "softcap", "words"), [(1.0, None, 48), (30.0, None, 48), (1.0, 3.0, 48), (1.0, None, 47), (1.0, 3.0, 47)]
)
def test_sums_and_gradients_against_numpy(scale: float, softcap: float | None, words: int) -> None:
    """Tokens without weight do not count, large logits do not overflow, and the blocks add up, the last one padded."""
    states, table, inputs = problem(scale, words)
    wanted, to_states, to_table = reference(states, table, inputs, softcap)

    def nll(states: jax.Array, table: jax.Array) -> tuple:
        sums = loss.sums(states, Head(table, softcap), inputs, (END,))
        return sums.nll, sums

    (_, sums), gradients = jax.jit(jax.value_and_grad(nll, argnums=(0, 1), has_aux=True))(states, table)
    np.testing.assert_allclose(sums[:4], wanted, rtol=1e-5)
    np.testing.assert_allclose(gradients[0], to_states, atol=2e-5)
    np.testing.assert_allclose(gradients[1], to_table, atol=2e-5 * scale)
    assert sums.count == 3 * 2 * 3 > sums.answers > 0


def test_end_tokens_are_learned_but_not_counted() -> None:
    """Of answers that are predicted except for their end, the error is 0 and the loss is not."""
    table = 40 * jnp.eye(WORDS)
    inputs = problem()[2]
    predicted = np.where(targets(inputs) == END, 3, targets(inputs))
    states = jnp.asarray(predicted[..., None] == np.arange(WORDS), jnp.float32)
    sums = loss.sums(states, Head(table, None), inputs, (END, 40))
    assert (float(sums.hits), float(sums.answers)) == (15, 15)
    np.testing.assert_allclose((sums.nll, sums.count), (3 * 40, 18), rtol=1e-5)
    everything = loss.sums(states, Head(table, None), inputs)
    assert (float(everything.hits), float(everything.answers)) == (15, 18)


def test_sums_by_source_add_up() -> None:
    """One source has no row here; padding belongs to none."""
    states, table, inputs = problem()
    states, table = jnp.asarray(states), jnp.asarray(table)
    part = np.where(inputs.segment == 2, 2, 0).astype(np.int32)
    whole = loss.sums(states, Head(table, None), inputs, (END,))
    sums = jax.jit(loss.sums, static_argnums=(3, 4))(states, Head(table, None), inputs._replace(part=part), (END,), 3)
    for number in range(3):
        mine = inputs._replace(weight=inputs.weight * (part == number))
        alone = loss.sums(states, Head(table, None), mine, (END,))
        np.testing.assert_allclose(
            (sums.part_nll[number], sums.part_count[number]), (alone.nll, alone.count), rtol=1e-5, atol=1e-5
        )
    np.testing.assert_allclose((sums.part_nll.sum(), sums.part_count.sum()), (whole.nll, whole.count), rtol=1e-5)
    np.testing.assert_allclose(sums[:4], whole[:4], rtol=1e-5)
    assert whole.part_nll is None


def test_of_equal_logits_the_first_word_is_the_answer() -> None:
    """As arg-max has it, across blocks and within one."""
    _, table, inputs = problem()
    sums = jax.jit(loss.sums)(np.zeros((*inputs.tokens.shape, WIDTH), np.float32), Head(table, None), inputs)
    assert sums.hits == ((targets(inputs) == 0) * inputs.weight).sum()


def test_16_bit_states_give_32_bit_logits() -> None:
    """The products' factors are rounded, their sums are not."""
    states, table, inputs = problem()
    states, table = (x.astype(jnp.bfloat16).astype(np.float32) for x in (states, table))
    sums = jax.jit(loss.sums, static_argnums=3)(states.astype(jnp.bfloat16), Head(table, None), inputs, (END,))
    np.testing.assert_allclose(sums[:4], reference(states, table, inputs, None)[0], rtol=1e-5)


def test_no_buffer_holds_the_logits_of_every_word() -> None:
    """Forward and backward: nothing of B x T x W numbers, in any order of its axes."""
    states, table, inputs = problem()

    def nll(states: jax.Array, table: jax.Array) -> jax.Array:
        return loss.sums(states, Head(table, None), inputs).nll

    text = jax.jit(jax.grad(nll, argnums=(0, 1))).lower(states, table).compile().as_text()
    assert "f32[3,11,12]" in text
    sizes = [math.prod(map(int, found.split(","))) for found in re.findall(r"\bf32\[([\d,]+)\]", text)]
    assert max(sizes) < 3 * 11 * WORDS


@pytest.mark.parametrize(
    ("words", "positions", "align", "shape"),
    [
        (151936, 32, 1, (1, 151936)),
        (151936, 256, 1, (8, 18992)),
        (151936, 4096, 1, (16, 9496)),  # 151936 = 128 * 1187
        (151936, 4096, 128, (18, 8448)),  # so no block of whole tiles divides it
        (256000, 4096, 128, (25, 10240)),
        (96, 2**20, 1, (1, 96)),
        (32003, 2**20, 1, (3, 10752)),  # a prime number
    ],
)
def test_blocks_cover_the_vocabulary(
    words: int, positions: int, align: int, shape: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    assert cross_entropy.block_shape(words, positions, align) == shape
    assert 0 <= shape[0] * shape[1] - words < shape[1]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.2, 0.4, 0.9, 1.0])
@pytest.mark.parametrize("words", [48, 47])
def test_every_position_with_weight_counts(share: float, words: int) -> None:
    """For every part of the positions that is computed: loss, hits and gradients are those of the plain formula."""
    rng = np.random.default_rng(1)
    states, table = (rng.standard_normal(shape).astype(np.float32) for shape in ((4, 16, WIDTH), (words, WIDTH)))
    labels = rng.integers(0, words, (4, 16)).astype(np.int32)
    weight = (rng.random((4, 16)) < share) * rng.choice([1.0, 0.5], (4, 16)).astype(np.float32)

    def plain(states: jax.Array, table: jax.Array) -> tuple:
        log_p = jax.nn.log_softmax(states @ table.T)
        nll = -jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]
        hits = jnp.argmax(log_p, axis=-1) == labels
        return jnp.sum(nll * weight), (jnp.where(weight != 0, nll, 0), hits & (weight != 0))

    def ours(states: jax.Array, table: jax.Array) -> tuple:
        nll = cross_entropy.weighted_nll(states, table, None, jnp.asarray(labels), jnp.asarray(weight))
        return nll.total, (nll.tokens, nll.hits)

    arguments = jnp.asarray(states), jnp.asarray(table)
    expected, found = (
        jax.jit(jax.value_and_grad(function, argnums=(0, 1), has_aux=True))(*arguments) for function in (plain, ours)
    )
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-6, atol=3e-6)
    (value, _), _ = found
    np.testing.assert_allclose(jax.jit(ours)(*arguments)[0], value, rtol=1e-6)  # without gradients
