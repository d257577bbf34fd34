"""Cross-entropy over the vocabulary, without ever holding the logits of the whole vocabulary.

The table passes by in n blocks of words, w = 1 .. n, inside one scan, and where they are several, again in the backward
pass. With the logits z_w of a block's words,

    log sum_v exp z_v = log sum_w exp(lse_w)      lse_w = logsumexp(z_w)

and the target's logit and the best word are found in the block that has them. Only one block of the vocabulary's kernel
is gathered at a time, and where words are split over devices the logits stay split.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from vlm_jax.core import axes
from vlm_jax.ops.logical_axes import axis_size, constrain, gather_for_compute

_LEAST_WORDS = 8192  # of a block: enough work for each product, few enough for its logits to be small
_ALIGN = 128  # a TPU's tile: XLA scatters gradients of whole tiles, and sums others in full on every chip


def token_scores(
    states: Float[Array, "B L D"], table: Float[Array, "W D"], softcap: float | None, targets: Int[Array, "B L"]
) -> tuple[Float[Array, "B L"], Bool[Array, "B L"]]:
    """Negative log-likelihood (nats) of each target, and whether it is the arg-max; of several words with the largest
    logit the first counts as the arg-max.

    softcap: logits become softcap * tanh(logit / softcap) (Gemma 2).
    """
    vocab, shards = table.shape[0], axis_size(axes.VOCAB)
    shards = shards if vocab % shards == 0 else 1
    blocks = _in_blocks(table, shards, 0)
    ids = _in_blocks(jnp.arange(vocab)[:, None], shards, vocab)[..., 0]
    states32 = states.astype(jnp.float32)

    def one(block: Float[Array, "w D"], words: Int[Array, " w"]) -> tuple[Array, ...]:
        z = _product(states32, gather_for_compute(block, (axes.VOCAB, axes.EMBED), states.dtype))
        if softcap is not None:
            z = softcap * jnp.tanh(z / softcap)
        z = jnp.where(words < vocab, z, -jnp.inf)
        z = constrain(z, (axes.BATCH, axes.LENGTH, axes.ACT_VOCAB))
        here: Bool[Array, "B L w"] = words == targets[..., None]
        best = jax.lax.stop_gradient(jnp.max(z, axis=-1))
        first = jnp.min(jnp.where(z == best[..., None], words, vocab), axis=-1)
        return jax.nn.logsumexp(z, axis=-1), jnp.sum(jnp.where(here, z, 0), axis=-1), best, first

    each = one if len(blocks) == 1 else jax.checkpoint(one)
    _, (lse, chosen, best, first) = jax.lax.scan(lambda _, block: (None, each(*block)), None, (blocks, ids))
    nll = jax.nn.logsumexp(lse, axis=0) - chosen.sum(0)
    winner = jnp.min(jnp.where(best == best.max(0), first, vocab), axis=0)
    return nll, winner == targets


def block_shape(words: int) -> tuple[int, int]:
    """(blocks, words of each), of which only the last block has words too many."""
    count = max(words // _LEAST_WORDS, 1)
    width = words if count == 1 else -(-words // (count * _ALIGN)) * _ALIGN
    return -(-words // width), width


def _in_blocks(rows: Shaped[Array, "W D"], shards: int, fill: int) -> Shaped[Array, "n w D"]:
    """A block takes its share of the words of every shard; what the last block lacks is filled."""
    count, width = block_shape(rows.shape[0] // shards)
    by_shard = rows.reshape(shards, -1, rows.shape[1])
    by_shard = jnp.pad(by_shard, ((0, 0), (0, count * width - by_shard.shape[1]), (0, 0)), constant_values=fill)
    return by_shard.reshape(shards, count, width, -1).swapaxes(0, 1).reshape(count, shards * width, -1)


@jax.custom_vjp
def _product(states: Float[Array, "B L D"], block: Float[Array, "w D"]) -> Float[Array, "B L w"]:
    """Logits in float32 of factors in the dtype of `block`; gradients of states add up in float32 over the blocks."""
    return jnp.einsum("bld,wd->blw", states.astype(block.dtype), block, preferred_element_type=jnp.float32)


def _forward(states: Array, block: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product(states, block), (states, block)


def _backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    states, block = saved
    gradient = gradient.astype(block.dtype)
    to_states = jnp.einsum("blw,wd->bld", gradient, block, preferred_element_type=jnp.float32)
    return to_states, jnp.einsum("blw,bld->wd", gradient, states.astype(block.dtype))


_product.defvjp(_forward, _backward)
