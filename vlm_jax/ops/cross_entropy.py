"""Cross-entropy over the vocabulary in blocks, so that [B, L, W] logits are never materialised.

One scan over n blocks of the embedding table, rematerialised in the backward pass; with the logits z_w of block w,

    log sum_v exp z_v = log sum_w exp(lse_w)      lse_w = logsumexp(z_w)

The block with the target gives its logit. One block of the table is gathered at a time, and logits stay sharded over
the vocabulary where it is.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from vlm_jax.core import axes
from vlm_jax.ops.logical_axes import axis_size, constrain, gather_for_compute

_MIN_BLOCK = 8192  # vocabulary entries
_ALIGN = 128  # a TPU tile: XLA reduce-scatters gradients of whole tiles, and all-reduces others


def token_scores(
    states: Float[Array, "B L D"], table: Float[Array, "W D"], softcap: float | None, targets: Int[Array, "B L"]
) -> tuple[Float[Array, "B L"], Bool[Array, "B L"]]:
    """Negative log-likelihood (nats) of each target, and whether it is the arg-max (the first of equal logits).

    softcap: logits become softcap * tanh(logit / softcap) (Gemma 2).
    """
    vocab, shards = table.shape[0], axis_size(axes.VOCAB)
    shards = shards if vocab % shards == 0 else 1
    blocks = _in_blocks(table, shards, 0)
    ids = _in_blocks(jnp.arange(vocab)[:, None], shards, vocab)[..., 0]
    states32 = states.astype(jnp.float32)

    def one(block: Float[Array, "w D"], block_ids: Int[Array, " w"]) -> tuple[Array, ...]:
        z = _product(states32, gather_for_compute(block, (axes.VOCAB, axes.EMBED), states.dtype))
        if softcap is not None:
            z = softcap * jnp.tanh(z / softcap)
        z = jnp.where(block_ids < vocab, z, -jnp.inf)
        z = constrain(z, (axes.BATCH, axes.LENGTH, axes.ACT_VOCAB))
        is_target: Bool[Array, "B L w"] = block_ids == targets[..., None]
        best = jax.lax.stop_gradient(jnp.max(z, axis=-1))
        first = jnp.min(jnp.where(z == best[..., None], block_ids, vocab), axis=-1)
        return jax.nn.logsumexp(z, axis=-1), jnp.sum(jnp.where(is_target, z, 0), axis=-1), best, first

    each = one if len(blocks) == 1 else jax.checkpoint(one)
    _, (lse, chosen, best, first) = jax.lax.scan(lambda _, block: (None, each(*block)), None, (blocks, ids))
    nll = jax.nn.logsumexp(lse, axis=0) - chosen.sum(0)
    winner = jnp.min(jnp.where(best == best.max(0), first, vocab), axis=0)
    return nll, winner == targets


def block_shape(vocab: int) -> tuple[int, int]:
    """(number of blocks, entries of each); the last block may be padded."""
    count = max(vocab // _MIN_BLOCK, 1)
    width = vocab if count == 1 else -(-vocab // (count * _ALIGN)) * _ALIGN
    return -(-vocab // width), width


def _in_blocks(rows: Shaped[Array, "W D"], shards: int, fill: int) -> Shaped[Array, "n w D"]:
    """Every block takes an equal part of each shard; the last one is padded with `fill`."""
    count, width = block_shape(rows.shape[0] // shards)
    by_shard = rows.reshape(shards, -1, rows.shape[1])
    by_shard = jnp.pad(by_shard, ((0, 0), (0, count * width - by_shard.shape[1]), (0, 0)), constant_values=fill)
    return by_shard.reshape(shards, count, width, -1).swapaxes(0, 1).reshape(count, shards * width, -1)


@jax.custom_vjp
def _product(states: Float[Array, "B L D"], block: Float[Array, "w D"]) -> Float[Array, "B L w"]:
    """float32 logits of factors in the dtype of `block`; gradients of states are float32 too, summed over blocks."""
    return jnp.einsum("bld,wd->blw", states.astype(block.dtype), block, preferred_element_type=jnp.float32)


def _forward(states: Array, block: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product(states, block), (states, block)


def _backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    states, block = saved
    gradient = gradient.astype(block.dtype)
    to_states = jnp.einsum("blw,wd->bld", gradient, block, preferred_element_type=jnp.float32)
    return to_states, jnp.einsum("blw,bld->wd", gradient, states.astype(block.dtype))


_product.defvjp(_forward, _backward)
