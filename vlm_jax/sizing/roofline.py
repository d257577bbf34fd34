"""How long work takes on a chip: a request part by part, or one call of a compiled program.

A part of a request takes max(FLOPs / (peak x efficiency), bytes / (bandwidth x efficiency)): compute and memory traffic
overlap, parts do not (the roofline model, doi:10.1145/1498765.1498785). Several chips are an ideal division of work and
bytes: traffic between chips, the host and queues are left out, so these times are lower bounds.

For a compiled program: how long it takes at least, and about how long, by compute, memory and network of one chip.

Work is analytic (`sizing.cost`), the network is read from the program (`sizing.hlo`). Assumptions, in order of weight:

1. Products reach `Efficiency.compute` of the peak, memory and network their shares of their bandwidths.
2. Products, memory traffic and the exchanges that XLA runs beside products overlap perfectly; exchanges that it does
   not run beside products add their whole time. step = max(compute, memory, hidden) + exposed.
3. A kernel that rests split is written once and read once for every gather; scores of attention go through memory in
   float32 unless attention is fused; other activations as in `cost.decoder_activation_bytes`.
4. A ring over a mesh axis uses the links of the torus dimensions along which the axis extends: both directions where
   the dimension closes on itself, one where it does not. Between slices every chip has `_BETWEEN_SLICES`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from vlm_jax.core.specs import ModelSpec, RunSpec, StageSpec
from vlm_jax.sizing import cost
from vlm_jax.sizing.chips import ASSUMED, Chip, Efficiency
from vlm_jax.sizing.hlo import SLICE, Collective

_BETWEEN_SLICES = 3.1e9  # bytes/s of one chip: a share of its host's network card, an assumption
_RESIDENT = 4  # bytes of a parameter or moment at rest


@dataclass(frozen=True)
class Request:
    """What is asked, an image and a question at a time, and how it is served."""

    question_tokens: cost.Number = 50
    answer_tokens: cost.Number = 20
    batch: int = 1
    question: cost.Question = "fresh"
    dtype: str = "bfloat16"
    on: Chip | None = None  # None: no latency
    chips: int = 1
    efficiency: Efficiency = ASSUMED


class PartTime(NamedTuple):
    """Seconds of one part, and which of the two limits it."""

    secs: float
    binds: Literal["compute", "memory"]


def part_time(
    flops: int | float, moved_bytes: int | float, on: Chip, chips: int = 1, efficiency: Efficiency = ASSUMED
) -> PartTime:
    """Seconds for `flops` and `moved_bytes`, both summed over the batch, on `chips` chips."""
    compute = flops / (on.peak_flops * efficiency.compute * chips)
    memory = moved_bytes / (on.bandwidth * efficiency.bandwidth * chips)
    return PartTime(compute, "compute") if compute >= memory else PartTime(memory, "memory")


def request_times(model: ModelSpec, request: Request) -> dict[str, PartTime]:
    """Of a batch of requests, by `cost.PARTS`. `request.on` must be a chip."""
    asked, batch = (request.question_tokens, request.answer_tokens), request.batch
    flops = cost.flops(model, *asked, request.question).by_part
    moved = cost.moved_bytes(model, *asked, batch, request.dtype, request.question)
    how = (request.on, request.chips, request.efficiency)
    return {part: part_time(batch * flops[part], moved[part], *how) for part in cost.PARTS}


class Work(NamedTuple):
    """What the whole program does, over all chips."""

    model_flops: float  # progress; what MFU counts
    flops: float  # with what is computed again in the backward pass
    chip_bytes: float  # through the memory of one chip


class Prediction(NamedTuple):
    """Seconds of one call. The first four are at vendor peaks; `step_secs` is at the assumed efficiencies."""

    compute_secs: float
    memory_secs: float
    hidden_secs: float  # of the network, beside products
    exposed_secs: float  # of the network, with nothing beside it
    step_secs: float
    mfu: float
    binds: str
    compiler_secs: float  # what XLA:TPU itself expects of products and memory, the network not counted; 0: not known


def train_work(spec: RunSpec, stage: StageSpec, chips: int, kept_apart: int = 1, rests_apart: int = 1) -> Work:
    """One step of a stage on that many devices. `kept_apart` is into how many parts a kernel stays cut while it is
    multiplied, `rests_apart` into how many between its uses.
    """
    model, remat = spec.model, spec.compute.remat
    decoder, data = model.decoder, spec.data
    examples, length = data.batch_examples, data.text_tokens + cost.image_copies(spec) * model.compressor.tokens
    useful = cost.step_flops(spec, stage)
    again = cost.pass_flops(decoder, length, length, length)
    repeated = {"none": again.head, "dots": again.head + again.attention, "block": again.total}[remat]
    sizes = cost.params(model)
    passes = {"none": 2, "dots": 2, "block": 3}[remat]
    learned = sum({"encoder": sizes.encoder, "connector": sizes.compressor + sizes.projector,
                   "decoder": sizes.decoder + sizes.embedding}[part] for part in stage.train)  # fmt: skip
    dtype = cost.dtype_bytes(spec.compute.dtype)
    kernels = (
        _kernel_bytes(sizes.total / kept_apart, dtype, passes, rests_apart > kept_apart)
        + 2 * dtype * learned
        + 7 * _RESIDENT * learned / rests_apart
    )
    activations = (passes + 2) * _pass_bytes(spec, length, length)
    if not spec.data.frozen_features:
        activations += cost.encoder_activation_bytes(model.encoder, spec.compute.dtype)
    logits = 9 * 4 * decoder.vocab * length
    return Work(useful, useful + examples * repeated, kernels + (activations + logits) * examples / chips)


def prefill_work(spec: RunSpec, chips: int, kept_apart: int = 1, rests_apart: int = 1) -> Work:
    """Image and text of every row of a batch, and one word's logits each; arguments as above."""
    model, rows = spec.model, spec.evaluation.batch_examples
    length = spec.data.text_tokens + model.compressor.tokens
    flops = rows * cost.flops(model, spec.data.text_tokens, 1).total
    held = cost.params(model).total / kept_apart
    kernels = _kernel_bytes(held, cost.dtype_bytes(spec.compute.dtype), 1, rests_apart > kept_apart)
    activations = _pass_bytes(spec, length, length) + cost.encoder_activation_bytes(model.encoder, spec.compute.dtype)
    return Work(flops, flops, kernels + activations * rows / chips)


def decode_work(spec: RunSpec, chips: int, kept_apart: int = 1, rests_apart: int = 1) -> Work:
    """One more word for every row of a batch, behind a full context; arguments as above."""
    decoder, rows = spec.model.decoder, spec.evaluation.batch_examples
    keys = spec.data.text_tokens + spec.model.compressor.tokens + spec.evaluation.max_new_tokens
    flops = rows * cost.pass_flops(decoder, 1, keys, 1).total
    held = cost.decoder_params(decoder) / kept_apart
    kernels = _kernel_bytes(held, cost.dtype_bytes(spec.compute.dtype), 1, rests_apart > kept_apart)
    cache = cost.cache_bytes(decoder, keys, spec.compute.dtype)
    return Work(flops, flops, kernels + cache * rows / chips)


def _kernel_bytes(params: float, dtype_bytes: int, passes: int, gathered: bool) -> float:
    """Each pass reads a kernel; one that rests in more parts (`gathered`) it also writes."""
    return params * dtype_bytes * passes * (2 if gathered else 1)


def _pass_bytes(spec: RunSpec, tokens: int, keys: int) -> cost.Number:
    decoder = spec.model.decoder
    moved = cost.decoder_activation_bytes(decoder, tokens, spec.compute.dtype)
    fused = spec.compute.attention != "xla"
    return moved + (0 if fused else 4 * 4 * decoder.depth * decoder.heads * tokens * keys)


def predict(
    work: Work,
    collectives: Sequence[Collective],
    chip: Chip,
    chips: int,
    link_share: Callable[[tuple[str, ...]], float],
    cycles: float = 0.0,
    efficiency: Efficiency = ASSUMED,
) -> Prediction:
    """Seconds of a program on that many chips; `link_share` says what part of a chip's links a group can use, `cycles`
    what the compiler expects. The part that takes the most of the step binds; exchanges with nothing beside them, which
    nothing hides, count as network.
    """
    network = {True: 0.0, False: 0.0}
    for found in collectives:
        speed = _BETWEEN_SLICES if SLICE in found.axes else chip.interconnect * link_share(found.axes)
        network[found.beside_products] += found.wire_bytes / speed
    compute, memory = work.flops / chips / chip.peak_flops, work.chip_bytes / chip.bandwidth
    hidden, exposed = network[True], network[False]
    overlapped = {
        "compute": compute / efficiency.compute,
        "memory": memory / efficiency.bandwidth,
        "network": hidden / efficiency.interconnect,
    }
    binds = max(overlapped, key=lambda name: overlapped[name])
    alone = exposed / efficiency.interconnect
    step = overlapped[binds] + alone
    if alone > overlapped[binds]:
        binds = "network"
    mfu = work.model_flops / (step * chips * chip.peak_flops)
    own = cycles / chip.clock if chip.clock else 0.0
    return Prediction(compute, memory, hidden, exposed, step, mfu, binds, own)


def ring_share(places: Sequence[tuple[int, ...]], extent: tuple[int, ...], chip: Chip) -> float:
    """Part of a chip's links that a ring over these places of a torus uses; `extent` is the whole torus.

    A v5e or v6e dimension closes on itself at 16 chips, a three-dimensional one at every multiple of 4.
    """
    if not chip.torus:
        return 1.0
    links = 0
    for dimension, size in enumerate(extent):
        along = len({place[dimension] for place in places})
        closes = size == 16 if chip.torus == 2 else size % 4 == 0
        links += 0 if along == 1 else 2 if along == size and closes else 1
    return max(links, 1) / (2 * chip.torus)


def torus_extent(places: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Sides of the torus that these places fill."""
    return tuple(max(side) + 1 for side in zip(*places, strict=True))
