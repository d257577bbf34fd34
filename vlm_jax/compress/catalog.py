"""Every compressor, by name: the project's extension point.

A compressor is arithmetic: four pure functions of arrays and a spec, and the sizes that it has by default. Write them
in a file of their group, add one row here, and the configurations, the contract test, the cost model, the grid and the
figures include it. `model_spec` is the only place where sizes are chosen: configs, `load` and the planner ask here.

    apply(weights, Visual[B, P, E], question vector [B, D] or None, spec) -> Visual[B, V, E]

`apply` keeps the encoder's width E: the map to the decoder's width is the projector of the `ModelSpec`, so every method
is compared with the same one. It computes in the dtype of the tokens. A masked patch has no influence on any real
output token. The output carries no taps; it carries a mask exactly when its input does.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
from jaxtyping import Array, Float

from vlm_jax.compress import local, pooling, querying
from vlm_jax.compress.layers import Weights
from vlm_jax.core.errors import UserError, unknown
from vlm_jax.core.specs import CompressorSpec, ComputeSpec, DecoderSpec, EncoderSpec, ModelSpec
from vlm_jax.core.structs import Visual

TextVector = Float[Array, "B D"]


class Compressor(NamedTuple):
    init_weights: Callable[[jax.Array, CompressorSpec], Weights]  # boxed arrays; {} where there are none
    apply: Callable[[Weights, Visual, TextVector | None, CompressorSpec], Visual]  # unboxed weights
    tokens_out: Callable[[tuple[int, int]], tuple[int, ...]]  # the V it can give on that patch grid, ascending
    flops: Callable[[CompressorSpec], float]  # forward, per image; matrix products, a multiply-add is two
    defaults: Callable[[EncoderSpec, DecoderSpec, int], CompressorSpec]  # its sizes between these two, at V tokens
    taps: Callable[[EncoderSpec], tuple[int, ...]] = pooling.no_taps  # the encoder's blocks that it reads
    query_dependent: bool = False  # reads the question: its tokens cannot be cached per image


ROWS: dict[str, Compressor] = {
    "none": Compressor(
        pooling.no_weights, pooling.keep_all, pooling.all_tokens, pooling.no_flops, partial(pooling.defaults, "none")
    ),
    "blind": Compressor(
        pooling.no_weights, pooling.drop_all, pooling.no_tokens, pooling.no_flops, partial(pooling.defaults, "blind")
    ),
    "pool": Compressor(
        pooling.no_weights, pooling.pool, pooling.pool_tokens, pooling.pool_flops, partial(pooling.defaults, "pool")
    ),
    "resampler": Compressor(
        querying.init_resampler, querying.resampler, querying.resampler_tokens, querying.resampler_flops,
        partial(querying.defaults, "resampler"),
    ),
    "tokenpacker": Compressor(
        local.init_tokenpacker, local.tokenpacker, local.cell_tokens, local.tokenpacker_flops,
        partial(local.defaults, "tokenpacker"), local.tapped_layers,
    ),
    "quecc": Compressor(
        local.init_quecc, local.quecc, local.cell_tokens, local.quecc_flops,
        partial(local.defaults, "quecc"), local.tapped_layers, query_dependent=True,
    ),
}  # fmt: skip
# Behind the study's own encoder every compressor has these sizes. Many narrow heads: with few, a narrow decoder looks
# worse than it is.
STUDY = {"glyph-64": {"width": 64, "heads": 16, "depth": 1, "mlp_width": 128}}


def row(name: str) -> Compressor:
    """The compressor of that name. Raises `UserError` that suggests the nearest."""
    if name not in ROWS:
        raise unknown("compressor", name, ROWS)
    return ROWS[name]


def shares_image(model: ModelSpec, compute: ComputeSpec) -> bool:
    """Whether several questions about an image can share its tokens in a row of training: where these follow the
    question neither through the compressor nor through a two-way prefix, and no fused kernel compares segments.
    """
    reads = model.compressor is not None and row(model.compressor.name).query_dependent
    return model.mask == "causal" and not reads and compute.attention == "xla"


def model_spec(
    encoder: EncoderSpec,
    compressor: str,
    tokens: int | None,
    decoder: DecoderSpec,
    projector: str = "mlp",
    mask: str = "causal",
) -> ModelSpec:
    """The whole model, of the parts' names and V: sizes and tapped blocks are the row's defaults. `tokens` None takes
    the only V that the method has.

    The tokens are those of the encoder's `feature_layer` where that is one of its inner blocks. Else an encoder with a
    class token (CLIP) gives its last block but one, as in LLaVA, and another (SigLIP) what stands behind its last norm.
    Raises `UserError` for a compressor that does not exist, or cannot give that many tokens.
    """
    method = row(compressor)
    possible = method.tokens_out(encoder.grid)
    if tokens is None and len(possible) > 1:
        raise UserError(f"compressor {compressor!r} gives several numbers of tokens: set tokens=V")
    if encoder.class_token and encoder.feature_layer in (0, encoder.depth):
        encoder = dataclasses.replace(encoder, feature_layer=max(encoder.depth - 1, 1))
    encoder = dataclasses.replace(encoder, taps=method.taps(encoder))
    spec = method.defaults(encoder, decoder, possible[0] if tokens is None else tokens)
    spec = dataclasses.replace(spec, **STUDY.get(encoder.name, {}))
    check(spec)
    return ModelSpec(encoder, spec, projector, decoder, mask)


def check(spec: CompressorSpec) -> None:
    """Raises `UserError` where the method cannot give what the spec asks of it."""
    method = row(spec.name)
    possible = method.tokens_out(spec.grid)
    if spec.tokens not in possible:
        h, w = spec.grid
        raise UserError(
            f"compressor {spec.name!r} cannot give tokens={spec.tokens} on a {h} x {w} patch grid; "
            + _listed(possible, spec.tokens)
        )
    for field, least in (("encoder_width", 1), ("taps", 0), ("width", 1), ("heads", 1), ("depth", 1), ("mlp_width", 0)):
        if getattr(spec, field) < least:
            raise UserError(f"compressor {spec.name!r}: {field}={getattr(spec, field)} must be at least {least}")
    if spec.width % spec.heads:
        raise UserError(f"compressor {spec.name!r}: width={spec.width} is not a multiple of heads={spec.heads}")
    if method.query_dependent and spec.text_width < 1:
        raise UserError(
            f"compressor {spec.name!r} reads the question: text_width={spec.text_width} must be the decoder's width"
        )


def _listed(possible: tuple[int, ...], asked: int, most: int = 24) -> str:
    """The possible values, or those nearest to what was asked where they are many."""
    if len(possible) <= most:
        return "possible: " + ", ".join(map(str, possible))
    nearest = sorted(sorted(possible, key=lambda v: abs(v - asked))[: most // 3])
    return f"nearest possible: {', '.join(map(str, nearest))} (of {len(possible)}, {possible[0]} to {possible[-1]})"
