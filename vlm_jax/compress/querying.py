"""`resampler`: V learned queries cross-attend to all patches in `spec.depth` pre-norm layers,

    x <- x + Attention(LN(x), keys = values = LN(y), bias)            y = projected patches, x = queries
    x <- x + MLP(LN(x))                                               if spec.mlp_width > 0

then a last LayerNorm, all at `spec.width`, between a projection from E and one back to E.

The Perceiver resampler (Flamingo, arXiv 2204.14198) with two differences: queries are not concatenated to the keys, so
they do not attend to each other; and the scores have a learned bias [V, N, P], initialised as one Gaussian bump for
each head of each query. With position embeddings on the keys instead, heads still average over many patches after a
short training, which makes small V look worse than it is.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from vlm_jax.compress import layers
from vlm_jax.compress.contract import most_tokens
from vlm_jax.compress.layers import Weights
from vlm_jax.compress.sizes.querying import (  # noqa: F401
    defaults,
    resampler_cost,
    resampler_tokens,
)
from vlm_jax.core.axes import PATCH, POSITION, QUERIES, VISION, VISION_HEADS
from vlm_jax.core.specs import CompressorSpec
from vlm_jax.core.structs import Evidence, Prefix
from vlm_jax.ops import grid as g
from vlm_jax.ops.initializers import boxed, table

_BUMP = 0.7  # standard deviation of a head's initial attention, in patches
_FAR = 2.0  # scores are at least -_FAR - log P: far patches get little attention in total, but a gradient


def init_resampler(key: jax.Array, spec: CompressorSpec) -> Weights:
    inside, queries, outside, *deep = jax.random.split(key, 3 + spec.depth)
    return {
        "project_in": layers.init_linear(inside, spec.encoder_width, spec.width),
        "queries": table(queries, (most_tokens(spec), spec.width), (POSITION, VISION), stddev=1.0),
        "place": boxed(jnp.asarray(initial_bias(spec)), (QUERIES, VISION_HEADS, PATCH)),
        **{f"layer{i}": _init_layer(key, spec) for i, key in enumerate(deep)},
        "norm": layers.init_norm(spec.width),
        "project_out": layers.init_linear(outside, spec.width, spec.encoder_width),
    }


def initial_bias(spec: CompressorSpec) -> Float[np.ndarray, "V N P"]:
    """Scores -d^2 / (2 s^2), bounded below, at d patches from the centre of a head.

    The V queries divide the grid into equal bins (or, for a V without such bins, follow the rows), and the N heads of a
    query divide its bin. Of an elastic compressor the queries are ordered from coarse to fine: each starts as it would
    in the smallest V that has it.
    """
    if not spec.elastic:
        return _bias_of(spec, spec.tokens)
    fewer = (0, *spec.elastic)
    return np.concatenate([_bias_of(spec, v)[start:] for start, v in zip(fewer, spec.elastic, strict=False)])


def _bias_of(spec: CompressorSpec, v: int) -> Float[np.ndarray, "V N P"]:
    (h, w), heads = spec.grid, spec.heads
    shapes = g.pooling_shapes(spec.grid)
    if v in shapes:
        rows, columns = h / shapes[v][0], w / shapes[v][1]
        query_centres = _centres(spec.grid, shapes[v])
    else:
        along = (np.arange(v) + 0.5) * h * w / v - 0.5
        rows, columns = 1.0, max(w * h / v, 1.0)
        query_centres = np.stack([along // w, along % w], axis=1)
    down = min(max(round((heads * rows / columns) ** 0.5), 1), heads)
    head_offsets = _centres((1, 1), (down, -(-heads // down)))[:heads] * (rows, columns)
    distance = query_centres[:, None, None] + head_offsets[None, :, None] - _centres(spec.grid, spec.grid)[None, None]
    return np.maximum(-np.square(distance).sum(-1) / (2 * _BUMP**2), -_FAR - np.log(h * w)).astype(np.float32)


def _centres(grid: g.GridShape, shape: g.GridShape) -> Float[np.ndarray, "V 2"]:
    """Row and column, in patches, of the centre of each of r x c equal bins."""
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


def resampler(weights: Weights, evidence: Evidence, spec: CompressorSpec) -> Prefix:
    """Tokens [B, V, E] of learned queries that attend to all valid patches (module docstring)."""
    patches = layers.linear(weights["project_in"], evidence.tokens)
    queries, place = (weights[name][: spec.tokens] for name in ("queries", "place"))
    queries = queries.astype(patches.dtype)
    x = jnp.broadcast_to(queries[None], (patches.shape[0], spec.tokens, spec.width))
    for i in range(spec.depth):
        layer = weights[f"layer{i}"]
        values = layers.layer_norm(layer["key_norm"], patches)
        normed = layers.layer_norm(layer["query_norm"], x)
        x = x + layers.attention(layer["attention"], normed, values, values, evidence.mask, place)
        if spec.mlp_width:
            x = x + layers.mlp(layer["mlp"], layers.layer_norm(layer["mlp_norm"], x))
    tokens = layers.linear(weights["project_out"], layers.layer_norm(weights["norm"], x))
    mask = None if evidence.mask is None else jnp.broadcast_to(evidence.mask.any(1, keepdims=True), tokens.shape[:2])
    return Prefix(tokens, mask)
