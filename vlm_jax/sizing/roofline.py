"""Roofline times on a chip: of a request part by part, or of one call of a compiled program.

A part of a request takes max(FLOPs / (peak x efficiency), bytes / (bandwidth x efficiency)): compute and memory traffic
overlap, parts do not (the roofline model, doi:10.1145/1498765.1498785). Several chips divide work and bytes evenly:
traffic between chips, the host and queues are left out, so these times are lower bounds.

For a compiled program, compute and memory traffic are analytic (`sizing.cost`) and the network is read from the program
(`sizing.hlo`). Assumptions, in order of weight:

1. Products reach `Efficiency.compute` of the peak, memory and network their shares of their bandwidths.
2. Products, memory traffic and the collectives that XLA overlaps with products overlap perfectly; other collectives
   add their whole time. step = max(compute, memory, hidden) + exposed.
3. A kernel that is gathered is written once and read once per gather; attention scores go through memory in float32
   unless attention is fused; other activations as in `cost.decoder_activation_bytes`.
4. A ring over a mesh axis uses the links of the torus dimensions along which the axis extends: both directions where
   the dimension wraps around, one where it does not. Between slices every chip has `_DCN_BANDWIDTH`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from vlm_jax.compress import catalog
from vlm_jax.core import specs
from vlm_jax.core.specs import ModelSpec, RunSpec, StageSpec
from vlm_jax.sizing import compression, cost, remat
from vlm_jax.sizing.chips import ASSUMED, Chip, Efficiency
from vlm_jax.sizing.hlo import SLICE, Collective

_DCN_BANDWIDTH = 3.1e9  # bytes/s per chip: its share of the host's network card, an assumption
_STATE_BYTES = 4  # of a parameter or moment


@dataclass(frozen=True)
class Request:
    """An image with a question, and how it is served."""

    question_tokens: cost.Number = 50
    answer_tokens: cost.Number = 20
    batch: int = 1
    question: cost.Question = "fresh"
    dtype: str = "bfloat16"
    on: Chip | None = None  # None: no latency
    chips: int = 1
    efficiency: Efficiency = ASSUMED


class PartTime(NamedTuple):
    """Seconds of one part, and which resource limits it."""

    secs: float
    binds: Literal["compute", "memory"]


def part_time(
    flops: int | float, moved_bytes: int | float, on: Chip, chips: int = 1, efficiency: Efficiency = ASSUMED
) -> PartTime:
    """Seconds for `flops` and `moved_bytes`, both summed over the batch, on `chips` chips."""
    compute = flops / (on.peak_flops * efficiency.compute * chips)
    memory = moved_bytes / (on.bandwidth * efficiency.bandwidth * chips)
    return PartTime(compute, "compute") if compute >= memory else PartTime(memory, "memory")


def request_work(model: ModelSpec, request: Request) -> dict[str, tuple[cost.Number, cost.Number]]:
    """(FLOPs, bytes of memory traffic) of a batch of requests on any chip, by `cost.PARTS`."""
    lengths, batch = (request.question_tokens, request.answer_tokens), request.batch
    flops = cost.flops(model, *lengths, request.question).by_part
    moved = cost.moved_bytes(model, *lengths, batch, request.dtype, request.question)
    return {part: (batch * flops[part], moved[part]) for part in cost.PARTS}


def times(work: dict[str, tuple[cost.Number, cost.Number]], request: Request) -> dict[str, PartTime]:
    """Seconds of `request_work` on `request.on`, by part."""
    hardware = (request.on, request.chips, request.efficiency)
    return {part: part_time(flops, moved, *hardware) for part, (flops, moved) in work.items()}


def request_times(model: ModelSpec, request: Request) -> dict[str, PartTime]:
    """Seconds of a batch of requests, by `cost.PARTS`. `request.on` must be a chip."""
    return times(request_work(model, request), request)


class Work(NamedTuple):
    """FLOPs of the whole program over all chips, and memory traffic of one chip."""

    model_flops: float  # what MFU counts
    flops: float  # with rematerialisation
    chip_bytes: float


class Prediction(NamedTuple):
    """Seconds of one call. The first four are at vendor peaks; `step_secs` is at the assumed efficiencies."""

    compute_secs: float
    memory_secs: float
    hidden_secs: float  # network, overlapped with products
    exposed_secs: float  # network, not overlapped
    step_secs: float
    mfu: float
    binds: str
    compiler_secs: float  # XLA:TPU's own estimate of products and memory, without the network; 0: not known


def train_work(spec: RunSpec, stage: StageSpec, chips: int, compute_shards: int = 1, storage_shards: int = 1) -> Work:
    """Work of one train step on that many devices. A kernel has `compute_shards` shards while it is multiplied and
    `storage_shards` in the train state.
    """
    model = spec.model
    decoder, data = model.decoder, specs.data_of(spec, stage)
    examples, length, views = data.batch_rows, data.row_tokens, compression.views_of_row(spec, data)
    useful = cost.step_flops(spec, stage)
    sizes = cost.params(model)
    passes = 2 if spec.compute.remat in ("none", "dots") else 3  # over kernels and activations
    learned = sum({"encoder": sizes.encoder, "connector": sizes.compressor + sizes.projector,
                   "decoder": sizes.decoder + sizes.embedding}[part] for part in stage.train)  # fmt: skip
    dtype = cost.dtype_bytes(spec.compute.dtype)
    kernels = (
        _kernel_bytes(spec, sizes.total / compute_shards, passes, storage_shards > compute_shards)
        + 2 * dtype * learned
        + 7 * _STATE_BYTES * learned / storage_shards
    )
    activations = (passes + 2) * _pass_bytes(spec, length, length)
    if not spec.data.frozen_features:
        activations += views * cost.encoder_activation_bytes(model.encoder, spec.compute.dtype)
    logits = 9 * 4 * decoder.vocab * length
    flops = useful + examples * remat.recomputed_flops(spec, stage)
    return Work(useful, flops, kernels + (activations + logits) * examples / chips)


def prefill_work(spec: RunSpec, chips: int, compute_shards: int = 1, storage_shards: int = 1) -> Work:
    """Work of prefill: image and text of every row, and one position's logits each; arguments as in `train_work`."""
    model, rows = spec.model, spec.evaluation.batch_examples
    length = spec.data.row_tokens
    flops = rows * cost.flops(model, length - catalog.entering(model.compressor), 1).total
    kernels = _kernel_bytes(spec, cost.params(model).total / compute_shards, 1, storage_shards > compute_shards)
    activations = _pass_bytes(spec, length, length) + cost.encoder_activation_bytes(model.encoder, spec.compute.dtype)
    return Work(flops, flops, kernels + activations * rows / chips)


def decode_work(spec: RunSpec, chips: int, compute_shards: int = 1, storage_shards: int = 1) -> Work:
    """Work of one decode step for every row, behind a full context; arguments as in `train_work`."""
    decoder, rows = spec.model.decoder, spec.evaluation.batch_examples
    text = spec.data.row_tokens - catalog.entering(spec.model.compressor)
    keys = text + compression.mean(compression.cached(spec.model)) + spec.evaluation.max_new_tokens
    flops = rows * cost.pass_flops(decoder, 1, keys, 1).total
    kernels = _kernel_bytes(spec, cost.decoder_params(decoder) / compute_shards, 1, storage_shards > compute_shards)
    cache = cost.cache_bytes(decoder, keys, spec.compute.dtype)
    return Work(flops, flops, kernels + cache * rows / chips)


def _kernel_bytes(spec: RunSpec, params: float, passes: int, gathered: bool) -> float:
    """Each pass reads a kernel, and writes it first if it is gathered from more shards."""
    return params * cost.dtype_bytes(spec.compute.dtype) * passes * (2 if gathered else 1)


def _pass_bytes(spec: RunSpec, tokens: int, keys: int) -> cost.Number:
    decoder = spec.model.decoder
    moved = cost.decoder_activation_bytes(decoder, tokens, spec.compute.dtype)
    fused = spec.compute.attention != "xla"
    return moved + (0 if fused else 4 * 4 * decoder.depth * decoder.heads * tokens * keys)


def predict(
    work: Work, collectives: Sequence[Collective], chip: Chip, chips: int,
    link_share: Callable[[tuple[str, ...]], float], cycles: float = 0.0, efficiency: Efficiency = ASSUMED,
) -> Prediction:  # fmt: skip
    """Seconds of a program on that many chips. `link_share` gives the share of a chip's links that a group can use,
    `cycles` is the compiler's estimate. The resource that takes most of the step binds; exposed collectives count as
    network.
    """
    network = {True: 0.0, False: 0.0}
    for each in collectives:
        speed = _DCN_BANDWIDTH if SLICE in each.axes else chip.interconnect * link_share(each.axes)
        network[each.beside_products] += each.wire_bytes / speed
    compute, memory = work.flops / chips / chip.peak_flops, work.chip_bytes / chip.bandwidth
    hidden, exposed = network[True], network[False]
    limits = (compute / efficiency.compute, memory / efficiency.bandwidth, hidden / efficiency.interconnect)
    added = exposed / efficiency.interconnect
    step = max(limits) + added
    binds = "network" if added > max(limits) else ("compute", "memory", "network")[limits.index(max(limits))]
    mfu = work.model_flops / (step * chips * chip.peak_flops)
    compiler_secs = cycles / chip.clock if chip.clock else 0.0
    return Prediction(compute, memory, hidden, exposed, step, mfu, binds, compiler_secs)


def ring_share(coords: Sequence[tuple[int, ...]], extent: tuple[int, ...], chip: Chip) -> float:
    """Share of a chip's links that a ring over these torus coordinates uses; `extent` is the whole torus.

    A v5e or v6e dimension wraps around at 16 chips, a three-dimensional one at every multiple of 4.
    """
    if not chip.torus:
        return 1.0
    links = 0
    for dimension, size in enumerate(extent):
        along = len({coord[dimension] for coord in coords})
        wraps = size == 16 if chip.torus == 2 else size % 4 == 0
        links += 0 if along == 1 else 2 if along == size and wraps else 1
    return max(links, 1) / (2 * chip.torus)


def torus_extent(coords: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Sides of the torus that these coordinates fill."""
    return tuple(max(side) + 1 for side in zip(*coords, strict=True))
