"""Every combination of encoder, compressor, V and LLM, with its cost and latency by part, as arrays.

Visual sides (encoder, compressor, V) stand on one axis [M], LLMs on the other [L]. Each part depends on little, so it
is counted once per distinct case and spread over the rest: tens of thousands of combinations take milliseconds. A
test holds the arrays to `cost.flops` of each `ModelSpec`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vlm_jax.compress import catalog
from vlm_jax.core.errors import UserError, unknown
from vlm_jax.core.specs import CompressorSpec, DecoderSpec, EncoderSpec, ModelSpec
from vlm_jax.scaling import latency
from vlm_jax.scaling.latency import Request
from vlm_jax.sizing import cost, zoo

Floats = NDArray[np.float64]
PROJECTOR = "mlp"
MASK = "causal"
TAPS = 4  # encoder layers that the local compressors read, as in arXiv 2411.03312
HEADS = 8
LAYERS = 6  # of the resampler, as in arXiv 2204.14198
STUDY = (
    "glyph-64",
    "d24",
    "d48",
    "d96",
    "d192",
    "d384",
)  # the small study's own models: no catalogue of real ones has them
TOKENS = (1, 4, 9, 16, 25, 36, 49, 64, 81, 100, 144, 196, 256, 324, 400, 576, 729)


class Side(NamedTuple):
    """The visual half of a choice."""

    encoder: str
    compressor: str
    tokens: int


class Grid(NamedTuple):
    """All combinations. FLOPs and bytes are those of one request, seconds those of a whole batch."""

    sides: list[Side]  # M
    llms: list[str]  # L
    tokens: Floats  # [M]
    params: Floats  # [L] N of the law, in billions
    flops: dict[str, Floats]  # by part, [M, L]
    secs: dict[str, Floats]  # by part, [M, L]; empty without a chip
    by_compute: dict[str, NDArray[np.bool_]]  # is compute what limits the part, [M, L]; empty without a chip
    cache_bytes: Floats  # [M, L]
    memory_bytes: Floats  # [M, L] of a whole batch
    reads_question: NDArray[np.bool_]  # [M]

    @property
    def total_flops(self) -> Floats:
        return sum(self.flops.values())  # type: ignore[return-value]

    @property
    def total_secs(self) -> Floats:
        return sum(self.secs.values())  # type: ignore[return-value]


def compressor_spec(name: str, tokens: int, encoder: EncoderSpec, text_width: int) -> CompressorSpec:
    """The compressor at the size that the planner assumes: inner width E, its MLP four times that."""
    return CompressorSpec(
        name, tokens, encoder.grid, encoder.width, TAPS, text_width, encoder.width, HEADS, LAYERS, 4 * encoder.width
    )  # fmt: skip


def model_spec(side: Side, llm: str) -> ModelSpec:
    """The model that a combination stands for."""
    encoder, decoder = zoo.encoder(side.encoder), zoo.decoder(llm)
    compressor = compressor_spec(side.compressor, side.tokens, encoder, decoder.width)
    return ModelSpec(encoder, compressor, PROJECTOR, decoder, MASK)


def law_params(llm: str, params_are: str) -> float:
    """N of that LLM in billions, counted as the law's rows count it."""
    if params_are == "nominal":
        return zoo.nominal_params(llm) / 1e9
    return cost.decoder_params(zoo.decoder(llm), "excluded") / 1e9


def sides(
    encoders: tuple[str, ...], compressors: tuple[str, ...], tokens: tuple[int, ...] | None, measured: tuple[int, ...]
) -> list[Side]:
    """All visual halves that exist: V where the compressor can give it on the encoder's grid.

    `tokens=None` tries the measured V and some more; an explicit V that nothing can give
    is an error.
    """
    wanted = set(tokens if tokens is not None else (*TOKENS, *measured))
    found = [
        Side(encoder, compressor, count)
        for encoder in encoders
        for compressor in compressors
        for count in sorted(wanted.intersection(_tokens_out(compressor, zoo.encoder(encoder).grid)))
    ]
    if tokens is not None and (missing := wanted - {side.tokens for side in found}):
        possible = sorted({v for c in compressors for e in encoders for v in _tokens_out(c, zoo.encoder(e).grid)})
        near = sorted(sorted(possible, key=lambda v: abs(v - min(missing)))[:8])
        raise UserError(f"--tokens {min(missing)}: no compressor here gives it; near: {', '.join(map(str, near))}")
    if not found:
        raise UserError("no combination: these compressors give no V on these encoders' grids; widen --tokens")
    return found


def _tokens_out(compressor: str, grid: tuple[int, int]) -> tuple[int, ...]:
    return catalog.row(compressor).tokens_out(grid)


Names = tuple[str, ...]


def names(measured: Mapping[str, Any], encoders: Names, llms: Names, compressors: Names) -> tuple[Names, Names, Names]:
    """What to search: the names given; else what the law's rows say they were measured with; else everything real.

    `measured` is `FamilyFit.rows`. Raises `UserError` for unknown names.
    """
    for name in llms:
        zoo.decoder(name)
    known = {
        "encoders": tuple(name for name in measured["encoders"] if name in zoo.ENCODERS),
        "llms": tuple(name for name in measured["llms"] if name in zoo.DECODERS),
        "compressors": tuple(name for name in measured["compressors"] if name in catalog.ROWS and name != "blind"),
    }
    return (
        encoders or known["encoders"] or tuple(name for name in zoo.ENCODERS if name not in STUDY),
        llms or known["llms"] or tuple(name for name in zoo.DECODERS if name not in STUDY),
        compressors or known["compressors"] or tuple(name for name in catalog.ROWS if name != "blind"),
    )


def build(over: list[Side], names: tuple[str, ...], request: Request, params_are: str) -> Grid:
    """Costs all combinations. A question that is cached is not cached for a compressor that reads it."""
    if request.question not in ("fresh", "cached"):
        raise unknown("question", request.question, ("fresh", "cached"))
    decoders = [zoo.decoder(name) for name in names]
    encoders = {name: zoo.encoder(name) for name in {side.encoder for side in over}}
    reads = np.array([catalog.row(side.compressor).query_dependent for side in over])
    distinct, at = np.unique([side.tokens for side in over], return_inverse=True)

    def per_llm(make: Callable[[DecoderSpec, int], latency.Work | float]) -> Floats:
        """[M, L, ...] from one call for each LLM and distinct V."""
        return np.array([[make(decoder, int(v)) for decoder in decoders] for v in distinct], float)[at]

    fresh = dataclasses.replace(request, question="fresh")
    prefill = per_llm(lambda d, v: latency.prefill_work(d, v, request))
    prefill[reads] = per_llm(lambda d, v: latency.prefill_work(d, v, fresh))[reads]
    encoder_work = {name: latency.encoder_work(spec, request) for name, spec in encoders.items()}
    shape = (len(over), len(decoders), 2)
    work = {
        "encoder": np.broadcast_to(np.array([encoder_work[side.encoder] for side in over])[:, None], shape),
        "compressor": _compressor_work(over, encoders, decoders, reads, request),
        "question": np.array([latency.question_work(decoder, request) for decoder in decoders]) * reads[:, None, None],
        "prefill": prefill,
        "decode": per_llm(lambda d, v: latency.decode_work(d, v, request)),
    }
    cache = per_llm(lambda d, v: latency.request_cache_bytes(d, v, request))
    of_encoder = np.array([cost.encoder_params(encoders[side.encoder]) for side in over])
    params = of_encoder[:, None] + np.array([cost.decoder_params(decoder) for decoder in decoders])
    memory = params * cost.dtype_bytes(request.dtype) + request.batch * cache
    secs, by_compute = _times(work, request)
    flops = {part: both[..., 0] / request.batch for part, both in work.items()}
    tokens, law = distinct[at].astype(float), np.array([law_params(name, params_are) for name in names])
    return Grid(over, list(names), tokens, law, flops, secs, by_compute, cache, memory, reads)


def _compressor_work(
    over: list[Side],
    encoders: dict[str, EncoderSpec],
    decoders: list[DecoderSpec],
    reads: NDArray[np.bool_],
    request: Request,
) -> Floats:
    """[M, L, 2]. The compressor's own FLOPs depend on the LLM only through the width of a question vector that it
    reads."""
    out = np.empty((len(over), len(decoders), 2))
    for m, side in enumerate(over):
        encoder, own = encoders[side.encoder], {}
        for n, decoder in enumerate(decoders):
            width = decoder.width if reads[m] else 1
            if width not in own:
                own[width] = cost.compressor_flops(compressor_spec(side.compressor, side.tokens, encoder, width))
            out[m, n, 0] = own[width]
    width, tokens = np.array([d.width for d in decoders]), np.array([[side.tokens] for side in over])
    from_width = np.array([[encoders[side.encoder].width] for side in over])
    patches = np.array([[encoders[side.encoder].patches] for side in over])
    work = latency.compressor_work(out[..., 0], patches, from_width, width, tokens, PROJECTOR, request)
    return np.stack(work, axis=-1)


def _times(work: dict[str, Floats], request: Request) -> tuple[dict[str, Floats], dict[str, NDArray[np.bool_]]]:
    """`chips.part_time`, over arrays."""
    if request.on is None:
        return {}, {}
    chip, share = request.on, request.efficiency
    secs, by_compute = {}, {}
    for part, both in work.items():
        compute = both[..., 0] / (chip.peak_flops * share.compute * request.chips)
        memory = both[..., 1] / (chip.bandwidth * share.bandwidth * request.chips)
        secs[part], by_compute[part] = np.maximum(compute, memory), compute >= memory
    return secs, by_compute
