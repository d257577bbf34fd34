"""Layers of compressors: linear, layer norm, two-layer MLP, multi-head attention.

`init_*` returns boxed float32 weights; the layer takes them unboxed and computes in the dtype of its input (statistics
and softmax in float32); `*_flops` counts its matrix products, a multiply-add as two, and nothing else.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vlm_jax.core.axes import EMBED, HEAD_DIM, MLP, NORM, VISION, VISION_HEADS, VISION_MLP
from vlm_jax.ops import initializers as w
from vlm_jax.ops.attention import attend
from vlm_jax.ops.logical_axes import AxisNames, gather_for_compute

Weights = dict[str, Any]  # nested, arrays at the leaves

# Axis names of kernels.
INWARDS: AxisNames = (VISION, VISION_MLP)
OUTWARDS: AxisNames = (VISION_MLP, VISION)
TO_HEADS: AxisNames = (VISION, VISION_HEADS, HEAD_DIM)
FROM_HEADS: AxisNames = (VISION_HEADS, HEAD_DIM, VISION)
OF_TEXT: AxisNames = (EMBED, MLP)  # decoder width to encoder width

_NORM_EPS = 1e-6


def init_linear(key: jax.Array, inputs: int, outputs: int, names: AxisNames = INWARDS) -> Weights:
    return {"kernel": w.dense(key, (inputs, outputs), names), "bias": w.zeros((outputs,), (NORM,))}


def linear(
    weights: Weights, x: Float[Array, "B *rows inputs"], names: AxisNames = INWARDS
) -> Float[Array, "B *rows outputs"]:
    return x @ gather_for_compute(weights["kernel"], names, x.dtype) + weights["bias"].astype(x.dtype)


def linear_flops(rows: int, inputs: int, outputs: int) -> float:
    return 2.0 * rows * inputs * outputs


def init_norm(width: int) -> Weights:
    return {"scale": w.ones((width,), (NORM,)), "bias": w.zeros((width,), (NORM,))}


def layer_norm(weights: Weights, x: Float[Array, "B *rows width"]) -> Float[Array, "B *rows width"]:
    """LayerNorm over the last axis, computed in float32."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    unit = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + _NORM_EPS)
    return (unit * weights["scale"] + weights["bias"]).astype(x.dtype)


def init_mlp(key: jax.Array, inputs: int, hidden: int, outputs: int) -> Weights:
    up, down = jax.random.split(key)
    return {"up": init_linear(up, inputs, hidden), "down": init_linear(down, hidden, outputs, OUTWARDS)}


def mlp(weights: Weights, x: Float[Array, "B *rows inputs"]) -> Float[Array, "B *rows outputs"]:
    """Linear, GELU (exact), Linear."""
    return linear(weights["down"], jax.nn.gelu(linear(weights["up"], x), approximate=False), OUTWARDS)


def mlp_flops(rows: int, inputs: int, hidden: int, outputs: int) -> float:
    return linear_flops(rows, inputs, hidden) + linear_flops(rows, hidden, outputs)


def init_attention(key: jax.Array, width: int, heads: int, outputs: int) -> Weights:
    """Weights of multi-head attention at `width` with an output projection to `outputs`."""
    *inward, outward = jax.random.split(key, 4)
    shape = (heads, width // heads)
    weights = {
        name: {"kernel": w.dense(key, (width, *shape), TO_HEADS), "bias": w.zeros(shape, TO_HEADS[1:])}
        for name, key in zip(("query", "key", "value"), inward, strict=True)
    }
    kernel = w.dense(outward, (*shape, outputs), FROM_HEADS, inputs=2)
    return {**weights, "out": {"kernel": kernel, "bias": w.zeros((outputs,), (NORM,))}}


def attention(
    weights: Weights,
    queries: Float[Array, "B T width"],
    keys: Float[Array, "B S width"],
    values: Float[Array, "B S width"],
    mask: Bool[Array, "B S"] | None,
    bias: Float[Array, "T N S"] | None = None,
) -> Float[Array, "B T outputs"]:
    """Multi-head cross-attention with input and output projections.

    mask: True where a key is valid. A query without valid keys gives the bias of the output projection.
    bias: added to the scores of query t, head n and key s.
    """
    q, k, v = (_heads(weights[name], x) for name, x in (("query", queries), ("key", keys), ("value", values)))
    if mask is not None:
        mask = jnp.broadcast_to(mask[:, None, None, :], (mask.shape[0], 1, q.shape[1], mask.shape[1]))
    if bias is not None:
        bias = jnp.swapaxes(bias, 0, 1)[None].astype(queries.dtype)
    mixed = attend(q, k, v, mask, bias=bias)
    out = jnp.einsum("btnc,nce->bte", mixed, gather_for_compute(weights["out"]["kernel"], FROM_HEADS, mixed.dtype))
    return out + weights["out"]["bias"].astype(mixed.dtype)


def attention_flops(queries: int, keys: int, pairs: int, width: int, outputs: int) -> float:
    """`pairs` is the number of scored (query, key) pairs: queries * keys, or fewer for local attention."""
    project_in = linear_flops(queries, width, width) + 2 * linear_flops(keys, width, width)
    return project_in + 2 * linear_flops(pairs, width, 1) + linear_flops(queries, width, outputs)


def _heads(weights: Weights, x: Float[Array, "B S width"]) -> Float[Array, "B S N C"]:
    kernel = gather_for_compute(weights["kernel"], TO_HEADS, x.dtype)
    return jnp.einsum("bse,enc->bsnc", x, kernel) + weights["bias"].astype(x.dtype)
