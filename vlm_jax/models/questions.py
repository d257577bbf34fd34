"""Where a view's question stands in its row, for compressors that replace its embeddings."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def merge_questions(
    x: Float[Array, "B L D"], fused: Float[Array, "B M Q D"], index: Int[Array, "B M Q"]
) -> Float[Array, "B L D"]:
    """Rows with the fused states of questions at their places; -1 has none."""
    length = x.shape[1]
    index = jnp.where(index < 0, length, index).reshape(len(x), -1)
    fused = fused.reshape(len(x), -1, x.shape[2]).astype(x.dtype)
    return jax.vmap(lambda row, at, new: row.at[at].set(new, mode="drop"))(x, index, fused)


def question_index(
    tokens: Int[Array, "B L"],
    visual: Int[Array, "B L"],
    segment: Int[Array, "B L"],
    question: Int[Array, "B M Q"],
    entering: int,
) -> Int[Array, "B M Q"]:
    """Index in the row of each token of a view's bare question; -1 for padding, for the begin token, and where the
    conversation does not contain it. Of three words or more the first may differ there, since its token can depend on
    what precedes it.

    row        bos  I  read  row  two  4  7          question    bos  read  row  two   .
                                                     index        -1     2    3    4  -1
    """  # fmt: skip
    batch, views, length = *question.shape[:2], tokens.shape[1]
    number = jnp.arange(length)
    is_view = jnp.where(visual >= 0, visual // entering, -1)[:, None] == jnp.arange(views)[:, None]
    own = jnp.max(jnp.where(is_view, segment[:, None], 0), axis=-1)[..., None]
    count = (question >= 0).sum(-1)
    skipped = jnp.where(count > 3, 2, 1)

    def compare(j: Int[Array, ""], matches: Bool[Array, "B M L"]) -> Bool[Array, "B M L"]:
        expected = question[:, :, j, None]
        same = (jnp.roll(tokens, -j, axis=1)[:, None] == expected) | (j < skipped)[..., None]
        inside = (number + j < length) & (jnp.roll(segment, -j, axis=1)[:, None] == own)
        return matches & ((expected < 0) | (same & inside))

    matches = jnp.broadcast_to((own > 0) & (count > 1)[..., None], (batch, views, length))
    matches = jax.lax.fori_loop(1, question.shape[2], compare, matches)
    index = jnp.argmax(matches, axis=-1)[..., None] + jnp.arange(question.shape[2])
    is_text = (jnp.arange(question.shape[2]) > 0) & (question >= 0)
    return jnp.where(is_text & matches.any(-1)[..., None], index, -1)
