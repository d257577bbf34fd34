"""Decoding with a static cache: prefill, then decode steps in one loop on the device until every row has ended.

    prefilled = prefill(model, params, inputs, max_new)                        # inputs: one conversation a row
    tokens, cache = sample(model, params, prefilled, pick, eos_ids, limit, max_new)

A row's tokens do not depend on other rows or on padding; each row samples with its own key.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.core.specs import ComputeSpec
from vlm_jax.core.structs import Cache, Inputs
from vlm_jax.models.cache import pad_cache
from vlm_jax.models.vlm import Params, Vlm, last_token

Pick = Callable[[Float[Array, "B W"], Int[Array, ""]], Int[Array, " B"]]  # (logits, tokens so far) -> the next token


class Prefilled(NamedTuple):
    """Prompts after prefill."""

    hidden: Float[Array, "B 1 D"]  # of each row's last token
    cache: Cache


def compute_for_decoding(compute: ComputeSpec) -> ComputeSpec:
    """The spec for decoding: unrolled layers, no rematerialisation."""
    return dataclasses.replace(compute, scan_layers=False, remat="none")


def prefill(model: Vlm, params: Params, inputs: Inputs, max_new: int) -> Prefilled:
    """Runs prompts, one conversation a row, and returns a cache for `max_new` new tokens. The decoder's parameters are
    unrolled (`models.decoder.unstack_layers`).
    """
    batch, length = inputs.tokens.shape
    views = 0 if inputs.views is None else jax.tree.leaves(inputs.views)[0].shape[1]
    hidden, cache = model.forward(params, inputs, model.init_cache(batch, length, views))
    last = last_token(cache.metadata.segment)[:, None, None]
    hidden, cache = jnp.take_along_axis(hidden, last, axis=1), model.evict(cache, views)
    return Prefilled(hidden, pad_cache(cache, cache.metadata.segment.shape[1] + max_new))


def continuation(tokens: Int[Array, "B L"], cache: Cache, valid: Bool[Array, "B L"] | bool = True) -> Inputs:
    """Causal inputs that continue the conversations of a cache, right-padded where not `valid`."""
    cached = jnp.where(cache.metadata.segment == 0, -1, cache.metadata.position)
    position = jnp.max(cached, axis=1, keepdims=True) + 1 + jnp.arange(tokens.shape[1])
    segment = jnp.broadcast_to(jnp.asarray(valid, jnp.int32), tokens.shape)
    return Inputs(tokens, segment, position, position, jnp.full_like(tokens, -1))


def decode_step(model: Vlm, params: Params, token: Int[Array, " B"], cache: Cache) -> tuple[Float[Array, "B W"], Cache]:
    """One token for each row -> float32 logits of the next."""
    hidden, cache = model.forward(params, continuation(token[:, None], cache), cache)
    return model.logits(params, hidden)[:, 0], cache


def sample(
    model: Vlm,
    params: Params,
    prefilled: Prefilled,
    pick: Pick,
    eos_ids: tuple[int, ...],
    limit: int | Int[Array, ""],
    max_new: int,
) -> tuple[Int[Array, "B max_new"], Cache]:
    """Generates at most `limit` tokens for each row; returns them and the cache.

    `max_new` is the static length of the output, at most that of `prefill`. A row ends with a token of `eos_ids` and is
    filled with the first of them.
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
    out = jnp.full((token.shape[0], max_new), fill, jnp.int32).at[:, 0].set(token)
    carry = (jnp.int32(1), token, ended(token), prefilled.cache, out)
    *_, cache, out = jax.lax.while_loop(unfinished, step, carry)
    return out, cache


def greedy(logits: Float[Array, "B W"], count: Any) -> Int[Array, " B"]:
    """The most likely token."""
    return jnp.argmax(logits, axis=-1)


def sampler(key: Array, temperature: float | Array, top_p: float | Array = 1.0) -> Pick:
    """Sampling from softmax(logits / temperature) restricted to the nucleus of probability `top_p` (arXiv 1904.09751).
    Keys are folded with the row and the number of tokens so far.
    """

    def pick(logits: Float[Array, "B W"], count: Any) -> Int[Array, " B"]:
        rows = jnp.arange(logits.shape[0])
        keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, row), count))(rows)
        # Relative to the largest: with a tiny temperature the quotient would overflow.
        scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
        return jax.vmap(jax.random.categorical)(keys, nucleus(scaled, top_p))

    return pick


def nucleus(logits: Float[Array, "B W"], top_p: float | Array) -> Float[Array, "B W"]:
    """Logits with -inf outside the smallest set of most likely tokens whose probability reaches `top_p`."""
    ranked = -jnp.sort(-logits, axis=-1)
    probability = jax.nn.softmax(ranked, axis=-1)
    kept = (jnp.cumsum(probability, axis=-1) - probability < top_p).at[:, 0].set(True)
    least = jnp.min(jnp.where(kept, ranked, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)
