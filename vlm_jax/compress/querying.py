"""Compressors whose tokens are learned queries that read all patches.

`resampler`: V learned queries cross-attend to every patch, `spec.depth` pre-norm layers with residuals,

    x <- x + Attention(LN(x), keys = values = LN(y), scores + place)            y = projected patches, x = queries
    x <- x + MLP(LN(x))                                                         where spec.mlp_width > 0

then a last LayerNorm, all at `spec.width`, between a projection from E and one back to E. After the Perceiver resampler
(Flamingo, arXiv 2204.14198) with two differences. The queries are *not* concatenated to the keys, so queries do not see
each other and each token stands alone. And `place` is a learned table, one number for every query, head and patch, that
starts as a bump at a place of its own for every head of every query.

Why the table: a head that reads one patch hands on what that patch shows, a head that reads an average of many does
not. With learned positions added to the keys instead, heads were still averages at the end of a short training, and few
tokens then looked far worse than they are.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vlm_jax.compress import layers
from vlm_jax.compress.layers import Weights
from vlm_jax.core.axes import PATCH, POSITION, QUERIES, VISION, VISION_HEADS
from vlm_jax.core.specs import CompressorSpec, DecoderSpec, EncoderSpec
from vlm_jax.core.structs import Visual
from vlm_jax.ops import grid as g
from vlm_jax.ops.initializers import boxed, table

_BUMP = 0.7  # standard deviation of a head's first attention, in patches
_FAR = 2.0  # scores far away are -_FAR - log P: all of them together a small share, and none without a gradient


def defaults(name: str, encoder: EncoderSpec, decoder: DecoderSpec, tokens: int) -> CompressorSpec:
    """One layer with as many heads as the encoder, of 64 channels as in Flamingo but together no wider than E, and an
    MLP of four times the width: 1024, 16 and 4096 behind So400m and CLIP-L."""
    width = min(64 * encoder.heads, encoder.width)
    return CompressorSpec(
        name, tokens, encoder.grid, encoder.width, 0, decoder.width, width, encoder.heads, 1, 4 * width
    )  # fmt: skip


def init_resampler(key: jax.Array, spec: CompressorSpec) -> Weights:
    inside, queries, outside, *deep = jax.random.split(key, 3 + spec.depth)
    return {
        "project_in": layers.init_linear(inside, spec.encoder_width, spec.width),
        "queries": table(queries, (spec.tokens, spec.width), (POSITION, VISION), stddev=1.0),
        "place": boxed(jnp.asarray(first_places(spec)), (QUERIES, VISION_HEADS, PATCH)),
        **{f"layer{i}": _init_layer(key, spec) for i, key in enumerate(deep)},
        "norm": layers.init_norm(spec.width),
        "project_out": layers.init_linear(outside, spec.width, spec.encoder_width),
    }


def first_places(spec: CompressorSpec) -> Float[np.ndarray, "V N P"]:
    """Scores -d^2 / (2 s^2), with a lower bound, at d patches from the place where a head starts.

    The V queries divide the grid into equal bins (for a V without such bins: they follow the rows), and the N heads of
    a query divide its bin.
    """
    (h, w), v, heads = spec.grid, spec.tokens, spec.heads
    shapes = g.pooling_shapes(spec.grid)
    if v in shapes:
        rows, columns = h / shapes[v][0], w / shapes[v][1]
        middles = _middles(spec.grid, shapes[v])
    else:
        along = (np.arange(v) + 0.5) * h * w / v - 0.5
        rows, columns = 1.0, max(w * h / v, 1.0)
        middles = np.stack([along // w, along % w], axis=1)
    down = min(max(round((heads * rows / columns) ** 0.5), 1), heads)
    around = _middles((1, 1), (down, -(-heads // down)))[:heads] * (rows, columns)
    away = middles[:, None, None] + around[None, :, None] - _middles(spec.grid, spec.grid)[None, None]
    return np.maximum(-np.square(away).sum(-1) / (2 * _BUMP**2), -_FAR - np.log(h * w)).astype(np.float32)


def _middles(grid: g.GridShape, shape: g.GridShape) -> Float[np.ndarray, "V 2"]:
    """Row and column, in patches, of the middle of each of r x c equal bins."""
    rows, columns = ((np.arange(n) + 0.5) * size / n - 0.5 for size, n in zip(grid, shape, strict=True))
    return np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(-1, 2)


def _init_layer(key: jax.Array, spec: CompressorSpec) -> Weights:
    attention, mlp = jax.random.split(key)
    weights = {
        "query_norm": layers.init_norm(spec.width),
        "key_norm": layers.init_norm(spec.width),
        "attention": layers.init_attention(attention, spec.width, spec.heads, spec.width),
    }
    if spec.mlp_width:
        weights["mlp_norm"] = layers.init_norm(spec.width)
        weights["mlp"] = layers.init_mlp(mlp, spec.width, spec.mlp_width, spec.width)
    return weights


def resampler(weights: Weights, visual: Visual, text: Float[Array, "B D"] | None, spec: CompressorSpec) -> Visual:
    """Each of V learned queries reads all real patches (module docstring)."""
    patches = layers.linear(weights["project_in"], visual.tokens)
    x = jnp.broadcast_to(weights["queries"].astype(patches.dtype)[None], (patches.shape[0], spec.tokens, spec.width))
    for i in range(spec.depth):
        layer = weights[f"layer{i}"]
        values = layers.layer_norm(layer["key_norm"], patches)
        queries = layers.layer_norm(layer["query_norm"], x)
        x = x + layers.attention(layer["attention"], queries, values, values, visual.mask, weights["place"])
        if spec.mlp_width:
            x = x + layers.mlp(layer["mlp"], layers.layer_norm(layer["mlp_norm"], x))
    tokens = layers.linear(weights["project_out"], layers.layer_norm(weights["norm"], x))
    mask = None if visual.mask is None else jnp.broadcast_to(visual.mask.any(1, keepdims=True), tokens.shape[:2])
    return Visual(tokens, mask=mask)


def resampler_tokens(grid: g.GridShape) -> tuple[int, ...]:
    return tuple(range(1, grid[0] * grid[1] + 1))


def resampler_flops(spec: CompressorSpec) -> float:
    patches, tokens, width = spec.grid[0] * spec.grid[1], spec.tokens, spec.width
    layer = layers.attention_flops(tokens, patches, tokens * patches, width, width)
    layer += layers.mlp_flops(tokens, width, spec.mlp_width, width)
    ends = layers.linear_flops(patches, spec.encoder_width, width) + layers.linear_flops(
        tokens, width, spec.encoder_width
    )
    return ends + spec.depth * layer
