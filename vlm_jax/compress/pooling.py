"""Compressors without weights: every patch, none of them, or averages of them.

`none` and `blind` are the two ends that every figure needs: V = P, and the language model alone. `pool` is the adaptive
average pool of the patch grid, the strong free baseline (M3, arXiv 2405.17430; here one V for each model, and pooled
before the projector).
"""

import jax
from jaxtyping import Array, Float

from vlm_jax.core.specs import CompressorSpec, DecoderSpec, EncoderSpec
from vlm_jax.core.structs import Visual
from vlm_jax.ops import grid as g


def no_weights(key: jax.Array, spec: CompressorSpec) -> dict:
    return {}


def no_taps(encoder: EncoderSpec) -> tuple[int, ...]:
    return ()


def defaults(name: str, encoder: EncoderSpec, decoder: DecoderSpec, tokens: int) -> CompressorSpec:
    """No inner size is read: the least that a spec may say."""
    return CompressorSpec(name, tokens, encoder.grid, encoder.width, 0, decoder.width, encoder.width, 1, 1, 0)


def no_flops(spec: CompressorSpec) -> float:
    return 0.0


def keep_all(weights: dict, visual: Visual, text: Float[Array, "B D"] | None, spec: CompressorSpec) -> Visual:
    """V = P: the patches as they are."""
    return Visual(visual.tokens, mask=visual.mask)


def all_tokens(grid: g.GridShape) -> tuple[int, ...]:
    return (grid[0] * grid[1],)


def drop_all(weights: dict, visual: Visual, text: Float[Array, "B D"] | None, spec: CompressorSpec) -> Visual:
    """V = 0: what the language model answers without an image."""
    return Visual(visual.tokens[:, :0], mask=None if visual.mask is None else visual.mask[:, :0])


def no_tokens(grid: g.GridShape) -> tuple[int, ...]:
    return (0,)


def pool(weights: dict, visual: Visual, text: Float[Array, "B D"] | None, spec: CompressorSpec) -> Visual:
    """Token (i, j) of r x c is the mean of the real patches in bin i of the rows and bin j of the columns."""
    (h, w), (r, c) = spec.grid, g.pooling_shapes(spec.grid)[spec.tokens]
    tokens, mask = g.weighted_mean(visual.tokens, visual.mask, g.bins(h, r), g.bins(w, c))
    return Visual(tokens, mask=mask)


def pool_tokens(grid: g.GridShape) -> tuple[int, ...]:
    return tuple(g.pooling_shapes(grid))


def pool_flops(spec: CompressorSpec) -> float:
    return g.weighted_mean_flops(spec.grid, g.pooling_shapes(spec.grid)[spec.tokens], spec.encoder_width)
