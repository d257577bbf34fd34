"""Attention masks. One rule covers causal and prefix masks, packed conversations, padding, the cache and windows:

Token i attends to token j iff  order_j <= order_i,  segment_i != 0,  and  segment_j is segment_i or SHARED (-1), or
segment_j is HIDDEN (-2) and segment_i is SHARED.

Two packed conversations, each with an image I of one token, then padding; rows attend to columns. The first is causal:
order is position. The second has a bidirectional prefix of order 0, the image and the question d:

    segment      1 1 1 1  2 2 2 2  0
    position     0 1 2 3  0 1 2 3  0
    order        0 1 2 3  0 0 2 3  0
                 I a b c  I d e f  .
             I   x
             a   x x
             b   x x x
             c   x x x x
             I            x x
             d            x x
             e            x x x
             f            x x x x
             .

Two questions that share an image of two tokens:

    segment     -1 -1  1 1  2 2  0
    position     0  1  2 3  2 3  0
    order        0  1  2 3  2 3  0
                 I  I  a b  c d  .
             I   x
             I   x  x
             a   x  x  x
             b   x  x  x x
             c   x  x       x
             d   x  x       x x
             .
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool

from vlm_jax.core.segments import HIDDEN, SHARED
from vlm_jax.core.structs import AttentionMetadata


def attention_mask(
    query: AttentionMetadata, key: AttentionMetadata, window: int | None = None
) -> Bool[Array, "B 1 L S"]:
    """The mask of L queries and S keys, True where a query attends to a key.

    window: also masks keys at that distance or more, except within a bidirectional prefix (PaliGemma 2).
    """
    i, j = query.segment[:, :, None], key.segment[:, None, :]
    visible = (i != 0) & ((i == j) | (j == SHARED) | ((j == HIDDEN) & (i == SHARED)))
    visible &= key.order[:, None, :] <= query.order[:, :, None]
    if window is not None:
        near = query.position[:, :, None] - key.position[:, None, :] < window
        visible &= near | (key.order[:, None, :] == query.order[:, :, None])
    return visible[:, None]


def drop_masked(metadata: AttentionMetadata, valid: Bool[Array, "B L"]) -> AttentionMetadata:
    """Metadata where invalid tokens are padding and positions count valid tokens only.

    valid      1 1 0 1 1 | 1 0 1
    segment    1 1 1 1 1 | 2 2 2   ->   1 1 0 1 1 | 2 0 2
    position   0 1 2 3 4 | 0 1 2   ->   0 1 . 2 3 | 0 . 1
    """
    by_position = metadata._replace(order=metadata.position)
    dropped = attention_mask(by_position, by_position)[:, 0] & ~valid[:, None, :]
    position = metadata.position - jnp.sum(dropped, axis=-1, dtype=metadata.position.dtype)
    order = jnp.where(metadata.order == metadata.position, position, metadata.order)
    return AttentionMetadata(jnp.where(valid, metadata.segment, 0), position, order)
