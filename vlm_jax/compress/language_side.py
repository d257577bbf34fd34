"""Compressors that act inside the language model: all patches enter it, and few tokens are left behind.

`fastv` (FastV, arXiv 2403.06764): behind layer K = `spec.depth` the V patches stay that the last token of the question
    attends to most in layer K - 1 (mean over heads), at their positions. No weights, no training.
`pyramiddrop` (PyramidDrop, arXiv 2410.17247): `spec.depth` stages at even distances keep fewer and fewer patches, a
    geometric series from P to V (P / 2, P / 4, P / 8 as published), by the attention that the layer behind the stage
    would pay; positions are counted anew. In training the readers are the tokens before each answer.
`victor` (Victor, arXiv 2410.14072): V learned registers behind the patches, which leave behind layer `spec.depth`.
`voco` (VoCo-LLaMA, arXiv 2406.12275): V learned tokens behind the patches; what follows attends to them, and to nothing
    before them. A cache keeps them alone.
"""

import dataclasses

import jax
import jax.numpy as jnp

from vlm_jax.compress import pooling
from vlm_jax.compress.contract import Cost, all_patches
from vlm_jax.compress.layers import Count, Weights
from vlm_jax.core.axes import EMBED, POSITION
from vlm_jax.core.specs import CompressorSpec, DecoderSpec, DropStage, EncoderSpec
from vlm_jax.core.structs import Evidence, Prefix
from vlm_jax.ops.grid import GridShape
from vlm_jax.ops.initializers import table
from vlm_jax.ops.masks import HIDDEN, SHARED

FASTV_LAYERS, VICTOR_LAYERS, PYRAMID_STAGES = 2, 3, 3


def defaults(name: str, depth: int, encoder: EncoderSpec, decoder: DecoderSpec, tokens: int) -> CompressorSpec:
    """Minimal inner sizes, and `depth` layers or stages, or as many as the decoder has layers to spare."""
    spec = dataclasses.replace(pooling.defaults(name, encoder, decoder, tokens), depth=depth)
    return for_decoder(spec, decoder)


def for_decoder(spec: CompressorSpec, decoder: DecoderSpec) -> CompressorSpec:
    """The spec with stages that fit into another decoder."""
    return dataclasses.replace(spec, depth=max(1, min(spec.depth, decoder.depth - 1)))


def fewer_tokens(grid: GridShape) -> tuple[int, ...]:
    return tuple(range(1, grid[0] * grid[1]))


def all_projected(spec: CompressorSpec, question_tokens: Count) -> Cost:
    return Cost(0.0, projected=all_patches(spec))


def fastv_stages(spec: CompressorSpec, depth: int) -> tuple[DropStage, ...]:
    return (DropStage(spec.depth, spec.tokens, "attention", spec.depth - 1),)


def pyramid_stages(spec: CompressorSpec, depth: int) -> tuple[DropStage, ...]:
    patches, count, out = all_patches(spec), min(spec.depth, depth + 2), []
    for i in range(1, count + 1):
        layer = depth * i // (count + 1)
        keep = round(patches * (spec.tokens / patches) ** (i / count))
        out.append(DropStage(layer, keep, "attention", layer, "recounted"))
    return tuple(out)


def with_learned(spec: CompressorSpec) -> int:
    return all_patches(spec) + spec.tokens


def init_learned(key: jax.Array, spec: CompressorSpec) -> Weights:
    """V embeddings of the decoder's width, as its table starts."""
    return {"tokens": table(key, (spec.tokens, spec.text_width), (POSITION, EMBED), spec.text_width**-0.5)}


def append_learned(weights: Weights, evidence: Evidence, spec: CompressorSpec) -> Prefix:
    """Tokens [B, P + V, D]: the projected patches, then the learned ones."""
    x, mask = evidence.project(evidence.tokens), evidence.mask
    learned = jnp.broadcast_to(weights["tokens"].astype(x.dtype), (x.shape[0], spec.tokens, spec.text_width))
    if mask is not None:
        own = jnp.broadcast_to(mask.any(1, keepdims=True), learned.shape[:2])
        mask = jnp.concatenate([mask, own], axis=1)
    return Prefix(jnp.concatenate([x, learned], axis=1), mask)


def victor_stages(spec: CompressorSpec, depth: int) -> tuple[DropStage, ...]:
    return (DropStage(spec.depth, spec.tokens, "last"),)


def voco_segments(spec: CompressorSpec) -> tuple[int, ...]:
    return (HIDDEN,) * all_patches(spec) + (SHARED,) * spec.tokens
