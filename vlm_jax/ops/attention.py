"""Scaled dot-product attention, for every encoder, compressor and decoder.

    out[b,t,n] = sum_s p[b,n,t,s] v[b,s,j]
    p[b,n,t]   = softmax_s(cap(scale * q[b,t,n] . k[b,s,j]) + bias[b,n,t,s])          j = n // (N / K)

The softmax is float32 for all input dtypes. A fully masked query gives zeros, and no gradient passes through it.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vlm_jax.ops import splash


def attend(
    q: Float[Array, "B T N C"],
    k: Float[Array, "B S K C"],
    v: Float[Array, "B S K C"],
    mask: Bool[Array, "#B #N T S"] | splash.Causal | None,
    scale: float | None = None,
    softcap: float | None = None,
    implementation: str = "xla",
    bias: Float[Array, "#B #N T S"] | None = None,
) -> Float[Array, "B T N C"]:
    """Attention of T queries to S keys; N query heads share K key heads in groups of N / K.

    mask: True where query t attends to key s; None: everywhere. `splash.Causal` may use the fused kernel.
    scale: factor of the scores; None is C ** -0.5.
    softcap: scores become softcap * tanh(score / softcap) before the mask (Gemma 2, arXiv 2408.00118, section 2); never
        cuDNN, which does not support it.
    implementation: "xla", "cudnn" (fused, NVIDIA GPUs, 16-bit inputs) or "splash" (fused, TPUs, `Causal` masks; "xla"
        for others). cuDNN reads the mask from memory, one of [B, 1, T, S] for all heads and layers: in
        `jax.nn.dot_product_attention` a row has one length and no segments. The offsets of packed rows that cuDNN
        knows are in a private module of JAX (0.10.2), which multiplies those of the keys by the query heads too: wrong
        where K < N. They also need a Hopper GPU, a fixed maximum M of conversations in a row, and softmax statistics
        of [B M, N, T].
    bias: added to the scaled scores; not together with a softcap.
    """
    if bias is not None and softcap is not None:
        raise ValueError("attend: a bias and a softcap together are not supported")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if isinstance(mask, splash.Causal):
        if implementation == "splash" and bias is None and splash.applies(q.shape[1], q.shape[2], k.shape[2]):
            return splash.attend(q, k, v, mask, scale, softcap)
        mask = mask.dense()
    implementation = "xla" if implementation == "splash" else implementation
    if softcap is not None:
        return attend_by_head(q, by_head(k), by_head(v), mask, scale, softcap)
    out = jax.nn.dot_product_attention(  # type: ignore[call-overload]
        q, k, v, bias=bias, mask=mask, scale=scale, implementation=implementation
    )
    return _zero_masked(out, mask)


def by_head(x: Float[Array, "B S K C"]) -> Float[Array, "*rows S C"]:
    """Keys or values head by head, as a cache holds them: `rows` are B and K, each left out where it is 1.

    XLA's CPU compiler drops axes of size 1 from a product, but not from the state of a loop, and then copies whole
    arrays of a cache for every token; with positions before heads it transposes them.
    """
    batch, length, heads, channels = x.shape
    return jnp.swapaxes(x, 1, 2).reshape(*_rows(batch, heads), length, channels)


def attend_by_head(
    q: Float[Array, "B T N C"],
    k: Float[Array, "*rows S C"],
    v: Float[Array, "*rows S C"],
    mask: Bool[Array, "#B #N T S"] | None,
    scale: float | None = None,
    softcap: float | None = None,
    implementation: str = "xla",
) -> Float[Array, "B T N C"]:
    """`attend` with keys and values of `by_head`, without a bias. One query is never attended by cuDNN, which needs the
    other layout of keys."""
    (batch, length, heads, channels), slots = q.shape, k.shape[-2]
    kv_heads = math.prod(k.shape[:-2]) // batch
    if implementation == "cudnn" and softcap is None and length > 1:
        k, v = (jnp.swapaxes(x.reshape(batch, kv_heads, slots, channels), 1, 2) for x in (k, v))
        return attend(q, k, v, mask, scale, implementation=implementation)
    rows, groups = k.shape[:-2], heads // kv_heads
    axes = tuple(range(len(rows)))
    grouped = jnp.transpose(q.reshape(batch, length, kv_heads, groups, channels), (0, 2, 3, 1, 4))
    grouped = grouped.reshape(*rows, groups, length, channels)
    contracted = ((grouped.ndim - 1,), (k.ndim - 1,))
    scores = jax.lax.dot_general(grouped, k, (contracted, (axes, axes)), preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, kv_heads, groups, length, slots) * (channels**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if mask is not None:
        by_group = mask[:, :, None]
        if mask.shape[1] > 1:
            by_group = mask.reshape(mask.shape[0], kv_heads, groups, length, slots)
        # Finite, so that a fully masked query is no nan; `_zero_masked` zeroes it.
        scores = jnp.where(by_group, scores, jnp.finfo(jnp.float32).min / 2)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(*rows, groups, length, slots)
    out = jax.lax.dot_general(weights, v, (((weights.ndim - 1,), (v.ndim - 2,)), (axes, axes)))
    out = jnp.transpose(out.reshape(batch, kv_heads, groups, length, channels), (0, 3, 1, 2, 4))
    return _zero_masked(out.reshape(q.shape), mask)


def _rows(batch: int, heads: int) -> tuple[int, ...]:
    return tuple(size for size in (batch, heads) if size > 1)


def _zero_masked(out: Float[Array, "B T N C"], mask: Bool[Array, "#B #N T S"] | None) -> Float[Array, "B T N C"]:
    """Zeros for queries without a key."""
    if mask is None:
        return out
    has_key = jnp.swapaxes(mask.any(-1), 1, 2)[..., None]
    return jnp.where(has_key, out, 0)
