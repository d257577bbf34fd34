"""Layers of compressors: linear, layer norm, two-layer MLP, multi-head attention.

`init_*` returns boxed float32 weights; the layer takes them unboxed and computes in the dtype of its input (statistics
and softmax in float32). `compress.flops` counts their matrix products.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from vlm_jax.compress.contract import (  # noqa: F401
    Count,
    Weights,
)
from vlm_jax.compress.flops import (  # noqa: F401
    attention_flops,
    depthwise_flops,
    linear_flops,
    mlp_flops,
)
from vlm_jax.core.axes import EMBED, HEAD_DIM, MLP, NORM, POSITION, VISION, VISION_HEADS, VISION_MLP
from vlm_jax.ops import initializers as w
from vlm_jax.ops.attention import attend
from vlm_jax.ops.logical_axes import AxisNames, gather_for_compute
from vlm_jax.ops.products import dense

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
    """x @ kernel, plus the bias if there is one."""
    return _biased(weights, dense(x, gather_for_compute(weights["kernel"], names, x.dtype)))


def _biased(weights: Weights, x: Array) -> Array:
    return x + weights["bias"].astype(x.dtype) if "bias" in weights else x


def without_bias(weights: Weights) -> Weights:
    """The same weights without any bias."""
    return {k: without_bias(v) if isinstance(v, dict) else v for k, v in weights.items() if k != "bias"}


def init_norm(width: int) -> Weights:
    return {"scale": w.ones((width,), (NORM,)), "bias": w.zeros((width,), (NORM,))}


def layer_norm(
    weights: Weights, x: Float[Array, "B *rows width"], eps: float = _NORM_EPS
) -> Float[Array, "B *rows width"]:
    """LayerNorm over the last axis, computed in float32."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    unit = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)
    return (unit * weights["scale"] + weights["bias"]).astype(x.dtype)


def init_mlp(key: jax.Array, inputs: int, hidden: int, outputs: int) -> Weights:
    up, down = jax.random.split(key)
    return {"up": init_linear(up, inputs, hidden), "down": init_linear(down, hidden, outputs, OUTWARDS)}


def mlp(weights: Weights, x: Float[Array, "B *rows inputs"]) -> Float[Array, "B *rows outputs"]:
    """Linear, GELU (exact), Linear."""
    return linear(weights["down"], jax.nn.gelu(linear(weights["up"], x), approximate=False), OUTWARDS)


def init_attention(
    key: jax.Array, width: int, heads: int, outputs: int, query_inputs: int = 0, key_inputs: int = 0
) -> Weights:
    """Weights of multi-head attention at `width` with an output projection to `outputs`; queries and keys have that
    width too, or their own."""
    *inward, outward = jax.random.split(key, 4)
    shape = (heads, width // heads)
    inputs = (query_inputs or width, key_inputs or width, key_inputs or width)
    weights = {
        name: {"kernel": w.dense(key, (size, *shape), TO_HEADS), "bias": w.zeros(shape, TO_HEADS[1:])}
        for name, size, key in zip(("query", "key", "value"), inputs, inward, strict=True)
    }
    kernel = w.dense(outward, (*shape, outputs), FROM_HEADS, inputs=2)
    return {**weights, "out": {"kernel": kernel, "bias": w.zeros((outputs,), (NORM,))}}


def attention(
    weights: Weights,
    queries: Float[Array, "B T query_inputs"],
    keys: Float[Array, "B S key_inputs"],
    values: Float[Array, "B S key_inputs"],
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
    out = dense(mixed, gather_for_compute(weights["out"]["kernel"], FROM_HEADS, mixed.dtype), 2)
    return _biased(weights["out"], out)


def _heads(weights: Weights, x: Float[Array, "B S inputs"]) -> Float[Array, "B S N C"]:
    kernel = gather_for_compute(weights["kernel"], TO_HEADS, x.dtype)
    return _biased(weights, dense(x, kernel))


def init_depthwise(key: jax.Array, width: int) -> Weights:
    """A 3 x 3 kernel and a bias for each channel."""
    return {"kernel": w.dense(key, (9, width), (POSITION, VISION)), "bias": w.zeros((width,), (NORM,))}


def depthwise(weights: Weights, x: Float[Array, "B h w E"]) -> Float[Array, "B h w E"]:
    """Depthwise 3 x 3 convolution with zero padding."""
    kernel = weights["kernel"].astype(x.dtype).reshape(3, 3, 1, -1)
    layout = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=layout, feature_group_count=x.shape[-1]
    )
    return _biased(weights, y)


def take(x: Shaped[Array, "B P *rest"], index: Int[Array, "B V"]) -> Shaped[Array, "B V *rest"]:
    """Of each example the elements of its indices."""
    return jax.vmap(lambda one, at: one[at])(x, index)
