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

import jax
import jax.numpy as jnp

from vlm_jax.compress.layers import Weights
from vlm_jax.compress.sizes.language_side import (  # noqa: F401
    FASTV_LAYERS,
    PYRAMID_STAGES,
    VICTOR_LAYERS,
    all_projected,
    defaults,
    fastv_stages,
    fewer_tokens,
    for_decoder,
    pyramid_stages,
    victor_stages,
    voco_segments,
    with_learned,
)
from vlm_jax.core.axes import EMBED, POSITION
from vlm_jax.core.specs import CompressorSpec
from vlm_jax.core.structs import Evidence, Prefix
from vlm_jax.ops.initializers import table


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
