"""Attention with each key head's queries as one matrix: the quickest way without a fused kernel, on CPUs.

What `ops.attention.attend` computes, from keys and values that are kept head by head: every product is then a plain
product of matrices that lie in one piece, where the usual layout makes XLA copy all keys and values first. A cache in
this layout is extended in place.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vlm_jax.core.axes import BATCH
from vlm_jax.ops.placement import parts


def attend(
    q: Float[Array, "B T N C"],
    k: Float[Array, "B K S C"],
    v: Float[Array, "B K S C"],
    mask: Bool[Array, "B 1 T S"],
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "B T N C"]:
    """See `ops.attention.attend`; a query that may see no key reads zeros here too.

    A long text goes row by row where rows are not split over devices: the scores of one row stay in the cache.
    """
    if q.shape[1] == 1 or parts(BATCH) > 1:
        return _attend(q, k, v, mask, scale, softcap)

    def one(row: tuple[Array, ...]) -> Array:
        return _attend(*(x[None] for x in row), scale, softcap)[0]

    return jax.lax.map(one, (q, k, v, mask))


def _attend(q: Array, k: Array, v: Array, mask: Array, scale: float | None, softcap: float | None) -> Array:
    batch, length, heads, channels = q.shape
    groups = k.shape[1]
    shared = heads // groups
    rows = (q * (channels**-0.5 if scale is None else scale)).reshape(batch, length, groups, shared, channels)
    rows = rows.transpose(0, 2, 1, 3, 4).reshape(batch, groups, length * shared, channels)
    pairs = ((0, 1), (0, 1))
    scores = jax.lax.dot_general(rows, k, (((3,), (3,)), pairs), preferred_element_type=jnp.float32)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    seen = jnp.repeat(mask, shared, axis=2)
    scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min / 2)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jax.lax.dot_general(weights.astype(v.dtype), v, (((3,), (2,)), pairs), preferred_element_type=jnp.float32)
    out = jnp.where(jnp.any(seen, axis=-1, keepdims=True), out / total, 0)
    out = out.reshape(batch, groups, length, shared, channels)
    return out.transpose(0, 2, 1, 3, 4).reshape(q.shape).astype(q.dtype)
