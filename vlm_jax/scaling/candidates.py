"""Candidate models of a plan, each a whole `ModelSpec`, and their prices.

By default the encoder and compressor that the law's rows were measured with, at every V of the compressor, with every
LLM of the measured family. Other models must be named; they have the sizes of `catalog.model_spec` and are marked as
extrapolations.
"""

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from vlm_jax.compress import catalog
from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import DecoderSpec, ModelSpec
from vlm_jax.scaling.fitted import FamilyFit, visual_side
from vlm_jax.sizing import compression, cost, roofline, zoo
from vlm_jax.sizing.cost import Number
from vlm_jax.sizing.roofline import PartTime, Request

NameFilter = Collection[str]


class Candidate(NamedTuple):
    """A model that a plan may choose."""

    model: ModelSpec
    params: float  # N of the law, in billions
    extrapolates: tuple[str, ...] = ()  # of "encoder", "compressor", "family": not in the rows

    @property
    def tokens(self) -> int:
        """V."""
        return self.model.compressor.tokens


class Price(NamedTuple):
    """Cost of a candidate: FLOPs and cache of one request, seconds and memory of a batch."""

    flops: dict[str, float]  # by part
    times: dict[str, PartTime]  # by part; empty without a chip
    cache_bytes: Number
    memory_bytes: Number

    @property
    def total_flops(self) -> float:
        return sum(self.flops.values())

    @property
    def secs(self) -> float:
        return sum(time.secs for time in self.times.values())


def law_params(decoder: DecoderSpec, params_are: str) -> float:
    """N in billions, counted as in the law's rows."""
    if params_are == "nominal":
        return zoo.nominal_params(decoder.name) / 1e9
    return cost.decoder_params(decoder, "excluded") / 1e9


def candidates(
    family: FamilyFit,
    params_are: str,
    encoders: NameFilter = (),
    llms: NameFilter = (),
    compressors: NameFilter = (),
    tokens: Collection[int] = (),
) -> list[Candidate]:
    """All models of these names, by default of the law's rows; `tokens` limits V.

    Raises `UserError` for unknown names, for a V that no compressor gives, and if neither caller nor rows name models.
    """
    for kind, given in (("encoders", encoders), ("compressors", compressors), ("llms", llms)):
        if not given and not family.models:
            raise UserError(f"--{kind}: expected names, got none (the law's rows do not name their models)")
    decoders = _decoders(family.models, llms)
    found, possible = [], set()
    for visual, beyond in _visual_sides(family.models, encoders, compressors, decoders[0][0]):
        counts = [v for v in catalog.row(visual.compressor.name).tokens_out(visual.encoder.token_grid) if v > 0]
        possible.update(counts)
        for v in counts:
            if not tokens or v in tokens:
                found += [
                    Candidate(_joined(visual, v, decoder), law_params(decoder, params_are), beyond + farther)
                    for decoder, farther in decoders
                ]
    if missing := sorted(set(tokens) - possible):
        near = ", ".join(map(str, sorted(sorted(possible, key=lambda v: abs(v - missing[0]))[:8])))
        raise UserError(
            f"--tokens: expected numbers that a compressor gives, got {missing[0]} (near: {near or 'none'})"
        )
    if not found:
        raise UserError("--compressors: expected one with V above 0, got blind only (name another)")
    return found if family.predicts == "law" else _measured(family, found)


def _measured(family: FamilyFit, found: list[Candidate]) -> list[Candidate]:
    """The candidates whose N and V were measured: all that a law may predict that does not fit."""
    params, tokens = np.array([(one.params, one.tokens) for one in found], float).T
    index = family.measured.index(params, tokens)
    if (index < 0).all():
        raise UserError(
            "--llms, --tokens: expected an LLM and V of the law's rows, as no form fits them; got none (leave both out)"
        )
    return [one for one, at in zip(found, index, strict=True) if at >= 0]


def names_of(limits: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `candidates` among those of `frontier.plan`."""
    return {key: limits[key] for key in ("encoders", "llms", "compressors", "tokens") if key in limits}


def _joined(visual: ModelSpec, tokens: int, decoder: DecoderSpec) -> ModelSpec:
    compressor = catalog.for_decoder(visual.compressor, decoder)
    return dataclasses.replace(visual, compressor=dataclasses.replace(compressor, tokens=tokens), decoder=decoder)


def _visual_sides(
    models: Iterable[ModelSpec], encoders: NameFilter, compressors: NameFilter, decoder: DecoderSpec
) -> list[tuple[ModelSpec, tuple[str, ...]]]:
    """Visual sides of every combination and what they extrapolate; measured ones have the sizes of the rows."""
    measured = list(dict.fromkeys(map(visual_side, models)))
    if not encoders and not compressors:
        return [(side, ()) for side in measured]
    known_encoders = {side.encoder.name: side.encoder for side in measured}
    known_compressors = {side.compressor.name for side in measured}
    fields = {"mask": measured[0].mask} if measured else {}
    if measured and measured[0].projector != catalog.published_projector(measured[0].compressor.name):
        fields["projector"] = measured[0].projector  # the rows' own choice; else as each method was published
    out: list[tuple[ModelSpec, tuple[str, ...]]] = []
    for encoder in encoders or known_encoders:
        for compressor in compressors or sorted(known_compressors):
            if same := [s for s in measured if (s.encoder.name, s.compressor.name) == (encoder, compressor)]:
                out += [(side, ()) for side in same]
                continue
            spec = known_encoders.get(encoder) or zoo.encoder(encoder)
            least = min(catalog.row(compressor).tokens_out(spec.token_grid), default=1)
            side = visual_side(catalog.model_spec(spec, compressor, least, decoder, **fields))
            beyond = ("encoder",) * (encoder not in known_encoders)
            out.append((side, beyond + ("compressor",) * (compressor not in known_compressors or not beyond)))
    return out


def _decoders(models: Iterable[ModelSpec], llms: NameFilter) -> list[tuple[DecoderSpec, tuple[str, ...]]]:
    """Decoders of these names or of the measured families, with ("family",) for those of another family."""
    measured = {model.decoder.name: model.decoder for model in models}
    families = {zoo.family(name) for name in measured}
    names = llms or (*measured, *(name for name in zoo.DECODERS if zoo.family(name) in families))
    chosen = {spec.name: spec for spec in (measured.get(name) or zoo.decoder(name) for name in names)}
    return [(spec, ("family",) * (zoo.family(name) not in families)) for name, spec in chosen.items()]


def price(model: ModelSpec, request: Request) -> Price:
    """Cost of a request to the model."""
    lengths = (request.question_tokens, request.answer_tokens)
    return Price(
        cost.flops(model, *lengths, request.question).by_part,
        roofline.request_times(model, request) if request.on else {},
        cost.cache_bytes(model.decoder, compression.mean(compression.cached(model)) + sum(lengths), request.dtype),
        cost.memory_bytes(model, *lengths, request.batch, request.dtype),
    )
