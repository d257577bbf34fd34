"""Decoding with a static cache: one pass over the prompts, then one token a step, in one loop on the device, until
every row has ended.

    prefilled = prefill(model, params, inputs, room)                        # inputs: one conversation a row
    tokens = sample(model, params, prefilled, pick, eos_ids, limit, room)

Evaluation, `generate` and the ahead-of-time compiler run these two. A row follows from its own prompt alone: neither
the rows beside it nor padding change what it sees, and each row draws from a key of its own.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.core.specs import ComputeSpec
from vlm_jax.core.structs import Cache, Inputs
from vlm_jax.models.cache import init_cache, pad_cache
from vlm_jax.models.vlm import Params, Vlm, last_token

Pick = Callable[[Float[Array, "B W"], Int[Array, ""]], Int[Array, " B"]]  # (logits, tokens so far) -> the next token


class Prefilled(NamedTuple):
    """Prompts that have been read."""

    hidden: Float[Array, "B 1 D"]  # of each row's last token
    cache: Cache


def compute_for_decoding(compute: ComputeSpec) -> ComputeSpec:
    """How a decoder runs with a cache: layers unrolled, nothing rematerialised."""
    return dataclasses.replace(compute, scan_layers=False, remat="none")


def prefill(model: Vlm, params: Params, inputs: Inputs, room: int) -> Prefilled:
    """Prompts through the model, one conversation a row, and a cache with room for that many tokens more. The decoder's
    parameters are unrolled (`models.decoder.unstack_layers`).
    """
    batch, length = inputs.tokens.shape
    cache = init_cache(model.spec.decoder, model.compute, batch, length)
    hidden, cache = model.forward(params, inputs, cache)
    last = last_token(cache.metadata.segment)[:, None, None]
    return Prefilled(jnp.take_along_axis(hidden, last, axis=1), pad_cache(cache, length + room))


def continuation(tokens: Int[Array, "B L"], cache: Cache, real: Bool[Array, "B L"] | bool = True) -> Inputs:
    """More tokens of the conversations that a cache holds, right-padded where not `real`, read causally."""
    seen = jnp.where(cache.metadata.segment == 0, -1, cache.metadata.position)
    position = jnp.max(seen, axis=1, keepdims=True) + 1 + jnp.arange(tokens.shape[1])
    segment = jnp.broadcast_to(jnp.asarray(real, jnp.int32), tokens.shape)
    return Inputs(tokens, segment, position, position, jnp.full_like(tokens, -1))


def decode_step(model: Vlm, params: Params, token: Int[Array, " B"], cache: Cache) -> tuple[Float[Array, "B W"], Cache]:
    """One more token a row -> float32 logits of the next."""
    hidden, cache = model.forward(params, continuation(token[:, None], cache), cache)
    return model.logits(params, hidden)[:, 0], cache


def sample(
    model: Vlm,
    params: Params,
    prefilled: Prefilled,
    pick: Pick,
    eos_ids: tuple[int, ...],
    limit: int | Int[Array, ""],
    room: int,
) -> tuple[Int[Array, "B room"], Cache]:
    """Each row's continuation, of `limit` tokens at most, and the cache behind it.

    `room` is the static size of what is returned, that of `prefill` or less. A token of `eos_ids` ends a row, and the
    first of them fills what is left of it.
    """
    fill = eos_ids[0] if eos_ids else 0

    def ended(token: Int[Array, " B"]) -> Bool[Array, " B"]:
        return jnp.isin(token, jnp.array(eos_ids, jnp.int32)) if eos_ids else jnp.zeros(token.shape, bool)

    def unfinished(carry: tuple) -> Bool[Array, ""]:
        count, _, done, _, _ = carry
        return (count < limit) & ~jnp.all(done)

    def step(carry: tuple) -> tuple:
        count, token, done, cache, out = carry
        logits, cache = decode_step(model, params, token, cache)
        token = jnp.where(done, fill, pick(logits, count)).astype(jnp.int32)
        out = jax.lax.dynamic_update_slice_in_dim(out, token[:, None], count, axis=1)
        return count + 1, token, done | ended(token), cache, out

    token = pick(model.logits(params, prefilled.hidden)[:, 0], jnp.int32(0)).astype(jnp.int32)
    out = jnp.full((token.shape[0], room), fill, jnp.int32).at[:, 0].set(token)
    carry = (jnp.int32(1), token, ended(token), prefilled.cache, out)
    *_, cache, out = jax.lax.while_loop(unfinished, step, carry)
    return out, cache


def greedy(logits: Float[Array, "B W"], count: Any) -> Int[Array, " B"]:
    """The likeliest token."""
    return jnp.argmax(logits, axis=-1)


def sampler(key: Array, temperature: float | Array, top_p: float | Array = 1.0) -> Pick:
    """Tokens drawn from softmax(logits / temperature), of the likeliest words that together reach the probability
    `top_p` (nucleus sampling, arXiv 1904.09751). Row and number of tokens so far give each draw its key.
    """

    def pick(logits: Float[Array, "B W"], count: Any) -> Int[Array, " B"]:
        keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, row), count))(
            jnp.arange(logits.shape[0])
        )
        # From the likeliest down: at a tiny temperature the quotient would overflow for all words.
        scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
        return jax.vmap(jax.random.categorical)(keys, nucleus(scaled, top_p))

    return pick


def nucleus(logits: Float[Array, "B W"], top_p: float | Array) -> Float[Array, "B W"]:
    """The logits of the fewest words whose probability reaches `top_p`, the others -inf; the likeliest word stays."""
    ranked = -jnp.sort(-logits, axis=-1)
    probability = jax.nn.softmax(ranked, axis=-1)
    kept = (jnp.cumsum(probability, axis=-1) - probability < top_p).at[:, 0].set(True)
    least = jnp.min(jnp.where(kept, ranked, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)
