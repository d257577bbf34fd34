"""Decoding with a static cache: prefill, then decode steps in one loop on the device until every row has ended.

    prefilled = prefill(model, params, inputs, max_new)                        # inputs: one conversation a row
    tokens, cache = sample(model, params, prefilled, pick, eos_ids, limit, max_new)

`sample` is `start` (the first token) and `decode` (the loop), which may also run piece by piece. A row's tokens do not
depend on other rows or on padding; each row samples with its own key.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt

from vlm_jax.core.specs import ComputeSpec
from vlm_jax.core.structs import Cache, Inputs
from vlm_jax.models.cache import pad_cache
from vlm_jax.models.vlm import Params, Vlm, last_token

Pick = Callable[[Float[Array, "B W"], Int[Array, ""]], Int[Array, " B"]]  # (logits, tokens so far) -> the next token


class Prefilled(NamedTuple):
    """Prompts after prefill."""

    hidden: Float[Array, "B 1 D"]  # of each row's last token
    cache: Cache


class SamplingParams(NamedTuple):
    """How each row is sampled. A row's key depends on its own `seed` and `row` alone."""

    limit: Int[Array, " B"]  # number of new tokens
    temperature: Float[Array, " B"]  # 0: greedy
    top_p: Float[Array, " B"]
    seed: UInt[Array, " B"]
    row: Int[Array, " B"]  # index in the call of `generate`


class Decoding(NamedTuple):
    """The state of the loop."""

    count: Int[Array, ""]  # tokens so far
    token: Int[Array, " B"]  # the last of them
    done: Bool[Array, " B"]  # rows that ended
    out: Int[Array, "B max_new"]
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
    limit: int | Int[Array, "..."],
    max_new: int,
) -> tuple[Int[Array, "B max_new"], Cache]:
    """Generates at most `limit` tokens (an integer, or one for each row); returns them and the cache.

    `max_new` is the static length of the output, at most that of `prefill`. A row ends with a token of `eos_ids` or at
    its limit, and is filled with the first of them.
    """
    state = start(model, params, prefilled, pick, eos_ids, max_new)
    state = decode(model, params, state, pick, eos_ids, limit, max_new)
    return state.out, state.cache


def start(
    model: Vlm, params: Params, prefilled: Prefilled, pick: Pick, eos_ids: tuple[int, ...], max_new: int
) -> Decoding:
    """The state after the first token."""
    token = pick(model.logits(params, prefilled.hidden)[:, 0], jnp.int32(0)).astype(jnp.int32)
    out = jnp.full((token.shape[0], max_new), _fill(eos_ids), jnp.int32).at[:, 0].set(token)
    return Decoding(jnp.int32(1), token, _ended(token, eos_ids), out, prefilled.cache)


def decode(
    model: Vlm,
    params: Params,
    state: Decoding,
    pick: Pick,
    eos_ids: tuple[int, ...],
    limit: int | Int[Array, "..."],
    until: int | Int[Array, ""],
) -> Decoding:
    """Decodes until all rows have ended or have `until` tokens. `limit` is as in `sample`."""

    def unfinished(state: Decoding) -> Bool[Array, ""]:
        return (state.count < until) & ~jnp.all(state.done | (state.count >= limit))

    def step(state: Decoding) -> Decoding:
        logits, cache = decode_step(model, params, state.token, state.cache)
        done = state.done | (state.count >= limit)
        token = jnp.where(done, _fill(eos_ids), pick(logits, state.count)).astype(jnp.int32)
        out = jax.lax.dynamic_update_slice_in_dim(state.out, token[:, None], state.count, axis=1)
        return Decoding(state.count + 1, token, done | _ended(token, eos_ids), out, cache)

    return jax.lax.while_loop(unfinished, step, state)


def _fill(eos_ids: tuple[int, ...]) -> int:
    return eos_ids[0] if eos_ids else 0


def _ended(token: Int[Array, " B"], eos_ids: tuple[int, ...]) -> Bool[Array, " B"]:
    return jnp.isin(token, jnp.array(eos_ids, jnp.int32)) if eos_ids else jnp.zeros(token.shape, bool)


def greedy(logits: Float[Array, "B W"], count: Any) -> Int[Array, " B"]:
    """The most likely token."""
    return jnp.argmax(logits, axis=-1)


def sampler(
    keys: Key[Array, " B"], temperature: float | Float[Array, "..."], top_p: float | Float[Array, "..."] = 1.0
) -> Pick:
    """Sampling from softmax(logits / temperature) restricted to the nucleus of probability `top_p` (arXiv 1904.09751);
    greedy where `temperature` is 0. Each row's key is folded with the number of tokens so far.
    """
    temperature, top_p = (jnp.reshape(jnp.asarray(x, jnp.float32), (-1, 1)) for x in (temperature, top_p))

    def pick(logits: Float[Array, "B W"], count: Any) -> Int[Array, " B"]:
        folded = jax.vmap(lambda key: jax.random.fold_in(key, count))(keys)
        # Relative to the largest: with a tiny temperature the quotient would overflow.
        scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / jnp.where(temperature == 0, 1, temperature)
        kept = jax.lax.cond(jnp.any(top_p < 1), nucleus, lambda logits, _: logits, scaled, top_p)
        drawn = jax.vmap(jax.random.categorical)(folded, kept)
        return jnp.where(temperature[:, 0] == 0, greedy(logits, count), drawn)

    return pick


def row_keys(seed: UInt[Array, " B"], row: Int[Array, " B"]) -> Key[Array, " B"]:
    """A key for each row."""
    return jax.vmap(lambda seed, row: jax.random.fold_in(jax.random.key(seed), row))(seed, row)


def nucleus(logits: Float[Array, "B W"], top_p: float | Float[Array, "..."]) -> Float[Array, "B W"]:
    """Logits with -inf outside the smallest set of most likely tokens whose probability reaches `top_p`.

    A token is kept if those more likely than it do not reach `top_p`. The least logit of such a token is found by
    bisection over the bits of a float32, which costs less than sorting a vocabulary.
    """
    probability, logits = jax.nn.softmax(logits, axis=-1), logits.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(logits, jnp.int32)
    ranks = jnp.where(bits < 0, bits ^ jnp.int32(2**31 - 1), bits)  # integers in the order of the logits

    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, without overflow
        is_kept = jnp.sum(jnp.where(ranks > middle, probability, 0), axis=-1, keepdims=True) < top_p
        return jnp.where(is_kept, low, middle + 1), jnp.where(is_kept, middle, high)

    highest = jnp.max(ranks, axis=-1, keepdims=True)
    _, least = jax.lax.fori_loop(0, 32, halve, (jnp.full_like(highest, -(2**31)), highest))
    return jnp.where((ranks >= least) | (top_p >= 1), logits, -jnp.inf)
