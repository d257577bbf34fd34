"""Seconds and bytes of a request, part by part, on a chip: the roofline of `sizing.chips` over the counts of
`sizing.cost`.

A batch of B requests, each an image, Q question tokens and A answer tokens, runs part after part:

    encoder     B images; weights once
    compressor  B images, the projector with it; the compressor's own weights are left out, they are small beside the
    LLM's question    for compressors that read the question: B times Q tokens; LLM weights once prefill     B times V
    + Q tokens; LLM weights once, the cache is written decode      A - 1 steps; each reads the LLM's weights once and
    every cache so far

Functions take and give plain numbers. Compute and memory traffic of one part overlap, parts do not; the host, the
network and queues are left out.
"""

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import DecoderSpec, EncoderSpec
from vlm_jax.sizing import cost
from vlm_jax.sizing.chips import ASSUMED, Chip, Efficiency, PartTime, chip, part_time
from vlm_jax.sizing.cost import Number

PARTS = ("encoder", "compressor", "question", "prefill", "decode")


@dataclass(frozen=True)
class Request:
    """What is asked, and how it is served. A cached question costs nothing in prefill: its keys and values are kept."""

    question_tokens: Number = 50
    answer_tokens: Number = 20
    batch: int = 1
    question: str = "fresh"  # or "cached"
    dtype: str = "bfloat16"
    on: Chip | None = None
    chips: int = 1
    efficiency: Efficiency = ASSUMED


class Work(NamedTuple):
    """FLOPs and bytes of one part, for a whole batch."""

    flops: float
    moved_bytes: float


def encoder_work(spec: EncoderSpec, request: Request) -> Work:
    """One image a request through the encoder."""
    dtype, batch = request.dtype, request.batch
    weights = cost.weight_bytes(cost.encoder_params(spec), dtype)
    return Work(batch * cost.encoder_flops(spec), weights + batch * cost.encoder_activation_bytes(spec, dtype))


def compressor_work(
    flops: Any, patches: Any, encoder_width: Any, width: Any, tokens: Any, projector: str, request: Request
) -> Work:
    """The compressor (its FLOPs are given, they come from the catalog) and the projector. Arrays broadcast."""
    size, batch = cost.dtype_bytes(request.dtype), request.batch
    total = flops + cost.projector_flops(projector, encoder_width, width, tokens)
    moved = (patches + 2 * tokens) * encoder_width + tokens * width
    weights = cost.projector_params(projector, encoder_width, width)
    return Work(batch * total, size * (weights + batch * moved))


def streamed_bytes(spec: DecoderSpec, dtype: str) -> Number:
    """Bytes of LLM weights that every pass reads: all but the rows of the embedding table that it does not look up."""
    params = cost.decoder_params(spec, "excluded") + spec.vocab * spec.width  # the head, tied or not
    return cost.weight_bytes(params, dtype)


def question_work(spec: DecoderSpec, request: Request) -> Work:
    """The question alone through the LLM; nothing is read out, so the head stays where it is."""
    tokens, batch, dtype = request.question_tokens, request.batch, request.dtype
    flops = cost.pass_flops(spec, tokens, tokens, 0).total
    weights = cost.weight_bytes(cost.decoder_params(spec, "excluded"), dtype)
    return Work(batch * flops, weights + batch * cost.decoder_activation_bytes(spec, tokens, dtype))


def prefill_work(spec: DecoderSpec, tokens: int, request: Request) -> Work:
    """Image tokens and question; a cached question is only attended to."""
    fresh = tokens + (request.question_tokens if request.question == "fresh" else 0)
    keys = tokens + request.question_tokens
    flops = cost.pass_flops(spec, fresh, keys, 1).total
    moved = cost.decoder_activation_bytes(spec, fresh, request.dtype) + cost.cache_bytes(spec, keys, request.dtype)
    return Work(request.batch * flops, streamed_bytes(spec, request.dtype) + request.batch * moved)


def decode_work(spec: DecoderSpec, tokens: int, request: Request) -> Work:
    """All answer tokens after the first."""
    context = tokens + request.question_tokens
    steps = max(request.answer_tokens - 1, 0)
    flops = cost.decode_flops(spec, context, request.answer_tokens).total
    mean_keys = context + (steps + 1) / 2
    step = cost.cache_bytes(spec, mean_keys, request.dtype) + cost.decoder_activation_bytes(spec, 1, request.dtype)
    return Work(request.batch * flops, steps * (streamed_bytes(spec, request.dtype) + request.batch * step))


def memory_bytes(spec: DecoderSpec, encoder: EncoderSpec, tokens: int, request: Request) -> Number:
    """What must fit: both models' weights, and a cache for every request of the batch."""
    params = cost.decoder_params(spec) + cost.encoder_params(encoder)
    return cost.weight_bytes(params, request.dtype) + request.batch * request_cache_bytes(spec, tokens, request)


def request_cache_bytes(spec: DecoderSpec, tokens: int, request: Request) -> Number:
    """Keys and values of one request at the end of its answer."""
    return cost.cache_bytes(spec, tokens + request.question_tokens + request.answer_tokens, request.dtype)


def time(work: Work, request: Request) -> PartTime:
    """Seconds of one part on the request's chip."""
    if request.on is None:
        raise ValueError("a request without a chip has no latency")
    return part_time(work.flops, work.moved_bytes, request.on, request.chips, request.efficiency)


CALIBRATION = ("chip", "chips", "flops", "bytes", "secs")


def calibrate(path: str | Path) -> Efficiency:
    """Efficiencies from measured parts: a CSV with columns chip, chips, flops, bytes, secs, one measured part a row.

    Each row is explained by the slower of its two limits; the two efficiencies are the geometric means over the rows
    they explain, found by alternating. One that explains no row keeps its default. Raises `UserError` for a bad row.
    """
    try:
        rows = list(csv.DictReader(Path(path).read_text().splitlines()))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if not rows or any(name not in rows[0] for name in CALIBRATION):
        raise UserError(f"{path}: needs a header with {','.join(CALIBRATION)} and at least one row")
    shares = [_shares(row, f"{path}:{number}") for number, row in enumerate(rows, start=2)]
    best, best_miss = Efficiency(), math.inf
    for start in (Efficiency(), Efficiency(1, 1), Efficiency(0.1, 1), Efficiency(1, 0.1)):
        found = start
        for _ in range(50):
            by_compute = [c for c, m in shares if c / found.compute >= m / found.bandwidth]
            by_memory = [m for c, m in shares if c / found.compute < m / found.bandwidth]
            new = Efficiency(_mean(by_compute) or found.compute, _mean(by_memory) or found.bandwidth)
            if new == found:
                break
            found = new
        miss = sum(math.log(max(c / found.compute, m / found.bandwidth)) ** 2 for c, m in shares)
        if miss < best_miss:
            best, best_miss = found, miss
    return best


def _shares(row: dict[str, str], where: str) -> tuple[float, float]:
    """(FLOPs, bytes) of a row as shares of what the chips could do in its time."""
    try:
        chips, flops, moved, secs = (float(row[name]) for name in CALIBRATION[1:])
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {','.join(CALIBRATION[1:])} must be numbers") from error
    if not (chips >= 1 and flops > 0 and moved > 0 and secs > 0):
        raise UserError(f"{where}: {','.join(CALIBRATION[1:])} must be above 0")
    on = chip(row["chip"])
    compute, memory = flops / (on.peak_flops * chips * secs), moved / (on.bandwidth * chips * secs)
    if max(compute, memory) > 1:
        raise UserError(f"{where}: faster than the peak of {on.name} allows; check flops, bytes and secs")
    return compute, memory


def _mean(values: list[float]) -> float | None:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None
