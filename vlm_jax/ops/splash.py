"""Splash attention: JAX's fused Pallas kernel for TPUs, for rows that are causal within each segment (no prefixes).

It is used where the mesh of the program has TPUs, also ahead of time. That is known when the program is traced: a
`jax.lax.platform_dependent` would keep for the backward pass what either branch needs, scores of [L, L] among them.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.core.axes import ACT_HEADS, BATCH
from vlm_jax.ops import logical_axes

LANES = 128  # a TPU tile: lengths and channels are multiples of it
_BLOCK = 512  # queries and keys of a block


class Causal(NamedTuple):
    """A causal mask by index within each segment: `masks.attention_mask` where order increases along the row."""

    segment: Int[Array, "B L"]  # 0 is padding, as in `AttentionMetadata`

    def dense(self) -> Bool[Array, "B 1 L L"]:
        """The boolean mask of `attention.attend`."""
        index = jnp.arange(self.segment.shape[1])
        same = self.segment[:, :, None] == self.segment[:, None, :]
        return (same & (self.segment[:, None, :] != 0) & (index[None, :] <= index[:, None]))[:, None]


def applies(length: int, heads: int, kv_heads: int) -> bool:
    """Whether the program is for TPUs, and the kernel supports this row length and these heads under its rules."""
    shards = logical_axes.axis_size(ACT_HEADS)
    fits = length % LANES == 0 and heads % shards == 0 and kv_heads % shards == 0
    return fits and logical_axes.platform() == "tpu"


def attend(
    q: Float[Array, "B L N C"],
    k: Float[Array, "B L K C"],
    v: Float[Array, "B L K C"],
    mask: Causal,
    scale: float,
    softcap: float | None,
) -> Float[Array, "B L N C"]:
    """As `ops.attention.attend`, where `applies`."""
    heads, row = (BATCH, None, ACT_HEADS, None), (BATCH, None)
    kernel = functools.partial(_on_tpu, scale=scale, softcap=softcap)
    return logical_axes.on_each_device(kernel, (heads, heads, heads, row), heads)(q, k, v, mask.segment)


def _on_tpu(
    q: Float[Array, "B L N C"],
    k: Float[Array, "B L K C"],
    v: Float[Array, "B L K C"],
    segment: Int[Array, "B L"],
    *,
    scale: float,
    softcap: float | None,
    interpret: Any = False,
) -> Float[Array, "B L N C"]:
    """The kernel on one device's rows and heads; outputs of padding are zeroed."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, heads, channels = q.shape[1:]
    block = next(size for size in (_BLOCK, 256, LANES) if length % size == 0)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, use_fused_bwd_kernel=True,
    )  # fmt: skip
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((length, length))] * heads), block_sizes=sizes, head_shards=1,
        q_seq_shards=1, attn_logits_soft_cap=softcap, interpret=interpret,
    )  # fmt: skip

    def one(q: Array, k: Array, v: Array, segment: Int[Array, " L"]) -> Array:
        return kernel(q, k, v, segment_ids=splash.SegmentIds(segment, segment))

    pad = ((0, 0), (0, 0), (0, 0), (0, -channels % LANES))
    q, k, v = (jnp.pad(x, pad).swapaxes(1, 2) for x in (q * jnp.asarray(scale, q.dtype), k, v))
    out = jax.vmap(one)(q, k, v, segment.astype(jnp.int32)).swapaxes(1, 2)[..., :channels]
    return jnp.where((segment != 0)[:, :, None, None], out, 0)
