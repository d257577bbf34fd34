"""Scaled dot-product attention, for every encoder, compressor and decoder.

    out[b,t,n] = sum_s p[b,n,t,s] v[b,s,j]
    p[b,n,t]   = softmax_s(cap(scale * q[b,t,n] . k[b,s,j]) + bias[b,n,t,s])          j = n // (N / K)

The softmax is float32 for all input dtypes. A fully masked query gives zeros, and no gradient passes through it.
"""

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
    if softcap is None:
        out = jax.nn.dot_product_attention(  # type: ignore[call-overload]
            q, k, v, bias=bias, mask=mask, scale=scale, implementation=implementation
        )
    else:
        out = _softcapped(q, k, v, mask, scale, softcap)
    if mask is None:
        return out
    has_key = jnp.swapaxes(mask.any(-1), 1, 2)[..., None]
    return jnp.where(has_key, out, 0)


def _softcapped(
    q: Float[Array, "B T N C"],
    k: Float[Array, "B S K C"],
    v: Float[Array, "B S K C"],
    mask: Bool[Array, "#B #N T S"] | None,
    scale: float,
    softcap: float,
) -> Float[Array, "B T N C"]:
    batch, length, heads, channels = q.shape
    grouped = q.reshape(batch, length, k.shape[2], -1, channels)
    scores = scale * jnp.einsum("btkgc,bskc->bkgts", grouped, k, preferred_element_type=jnp.float32)
    scores = softcap * jnp.tanh(scores / softcap)
    if mask is not None:
        every_head = jnp.broadcast_to(mask, (mask.shape[0], heads, *mask.shape[2:]))
        by_group = every_head.reshape(mask.shape[0], *scores.shape[1:])
        # Finite, so that a fully masked query is no nan; `attend` zeroes it.
        scores = jnp.where(by_group, scores, jnp.finfo(jnp.float32).min / 2)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskc->btkgc", weights, v).reshape(q.shape)
