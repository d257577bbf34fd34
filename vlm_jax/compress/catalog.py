"""The compressor catalog. `compress.contract` says what a row is.

To add a compressor, write its functions in a file of this folder and add a row to `ROWS`: configs, the contract test,
the cost model, grids and figures include it. `model_spec` alone chooses default sizes, for configs, `load` and plans.
"""

import dataclasses
from functools import partial

from vlm_jax.compress import local, pooling, querying
from vlm_jax.compress.contract import Compressor, encoder_for
from vlm_jax.core.errors import UserError, unknown
from vlm_jax.core.specs import CompressorSpec, ComputeSpec, DecoderSpec, DropStage, EncoderSpec, ModelSpec

ROWS: dict[str, Compressor] = {
    "none": Compressor(
        pooling.no_weights, pooling.keep_all, pooling.all_tokens, pooling.no_cost, partial(pooling.defaults, "none")
    ),
    "blind": Compressor(
        pooling.no_weights, pooling.drop_all, pooling.no_tokens, pooling.no_cost, partial(pooling.defaults, "blind")
    ),
    "pool": Compressor(
        pooling.no_weights, pooling.pool, pooling.pool_tokens, pooling.pool_cost, partial(pooling.defaults, "pool")
    ),
    "resampler": Compressor(
        querying.init_resampler, querying.resampler, querying.resampler_tokens, querying.resampler_cost,
        partial(querying.defaults, "resampler"),
    ),
    "tokenpacker": Compressor(
        local.init_tokenpacker, local.tokenpacker, local.cell_tokens, local.tokenpacker_cost,
        partial(local.defaults, "tokenpacker"), frozenset({"tokens", "taps"}), local.tapped_layers,
    ),
    "quecc": Compressor(
        local.init_quecc, local.quecc, local.cell_tokens, local.quecc_cost, partial(local.defaults, "quecc"),
        frozenset({"tokens", "taps", "question_vector"}), local.tapped_layers,
    ),
}  # fmt: skip
# Sizes of every compressor after the built-in encoder: many narrow heads, since few hurt narrow decoders most.
STUDY = {"glyph-64": {"width": 64, "heads": 16, "depth": 1, "mlp_width": 128}}


def row(name: str) -> Compressor:
    """The compressor of that name. Raises `UserError`."""
    if name not in ROWS:
        raise unknown("compressor", name, ROWS)
    return ROWS[name]


def output_width(spec: CompressorSpec) -> int:
    """Width of the compressor's tokens: the projector's input."""
    return row(spec.name).output_width(spec)


def entering(spec: CompressorSpec) -> int:
    """Tokens of an image that enter the decoder: V, or more where stages drop some inside it."""
    return row(spec.name).entering(spec)


def stages(model: ModelSpec) -> tuple[DropStage, ...]:
    """The stages at which tokens leave the decoder."""
    if model.compressor is None:
        return ()
    return row(model.compressor.name).stages(model.compressor, model.decoder.depth)


def shares_image(model: ModelSpec, compute: ComputeSpec) -> bool:
    """Whether questions about one image can share its tokens in a training row: with a causal mask, a question-
    independent compressor and no fused kernel, which would compare segments.
    """
    reads = model.compressor is not None and row(model.compressor.name).query_dependent
    return model.mask == "causal" and not reads and compute.attention == "xla"


def model_spec(
    encoder: EncoderSpec,
    compressor: str,
    tokens: int | None,
    decoder: DecoderSpec,
    projector: str | None = None,
    mask: str = "causal",
) -> ModelSpec:
    """A `ModelSpec` with the compressor's default sizes and taps. `tokens` may be None for a method with a single V,
    `projector` for the published one.

    Tokens are those of `encoder.feature_layer` if it is an inner block; else of the last block but one with a class
    token (CLIP, as in LLaVA), and after the final norm without (SigLIP).
    Raises `UserError` for an unknown compressor or an unsupported V.
    """
    method = row(compressor)
    possible = method.tokens_out(encoder.grid)
    if tokens is None and len(possible) > 1:
        raise UserError(f"compressor {compressor!r} gives several numbers of tokens: set tokens=V")
    if encoder.class_token and encoder.feature_layer in (0, encoder.depth):
        encoder = dataclasses.replace(encoder, feature_layer=max(encoder.depth - 1, 1))
    encoder = encoder_for(method, encoder)
    spec = method.defaults(encoder, decoder, possible[0] if tokens is None else tokens)
    spec = dataclasses.replace(spec, **STUDY.get(encoder.name, {}))
    check(spec)
    return ModelSpec(encoder, spec, projector or method.projector, decoder, mask)


def check(spec: CompressorSpec) -> None:
    """Raises `UserError` for a spec that its method does not support."""
    method = row(spec.name)
    possible = method.tokens_out(spec.grid)
    if spec.tokens not in possible:
        h, w = spec.grid
        listed = _listed(possible, spec.tokens)
        raise UserError(
            f"compressor {spec.name!r} cannot give tokens={spec.tokens} on a {h} x {w} patch grid; {listed}"
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


def _listed(possible: tuple[int, ...], tokens: int, limit: int = 24) -> str:
    """All possible values, or the closest ones if there are more than `limit`."""
    if len(possible) <= limit:
        return "possible: " + ", ".join(map(str, possible))
    nearest = sorted(sorted(possible, key=lambda v: abs(v - tokens))[: limit // 3])
    return f"nearest possible: {', '.join(map(str, nearest))} (of {len(possible)}, {possible[0]} to {possible[-1]})"
