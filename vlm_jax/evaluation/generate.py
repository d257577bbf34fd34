"""Decoding with a static cache: one pass over the prompt, then one token a step, in one loop on the device, until every
row has ended.

A row follows from its own prompt alone: neither the rows beside it nor padding change what it sees, and each row
draws from a key of its own.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.core.structs import Batch, Cache
from vlm_jax.models.vlm import Params, Prompt, Vlm, last_question, last_token
from vlm_jax.ops import masks

Pick = Callable[[Float[Array, "B W"], Any], Int[Array, " B"]]  # (logits, how many tokens were said) -> the next token


def greedy(model: Vlm, params: Params, batch: Batch, max_new_tokens: int, end: int) -> Int[Array, "B new"]:
    """The most likely continuation of each row's question; `end` fills a row once it has been produced.

    Rows hold one question each; whatever follows the question in `batch.text` is hidden from the model.
    """
    question = batch._replace(
        segment=jnp.where(batch.question, batch.segment, masks.PADDING),
        text=jnp.where(batch.question, batch.text, 0),
    )
    visual_tokens = model.spec.compressor.tokens
    logits, cache = model.prefill(params, question, visual_tokens + batch.text.shape[1] + max_new_tokens)
    position = visual_tokens + last_question(batch) + 1

    def extend(token: Array, said: Array, cache: Any) -> tuple[Array, Any]:
        return model.extend(params, token, position + said - 1, cache)

    return decode(extend, likeliest, logits, cache, (end,), max_new_tokens, max_new_tokens)[0]


class Asked(NamedTuple):
    """Prompts that have been read."""

    state: Float[Array, "B 1 D"]  # of each row's last token
    position: Int[Array, " B"]  # of the token to come
    cache: Cache


def ask(model: Vlm, params: Params, prompt: Prompt, room: int) -> Asked:
    """Reads prompts, and leaves room for that many tokens. Parameters as `Vlm.read` takes them."""
    states, cache = model.read(params, prompt, prompt.tokens.shape[1] + room)
    last = jnp.take_along_axis(states, last_token(prompt)[:, None, None], axis=1)
    return Asked(last, jnp.sum(prompt.kind != 0, axis=1), cache)


def answer(
    model: Vlm, params: Params, asked: Asked, pick: Pick, ends: tuple[int, ...], limit: Int[Array, ""], room: int
) -> tuple[Int[Array, "B room"], Asked]:
    """Each row's continuation, of `limit` tokens at most, and what was asked, so that its memory can be used again.

    `room` is the static size of what is returned, that of `ask` or less. The first token of `ends` ends a row and fills
    what is left of it.
    """

    def extend(token: Array, said: Array, cache: Any) -> tuple[Array, Any]:
        return model.say(params, token, asked.position + said - 1, cache)

    logits = model.logits(params, asked.state)[:, 0]
    out, cache = decode(extend, pick, logits, asked.cache, ends, limit, room)
    return out, asked._replace(cache=cache)


def decode(
    extend: Callable[[Array, Array, Any], tuple[Array, Any]],
    pick: Pick,
    logits: Float[Array, "B W"],
    cache: Any,
    ends: tuple[int, ...],
    limit: int | Int[Array, ""],
    room: int,
) -> tuple[Int[Array, "B room"], Any]:
    """The loop: `extend(the last token, how many were said, cache)` gives the logits of the next, `pick` chooses it.
    Returns the tokens and the cache behind them.
    """
    fill = ends[0] if ends else 0

    def going(carry: tuple) -> Bool[Array, ""]:
        said, _, done, _, _ = carry
        return (said < limit) & ~jnp.all(done)

    def step(carry: tuple) -> tuple:
        said, token, done, cache, out = carry
        logits, cache = extend(token, said, cache)
        token = jnp.where(done, fill, pick(logits, said)).astype(jnp.int32)
        out = jax.lax.dynamic_update_slice_in_dim(out, token[:, None], said, axis=1)
        return said + 1, token, done | _ended(token, ends), cache, out

    token = pick(logits, jnp.int32(0)).astype(jnp.int32)
    out = jnp.full((token.shape[0], room), fill, jnp.int32).at[:, 0].set(token)
    start = (jnp.int32(1), token, _ended(token, ends), cache, out)
    *_, cache, out = jax.lax.while_loop(going, step, start)
    return out, cache


def likeliest(logits: Float[Array, "B W"], said: Any) -> Int[Array, " B"]:
    """Greedy decoding."""
    return jnp.argmax(logits, axis=-1)


def sampler(key: Array, temperature: float | Array) -> Pick:
    """Tokens drawn from softmax(logits / temperature); row b and the number of tokens said give each draw its key."""

    def pick(logits: Float[Array, "B W"], said: Any) -> Int[Array, " B"]:
        keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, row), said))(jnp.arange(logits.shape[0]))
        return jax.vmap(jax.random.categorical)(keys, logits / temperature)

    return pick


def _ended(token: Int[Array, " B"], ends: tuple[int, ...]) -> Bool[Array, " B"]:
    return jnp.isin(token, jnp.array(ends, jnp.int32)) if ends else jnp.zeros(token.shape, bool)
