"""The models that a plan chooses from, each a whole `ModelSpec`, and what one costs to ask.

By default those that the law speaks of: the encoder and compressor that its rows were measured with, at every V that
the compressor can give, in front of every language model of the measured family. Anything else is there only where it
is named, at the sizes of `catalog.model_spec`, and says what it extrapolates.
"""

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from vlm_jax.compress import catalog
from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import DecoderSpec, ModelSpec
from vlm_jax.scaling.fitted import FamilyFit, visual_side
from vlm_jax.sizing import cost, roofline, zoo
from vlm_jax.sizing.cost import Number
from vlm_jax.sizing.roofline import PartTime, Request

NameFilter = Collection[str]


class Candidate(NamedTuple):
    """One model that a plan may choose."""

    model: ModelSpec
    params: float  # N of the law, in billions
    extrapolates: tuple[str, ...] = ()  # of "encoder", "compressor", "family": what the rows were not measured with

    @property
    def tokens(self) -> int:
        """V."""
        return self.model.compressor.tokens


class Price(NamedTuple):
    """What a candidate costs. FLOPs and cache are those of one request, seconds and memory those of a whole batch."""

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
    """N of that language model in billions, counted as the law's rows count it."""
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
    """Every model of those names, or of what the law's rows were measured with where none are given; `tokens` limits V.

    Raises `UserError` for unknown names, for a V that nothing here can give, and where neither the caller nor the rows
    name a model.
    """
    for kind, given in (("encoders", encoders), ("compressors", compressors), ("llms", llms)):
        if not given and not family.models:
            raise UserError(f"the law's rows do not say what they were measured with: name --{kind}")
    decoders = _decoders(family.models, llms)
    found, possible = [], set()
    for visual, beyond in _visual_sides(family.models, encoders, compressors, decoders[0][0]):
        counts = [v for v in catalog.row(visual.compressor.name).tokens_out(visual.encoder.grid) if v > 0]
        possible.update(counts)
        for v in counts:
            if not tokens or v in tokens:
                found += [
                    Candidate(_joined(visual, v, decoder), law_params(decoder, params_are), beyond + farther)
                    for decoder, farther in decoders
                ]
    if missing := sorted(set(tokens) - possible):
        near = ", ".join(map(str, sorted(sorted(possible, key=lambda v: abs(v - missing[0]))[:8])))
        raise UserError(f"--tokens {missing[0]}: no compressor here gives it; near: {near or 'none'}")
    if not found:
        raise UserError("--compressors blind: a law says nothing of V = 0; name another")
    return found


def names_of(limits: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of `frontier.plan` that `candidates` reads."""
    return {key: limits[key] for key in ("encoders", "llms", "compressors", "tokens") if key in limits}


def _joined(visual: ModelSpec, tokens: int, decoder: DecoderSpec) -> ModelSpec:
    compressor = dataclasses.replace(visual.compressor, tokens=tokens, text_width=decoder.width)
    return dataclasses.replace(visual, compressor=compressor, decoder=decoder)


def _visual_sides(
    models: Iterable[ModelSpec], encoders: NameFilter, compressors: NameFilter, decoder: DecoderSpec
) -> list[tuple[ModelSpec, tuple[str, ...]]]:
    """Encoder, compressor, projector and mask of every combination; measured ones as they were measured."""
    measured = list(dict.fromkeys(map(visual_side, models)))
    if not encoders and not compressors:
        return [(side, ()) for side in measured]
    known_encoders = {side.encoder.name: side.encoder for side in measured}
    known_compressors = {side.compressor.name for side in measured}
    how = {"projector": measured[0].projector, "mask": measured[0].mask} if measured else {}
    out: list[tuple[ModelSpec, tuple[str, ...]]] = []
    for encoder in encoders or known_encoders:
        for compressor in compressors or sorted(known_compressors):
            if same := [s for s in measured if (s.encoder.name, s.compressor.name) == (encoder, compressor)]:
                out += [(side, ()) for side in same]
                continue
            spec = zoo.ENCODERS.get(encoder) or known_encoders.get(encoder) or zoo.encoder(encoder)
            least = catalog.row(compressor).tokens_out(spec.grid)[0]
            side = visual_side(catalog.model_spec(spec, compressor, least, decoder, **how))
            beyond = ("encoder",) * (encoder not in known_encoders)
            out.append((side, beyond + ("compressor",) * (compressor not in known_compressors or not beyond)))
    return out


def _decoders(models: Iterable[ModelSpec], llms: NameFilter) -> list[tuple[DecoderSpec, tuple[str, ...]]]:
    """The language models of those names, or of the measured families; ("family",) behind one of another family."""
    measured = {model.decoder.name: model.decoder for model in models}
    families = {zoo.family(name) for name in measured}
    names = llms or (*measured, *(name for name in zoo.DECODERS if zoo.family(name) in families))
    chosen = {spec.name: spec for spec in (measured.get(name) or zoo.decoder(name) for name in names)}
    return [(spec, ("family",) * (zoo.family(name) not in families)) for name, spec in chosen.items()]


def price(model: ModelSpec, request: Request) -> Price:
    """What it costs to ask the model."""
    asked = (request.question_tokens, request.answer_tokens)
    return Price(
        cost.flops(model, *asked, request.question).by_part,
        roofline.request_times(model, request) if request.on else {},
        cost.request_cache_bytes(model, *asked, request.dtype),
        cost.memory_bytes(model, *asked, request.batch, request.dtype),
    )
