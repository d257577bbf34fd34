"""Sizes and costs of `compress.language_side`: the V it can give, FLOPs, published defaults."""

import dataclasses

from vlm_jax.compress.contract import Cost, Count, all_patches
from vlm_jax.compress.sizes import pooling
from vlm_jax.core.segments import HIDDEN, SHARED
from vlm_jax.core.specs import CompressorSpec, DecoderSpec, DropStage, EncoderSpec
from vlm_jax.ops.grid_shapes import GridShape

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


def victor_stages(spec: CompressorSpec, depth: int) -> tuple[DropStage, ...]:
    return (DropStage(spec.depth, spec.tokens, "last"),)


def voco_segments(spec: CompressorSpec) -> tuple[int, ...]:
    return (HIDDEN,) * all_patches(spec) + (SHARED,) * spec.tokens
