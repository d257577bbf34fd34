"""Greedy decoding with a static cache: one prefill, then one token a step, all in one program."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from vlm_jax.core.structs import Batch
from vlm_jax.models.vlm import Params, Vlm, last_question
from vlm_jax.ops import masks


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
    first = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    position = visual_tokens + last_question(batch) + 1

    def next_token(carry: tuple, offset: Array) -> tuple[tuple, Array]:
        token, done, cache = carry
        done = done | (token == end)
        logits, cache = model.extend(params, token, position + offset, cache)
        following = jnp.where(done, end, jnp.argmax(logits, axis=-1)).astype(jnp.int32)
        return (following, done, cache), following

    start = (first, jnp.zeros(first.shape, bool), cache)
    _, rest = jax.lax.scan(next_token, start, jnp.arange(max_new_tokens - 1, dtype=position.dtype))
    return jnp.concatenate([first[:, None], rest.T], axis=1)
