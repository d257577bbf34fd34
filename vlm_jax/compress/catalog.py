"""The compressor catalog: lookup of rows by name, checks of specs, and what follows from a row.

To add a compressor, write its functions in a file of this folder and one of `sizes/`, and add a row to `rows.ROWS`:
configs, the contract test, the cost model, grids and figures include it. `compress.contract` says what a row is.
`model_spec` alone chooses default sizes, for configs, `load` and plans.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

from vlm_jax.compress import plugins
from vlm_jax.compress.contract import (
    OF_ATTENTION,
    OF_PLACES,
    OF_QUESTION,
    Compressor,
    encoder_for,
    key_width,
    no_segments,
    no_stages,
)
from vlm_jax.compress.rows import ROWS
from vlm_jax.core.errors import UserError, unknown
from vlm_jax.core.segments import HIDDEN
from vlm_jax.core.specs import CompressorSpec, ComputeSpec, DataSpec, DecoderSpec, DropStage, EncoderSpec, ModelSpec

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
    return tuple(dict.fromkeys((*ROWS, *plugins.entry_points())))


def check_installed(name: str, where: object) -> None:
    """Raises `UserError`, which names the file or folder `where`, if the compressor that it names cannot be used."""
    if name not in names():
        raise UserError(f"{where}: compressor {name!r} is neither built in nor of an installed package (install it)")
    try:
        row(name)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def published_projector(name: str) -> str | None:
    """The projector of the compressor's row; None where its package is absent or broken."""
    with contextlib.suppress(UserError):
        return row(name).projector
    return None


def _names_where(is_so: Callable[[Compressor], bool]) -> str:
    """The compressors that can be used here and of whose rows this holds, as text."""
    found = []
    for name in names():
        with contextlib.suppress(UserError):
            found += [name] if is_so(row(name)) else []
    return ", ".join(found)


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


def hides_tokens(model: ModelSpec) -> bool:
    """Whether some visual tokens are hidden from what follows them, which no fused kernel can express."""
    return model.compressor is not None and row(model.compressor.name).segments is not no_segments


def leaving(model: ModelSpec) -> int:
    """Visual tokens of a view that leave the decoder at its stages, or its cache after a prompt; of several V, at the
    one at which most do."""
    if model.compressor is None:
        return 0
    cuts = stages(at_tokens(model, model.compressor.elastic[0]) if model.compressor.elastic else model)
    gone = entering(model.compressor) - cuts[-1].keep if cuts else 0
    return gone + row(model.compressor.name).segments(model.compressor).count(HIDDEN)


def has_own_views(model: ModelSpec, compute: ComputeSpec, data: DataSpec) -> bool:
    """Whether each question in a training row has views of its own: where its visual tokens depend on it, or leave
    inside the decoder and are not those of all questions of the row."""
    if model.compressor is None:
        return False
    is_shared = data.shares_image and shares_image(model, compute)
    return row(model.compressor.name).query_dependent or (leaving(model) > 0 and not is_shared)


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
    if encoder.class_token and encoder.feature_layer in (0, encoder.depth):
        encoder = dataclasses.replace(encoder, feature_layer=max(encoder.depth - 1, 1))
    encoder = encoder_for(method, encoder)
    check_encoder(compressor, encoder)
    possible = method.tokens_out(encoder.token_grid)
    elastic: tuple[int, ...] = ()
    if isinstance(tokens, tuple):
        elastic = tokens
        tokens = max(elastic, default=None)
    if tokens is None and len(possible) > 1:
        raise UserError(f"compressor {compressor!r} gives several numbers of tokens: set tokens=V")
    spec = method.defaults(encoder, decoder, next(iter(possible), 1) if tokens is None else tokens)
    own_sizes: Mapping[str, Any] = STUDY.get(encoder.name, {}) if method.stages is no_stages else {}
    spec = dataclasses.replace(spec, key_width=key_width(encoder), elastic=elastic, **own_sizes)
    spec = method.for_decoder(spec, decoder)
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
        elastic = _names_where(lambda method: method.elastic != "no")
        raise UserError(f"{where}: the weights of this method serve one V (elastic: {elastic})")
    if len(set(spec.elastic)) < len(spec.elastic):
        raise UserError(f"{where}: expected distinct numbers, got {list(spec.elastic)} (name each once)")
    if sorted(spec.elastic) != list(spec.elastic):
        raise UserError(f"{where}: expected ascending numbers, got {list(spec.elastic)} (sort them)")
    possible = method.tokens_out(spec.grid)
    for tokens in spec.elastic:
        if tokens not in possible:
            raise UserError(f"{where}: cannot give {tokens} tokens; {_listed(possible, tokens)}")
    if spec.tokens not in spec.elastic:
        raise UserError(f"{where}: expected one of them as tokens, got {spec.tokens}")


def check_encoder(name: str, encoder: EncoderSpec) -> None:
    """Raises `UserError` for an encoder that lacks what the compressor reads, or cannot merge as many tokens."""
    method, layer = row(name), encoder.attention_layer
    where = f"compressor {name!r}: expected"
    if "class_token" in method.reads and not encoder.class_token and not method.class_token_optional:
        raise UserError(f"{where} an encoder with a class token, got {encoder.name}")
    for field, layers in (("attention", (layer,) if method.reads & OF_ATTENTION else ()), ("taps", encoder.taps)):
        if outside := [one for one in layers if not 1 <= one <= encoder.depth]:
            blocks = f"blocks from 1 to {encoder.depth} of encoder {encoder.name}"
            raise UserError(f"{where} {field} to name {blocks}, got {outside[0]}")
    if encoder.merge:
        _check_merge(name, encoder)


def _check_merge(name: str, encoder: EncoderSpec) -> None:
    where = f"model.merge={list(encoder.merge)}"
    if len(encoder.merge) != encoder.blocks:
        raise UserError(f"{where}: expected a number for each of the {encoder.blocks} blocks, got {len(encoder.merge)}")
    tokens = encoder.patches + encoder.class_token
    for number, pairs in enumerate(encoder.merge, start=1):
        most = (tokens - encoder.class_token) // 2
        if not 0 <= pairs <= most:
            raise UserError(f"{where}: block {number}: expected 0 to {most}, half of its tokens, got {pairs}")
        tokens -= pairs
    inner = row(name).reads & OF_PLACES
    if inner or row(name).reads_places:
        needs = ", ".join(sorted(inner)) or "the patch grid"
        others = _names_where(lambda method: not method.reads & OF_PLACES and not method.reads_places)
        raise UserError(
            f"{where}: compressor {name!r} reads {needs}, which merged tokens do not have ({others} do not)"
        )


def check_decoder(model: ModelSpec) -> None:
    """Raises `UserError` for a decoder in which the compressor's stages have no place."""
    name, depth = model.compressor.name, model.decoder.depth
    if not _stages_fit(model):
        layers = ", ".join(str(stage.layer) for stage in stages(model))
        nearest = for_decoder(model.compressor, model.decoder)
        fits = nearest != model.compressor and _stages_fit(dataclasses.replace(model, compressor=nearest))
        raise UserError(
            f"compressor {name!r}: expected a decoder with layers before and behind each of its stages (behind layers "
            f"{layers}), got {model.decoder.name} with {depth} layers"
            + (f" (nearest possible: compressor.depth={nearest.depth})" if fits else "")
        )
    if hides_tokens(model) and model.mask != "causal":
        raise UserError(f"compressor {name!r}: expected model.mask=causal, got {model.mask}")


def _stages_fit(model: ModelSpec) -> bool:
    """Whether the decoder has layers before and behind each stage."""
    cuts = [0, *(stage.layer for stage in stages(model)), model.decoder.depth]
    return all(start < stop for start, stop in itertools.pairwise(cuts))


def _listed(possible: tuple[int, ...], tokens: int, limit: int = 24) -> str:
    """All possible values, or the closest ones if there are more than `limit`."""
    if len(possible) <= limit:
        return "possible: " + (", ".join(map(str, possible)) or "none")
    nearest = sorted(sorted(possible, key=lambda v: abs(v - tokens))[: limit // 3])
    return f"nearest possible: {', '.join(map(str, nearest))} (of {len(possible)}, {possible[0]} to {possible[-1]})"
