"""The compressor catalog. `compress.contract` says what a row is.

To add a compressor, write its functions in a file of this folder and add a row to `ROWS`: configs, the contract test,
the cost model, grids and figures include it. `model_spec` alone chooses default sizes, for configs, `load` and plans.
"""

import dataclasses
import itertools
from functools import partial

from vlm_jax.compress import (
    convolving,
    language_side,
    llava_mini,
    local,
    mqt,
    perceiver,
    plugins,
    pooling,
    qformer,
    querying,
    selection,
    token_learner,
)
from vlm_jax.compress.contract import (
    OF_QUESTION,
    Compressor,
    all_patches,
    encoder_for,
    inner_width,
    key_width,
    no_stages,
)
from vlm_jax.core.errors import UserError, unknown
from vlm_jax.core.specs import CompressorSpec, ComputeSpec, DecoderSpec, DropStage, EncoderSpec, ModelSpec
from vlm_jax.ops.grid import square_tokens

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
        partial(querying.defaults, "resampler"), elastic="prefix",
    ),
    "tokenpacker": Compressor(
        local.init_tokenpacker, local.tokenpacker, local.cell_tokens, local.tokenpacker_cost,
        partial(local.defaults, "tokenpacker"), frozenset({"tokens", "taps"}), local.tapped_layers,
    ),
    "quecc": Compressor(
        local.init_quecc, local.quecc, local.cell_tokens, local.quecc_cost, partial(local.defaults, "quecc"),
        frozenset({"tokens", "taps", "question_vector"}), local.tapped_layers,
    ),
    "m3": Compressor(
        pooling.no_weights, pooling.m3, pooling.cell_tokens, pooling.m3_cost, partial(pooling.defaults, "m3"),
        frozenset({"tokens", "project"}), elastic="ladder",
    ),
    "pixel_shuffle": Compressor(
        pooling.init_pixel_shuffle, pooling.pixel_shuffle, pooling.shuffle_tokens, pooling.no_cost,
        partial(pooling.defaults, "pixel_shuffle"), output_width=pooling.shuffled_width,
    ),
    "idefics3": Compressor(
        pooling.no_weights, pooling.shuffle, pooling.shuffle_tokens, pooling.no_cost,
        partial(pooling.defaults, "idefics3"), output_width=pooling.shuffled_width, projector="linear",
    ),
    "ldpv2": Compressor(
        convolving.init_ldpv2, convolving.ldpv2, pooling.pool_tokens, convolving.ldpv2_cost,
        partial(pooling.defaults, "ldpv2"), frozenset({"tokens", "project"}), elastic="ladder",
    ),
    "c_abstractor": Compressor(
        convolving.init_abstractor, convolving.abstractor, square_tokens, convolving.abstractor_cost,
        partial(convolving.abstractor_defaults, "c_abstractor"), output_width=inner_width, projector="mlp_silu",
        elastic="ladder",
    ),
    "perceiver": Compressor(
        perceiver.init_perceiver, perceiver.perceiver, querying.resampler_tokens, perceiver.perceiver_cost,
        partial(perceiver.defaults, "perceiver"),
    ),
    "qformer": Compressor(
        qformer.init_qformer, qformer.qformer, querying.resampler_tokens, qformer.qformer_cost,
        partial(qformer.defaults, "qformer"), output_width=inner_width, projector="linear",
    ),
    "qformer_question": Compressor(
        qformer.init_with_question, qformer.qformer, querying.resampler_tokens, qformer.with_question_cost,
        partial(qformer.defaults, "qformer_question"), frozenset({"tokens", "question_tokens"}),
        output_width=inner_width, projector="linear",
    ),
    "mqt": Compressor(
        mqt.init_mqt, mqt.mqt, mqt.mqt_tokens, mqt.mqt_cost, partial(mqt.defaults, "mqt"), projector="linear",
        problem=mqt.problem, elastic="prefix",
    ),
    "token_learner": Compressor(
        token_learner.init_token_learner, token_learner.token_learner, token_learner.learner_tokens,
        token_learner.token_learner_cost, partial(token_learner.defaults, "token_learner"), elastic="prefix",
    ),
    "token_learner_conv": Compressor(
        token_learner.init_token_learner_conv, token_learner.token_learner_conv, token_learner.learner_tokens,
        token_learner.token_learner_conv_cost, partial(token_learner.defaults, "token_learner_conv"),
    ),
    "llava_mini": Compressor(
        llava_mini.init_llava_mini, llava_mini.llava_mini, square_tokens, llava_mini.llava_mini_cost,
        partial(llava_mini.defaults, "llava_mini"), frozenset({"tokens", "question_tokens", "project"}),
        for_decoder=llava_mini.for_decoder, problem=llava_mini.problem,
    ),
    "vision_zip": Compressor(
        pooling.no_weights, selection.vision_zip, selection.zip_tokens, selection.zip_cost,
        partial(pooling.defaults, "vision_zip"), frozenset({"tokens", "keys", "salience", "class_token"}),
        attention=selection.attention_of_tokens,
    ),
    "prumerge": Compressor(
        pooling.no_weights, selection.prumerge, selection.prumerge_tokens, selection.prumerge_cost,
        partial(pooling.defaults, "prumerge"), frozenset({"tokens", "keys", "salience"}),
        attention=selection.attention_of_last,
    ),
    "prumerge_plus": Compressor(
        pooling.no_weights, selection.prumerge_plus, selection.prumerge_plus_tokens, selection.prumerge_cost,
        partial(pooling.defaults, "prumerge_plus"), frozenset({"tokens", "keys", "salience"}),
        attention=selection.attention_of_last,
    ),
    "divprune": Compressor(
        pooling.no_weights, selection.divprune, selection.zip_tokens, selection.divprune_cost,
        partial(pooling.defaults, "divprune"), frozenset({"tokens", "project"}), elastic="ladder",
    ),
    "fastv": Compressor(
        pooling.no_weights, pooling.keep_all, language_side.fewer_tokens, language_side.all_projected,
        partial(language_side.defaults, "fastv", language_side.FASTV_LAYERS), entering=all_patches,
        stages=language_side.fastv_stages, scores_tokens=True, elastic="ladder",
    ),
    "pyramiddrop": Compressor(
        pooling.no_weights, pooling.keep_all, language_side.fewer_tokens, language_side.all_projected,
        partial(language_side.defaults, "pyramiddrop", language_side.PYRAMID_STAGES), entering=all_patches,
        stages=language_side.pyramid_stages, scores_tokens=True, elastic="ladder",
    ),
    "victor": Compressor(
        language_side.init_learned, language_side.append_learned, language_side.fewer_tokens,
        language_side.all_projected, partial(language_side.defaults, "victor", language_side.VICTOR_LAYERS),
        frozenset({"tokens", "project"}), entering=language_side.with_learned, stages=language_side.victor_stages,
    ),
    "voco": Compressor(
        language_side.init_learned, language_side.append_learned, language_side.fewer_tokens,
        language_side.all_projected, partial(language_side.defaults, "voco", 1), frozenset({"tokens", "project"}),
        entering=language_side.with_learned, segments=language_side.voco_segments,
    ),
}  # fmt: skip
# Sizes of every compressor after the built-in encoder, but those with stages: many narrow heads, since few hurt narrow
# decoders most.
STUDY = {"glyph-64": {"width": 64, "heads": 16, "depth": 1, "mlp_width": 128}}


def row(name: str) -> Compressor:
    """The compressor of that name, built in or of an installed package (`compress.plugins`). Raises `UserError`."""
    plugins.check_name(name, ROWS)
    if name in ROWS:
        return ROWS[name]
    if name not in plugins.entry_points():
        raise unknown("compressor", name, names())
    return plugins.load(name)


def names() -> tuple[str, ...]:
    """All compressors, those of installed packages included."""
    return (*ROWS, *plugins.entry_points())


def output_width(spec: CompressorSpec) -> int:
    """Width of the compressor's tokens: the projector's input."""
    return row(spec.name).output_width(spec)


def entering(spec: CompressorSpec) -> int:
    """Tokens of an image that enter the decoder: V, or more where stages drop some inside it."""
    return row(spec.name).entering(spec)


def for_decoder(spec: CompressorSpec, decoder: DecoderSpec) -> CompressorSpec:
    """The same compressor before another decoder."""
    return row(spec.name).for_decoder(dataclasses.replace(spec, text_width=decoder.width), decoder)


def at_tokens(model: ModelSpec, tokens: int) -> ModelSpec:
    """The model at another V of an elastic compressor, with the same weights. Raises `UserError` for no such V."""
    spec = dataclasses.replace(model, compressor=dataclasses.replace(model.compressor, tokens=tokens))
    check(spec.compressor)
    return spec


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
    tokens: int | tuple[int, ...] | None,
    decoder: DecoderSpec,
    projector: str | None = None,
    mask: str = "causal",
) -> ModelSpec:
    """A `ModelSpec` with the compressor's default sizes and taps. `tokens` may be None for a method with a single V,
    and several ascending V for an elastic one; `projector` None is the published one.

    Tokens are those of `encoder.feature_layer` if it is an inner block; else of the last block but one with a class
    token (CLIP, as in LLaVA), and after the final norm without (SigLIP).
    Raises `UserError` for an unknown compressor or an unsupported V.
    """
    method = row(compressor)
    possible = method.tokens_out(encoder.grid)
    elastic: tuple[int, ...] = ()
    if isinstance(tokens, tuple):
        tokens, elastic = max(tokens, default=None), tokens
    if tokens is None and len(possible) > 1:
        raise UserError(f"compressor {compressor!r} gives several numbers of tokens: set tokens=V")
    if encoder.class_token and encoder.feature_layer in (0, encoder.depth):
        encoder = dataclasses.replace(encoder, feature_layer=max(encoder.depth - 1, 1))
    encoder = encoder_for(method, encoder)
    spec = method.defaults(encoder, decoder, possible[0] if tokens is None else tokens)
    own_sizes = STUDY.get(encoder.name, {}) if method.stages is no_stages else {}
    spec = dataclasses.replace(spec, key_width=key_width(encoder), elastic=elastic, **own_sizes)
    check(spec)
    model = ModelSpec(encoder, spec, projector or method.projector, decoder, mask)
    check_decoder(model)
    return model


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
    if spec.elastic:
        _check_elastic(method, spec)
    if problem := method.problem(spec):
        raise UserError(f"compressor {spec.name!r}: {problem}")
    if method.reads & {*OF_QUESTION, "project"} and spec.text_width < 1:
        raise UserError(f"compressor {spec.name!r} needs the decoder: text_width={spec.text_width} must be its width")


def _check_elastic(method: Compressor, spec: CompressorSpec) -> None:
    where = f"compressor {spec.name!r}: elastic={list(spec.elastic)}"
    if method.elastic == "no":
        elastic = ", ".join(name for name in ROWS if ROWS[name].elastic != "no")
        raise UserError(f"{where}: the weights of this method serve one V (elastic: {elastic})")
    if sorted(set(spec.elastic)) != list(spec.elastic):
        raise UserError(f"{where}: expected ascending numbers, got {list(spec.elastic)} (sort them)")
    possible = method.tokens_out(spec.grid)
    for tokens in spec.elastic:
        if tokens not in possible:
            raise UserError(f"{where}: cannot give {tokens} tokens; {_listed(possible, tokens)}")
    if spec.tokens not in spec.elastic:
        raise UserError(f"{where}: expected one of them as tokens, got {spec.tokens}")


def check_decoder(model: ModelSpec) -> None:
    """Raises `UserError` for a decoder in which the compressor's stages have no place."""
    name, depth = model.compressor.name, model.decoder.depth
    cuts = [0, *(stage.layer for stage in stages(model)), depth]
    if any(start >= stop for start, stop in itertools.pairwise(cuts)):
        raise UserError(
            f"compressor {name!r}: expected a decoder with layers before and behind each of its stages (behind layers "
            f"{', '.join(map(str, cuts[1:-1]))}), got {model.decoder.name} with {depth} layers"
        )
    if row(name).segments(model.compressor) and model.mask != "causal":
        raise UserError(f"compressor {name!r}: expected model.mask=causal, got {model.mask}")


def _listed(possible: tuple[int, ...], tokens: int, limit: int = 24) -> str:
    """All possible values, or the closest ones if there are more than `limit`."""
    if len(possible) <= limit:
        return "possible: " + ", ".join(map(str, possible))
    nearest = sorted(sorted(possible, key=lambda v: abs(v - tokens))[: limit // 3])
    return f"nearest possible: {', '.join(map(str, nearest))} (of {len(possible)}, {possible[0]} to {possible[-1]})"
