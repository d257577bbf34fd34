"""Compressors with 3 x 3 convolutions on the patch grid.

`ldpv2` (MobileVLM V2, arXiv 2402.03766): all P tokens are projected, averaged to r x c, and

    token = y + DepthwiseConv3x3(y)

`c_abstractor` (Honeybee, arXiv 2312.06742): x = tokens + positions; `spec.depth` blocks E -> width H on the patch grid,
adaptive average pooling to n x n, `spec.depth` blocks more; the projector has a SiLU between two layers. A block is

    y = SiLU(LN(Conv1x1(x)));  y = SiLU(LN(DepthwiseConv3x3(y)))
    y = y sigmoid(Linear(SiLU(Linear(mean of y over the grid))))         first to a quarter of the inputs of the block
    x = SiLU(LN(Conv1x1(y)) + x)                                              LN(Conv1x1(x)) where the width changes

Its tokens are those of the encoder's last block but one here, as for every row; the published ones are of the last.
Masked cells are zero before each 3 x 3 and left out of each mean.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vlm_jax.compress import layers, published_init
from vlm_jax.compress.layers import Weights
from vlm_jax.compress.sizes.convolving import (  # noqa: F401
    abstractor_cost,
    abstractor_defaults,
    ldpv2_cost,
)
from vlm_jax.core.axes import POSITION, VISION
from vlm_jax.core.specs import CompressorSpec
from vlm_jax.core.structs import Evidence, Prefix
from vlm_jax.ops import grid as g
from vlm_jax.ops.initializers import table

_EPS = 1e-5


def init_ldpv2(key: jax.Array, spec: CompressorSpec) -> Weights:
    weights = {"conv": layers.init_depthwise(key, spec.text_width)}
    return published_init.draw(weights, key, published_init.torch_default)


def ldpv2(weights: Weights, evidence: Evidence, spec: CompressorSpec) -> Prefix:
    """Tokens [B, V, D]."""
    (h, w), shape = spec.grid, g.pooling_shapes(spec.grid)[spec.tokens]
    y, mask = g.weighted_mean(
        evidence.project(evidence.tokens), evidence.mask, g.bins(h, shape[0]), g.bins(w, shape[1])
    )
    return Prefix(y + g.to_rows(layers.depthwise(weights["conv"], g.to_grid(y, shape))), mask)


def init_abstractor(key: jax.Array, spec: CompressorSpec) -> Weights:
    positions, fine, coarse, values = jax.random.split(key, 4)
    weights = {
        "positions": table(positions, (spec.grid[0] * spec.grid[1], spec.encoder_width), (POSITION, VISION)),
        "fine": _init_stage(fine, spec.encoder_width, spec),
        "coarse": _init_stage(coarse, spec.width, spec),
    }
    return published_init.draw(weights, values, published_init.normal)


def _init_stage(key: jax.Array, inputs: int, spec: CompressorSpec) -> Weights:
    keys = jax.random.split(key, spec.depth)
    return {f"block{i}": _init_block(key, inputs if i == 0 else spec.width, spec.width) for i, key in enumerate(keys)}


def _init_block(key: jax.Array, inputs: int, width: int) -> Weights:
    first, conv, squeeze, excite, last, shortcut = jax.random.split(key, 6)
    inner = round(inputs / 4)

    def convolution(key: jax.Array, inputs: int) -> Weights:
        linear = layers.without_bias(layers.init_linear(key, inputs, width))
        return {"linear": linear, "norm": layers.init_norm(width)}

    weights = {
        "first": convolution(first, inputs),
        "conv": layers.without_bias(layers.init_depthwise(conv, width)),
        "conv_norm": layers.init_norm(width),
        "squeeze": layers.init_linear(squeeze, width, inner),
        "excite": layers.init_linear(excite, inner, width, layers.OUTWARDS),
        "last": convolution(last, width),
    }
    return weights if inputs == width else {**weights, "shortcut": convolution(shortcut, inputs)}


def abstractor(weights: Weights, evidence: Evidence, spec: CompressorSpec) -> Prefix:
    """Tokens [B, V, H]."""
    (h, w), n, mask = spec.grid, round(spec.tokens**0.5), evidence.mask
    x = evidence.tokens + weights["positions"].astype(evidence.tokens.dtype)
    for i in range(spec.depth):
        x = _block(weights["fine"][f"block{i}"], x, mask, spec.grid)
    x, mask = g.weighted_mean(x, mask, g.bins(h, n), g.bins(w, n))
    for i in range(spec.depth):
        x = _block(weights["coarse"][f"block{i}"], x, mask, (n, n))
    return Prefix(x, mask)


def _block(
    weights: Weights, x: Float[Array, "B P inputs"], mask: Bool[Array, "B P"] | None, grid: g.GridShape
) -> Float[Array, "B P H"]:
    def convolved(part: Weights, x: Array) -> Array:
        return layers.layer_norm(part["norm"], layers.linear(part["linear"], x), _EPS)

    y = jax.nn.silu(convolved(weights["first"], x))
    y = y if mask is None else jnp.where(mask[..., None], y, 0)
    y = g.to_rows(layers.depthwise(weights["conv"], g.to_grid(y, grid)))
    y = jax.nn.silu(layers.layer_norm(weights["conv_norm"], y, _EPS))
    wide = y.astype(jnp.float32)
    if mask is None:
        mean = wide.mean(1)
    else:
        count = jnp.maximum(mask.sum(1, keepdims=True), 1)
        mean = jnp.where(mask[..., None], wide, 0).sum(1) / count
    inner = jax.nn.silu(layers.linear(weights["squeeze"], mean.astype(y.dtype)))
    y = y * jax.nn.sigmoid(layers.linear(weights["excite"], inner, layers.OUTWARDS))[:, None]
    shortcut = convolved(weights["shortcut"], x) if "shortcut" in weights else x
    return jax.nn.silu(convolved(weights["last"], y) + shortcut)
