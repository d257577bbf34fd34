"""Who sees whom. One rule covers causal and prefix masks, packed questions, padding, the cache and sliding windows.

Token i sees token j iff  segment_j != 0  and  order_j <= order_i  and (same segment, or either is the image (-1)).

Two questions (a b -> c, d -> e) packed behind an image of two tokens, causal; rows see columns:

    segment     -1 -1  1 1 1  2 2  0
    order        0  1  2 3 4  2 3  0
                 I  I  a b c  d e  .
             I   x
             I   x  x
             a   x  x  x
             b   x  x  x x
             c   x  x  x x x
             d   x  x         x
             e   x  x         x x
             .

With a two-way prefix the image and the question have order 0, so that they see each other both ways.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool

from vlm_jax.core.structs import Slots

IMAGE, PADDING = -1, 0


def sees(query: Slots, key: Slots, window: int | None = None) -> Bool[Array, "B 1 L S"]:
    """The attention mask between two runs of slots; `window` also hides keys that many positions back, or more, but not
    within a two-way prefix (PaliGemma 2 has prefixes longer than Gemma 2's window).
    """
    i, j = query.segment[:, :, None], key.segment[:, None, :]
    visible = (j != PADDING) & (i != PADDING) & ((i == j) | (i == IMAGE) | (j == IMAGE))
    visible &= key.order[:, None, :] <= query.order[:, :, None]
    if window is not None:
        near = query.position[:, :, None] - key.position[:, None, :] < window
        visible &= near | (key.order[:, None, :] == query.order[:, :, None])
    return visible[:, None]


def image_and_text(visual_tokens: int, segment: Array, position: Array, question: Array, mask: str) -> Slots:
    """Slots of the sequence [image, text]: text positions go on from the image's.

    Args:
        visual_tokens: V.
        segment, position, question: [B, T], as in `Batch`.
        mask: "causal" or "prefix".
    """
    batch = segment.shape[0]
    image = jnp.broadcast_to(jnp.arange(visual_tokens, dtype=position.dtype), (batch, visual_tokens))
    positions = jnp.concatenate([image, visual_tokens + position], axis=1)
    segments = jnp.concatenate([jnp.full_like(image, IMAGE), segment], axis=1)
    order = positions
    if mask == "prefix":
        prefix = jnp.concatenate([jnp.ones_like(image, dtype=bool), question], axis=1)
        order = jnp.where(prefix, 0, positions)
    return Slots(positions, order, segments)


def concatenate(a: Slots, b: Slots) -> Slots:
    """The slots of `a`, then those of `b`."""
    return Slots(*(jnp.concatenate(pair, axis=1) for pair in zip(a, b, strict=True)))
