"""The planner's latencies against measured ones.

Each cell is an (encoder, V, LLM, batch) with random bfloat16 weights. Encoder, prefill (compressor, projector, prompt
and first token) and decoding are timed with the programs that `vlm_jax.generate` runs. Half of the cells calibrate the
chip's efficiencies, and `sizing.roofline.request_times` predicts the others from these.
"""

import csv
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.gpu.cases import Case
from experiments.gpu.results import Results, Row
from experiments.gpu.sizes import Sizes
from experiments.gpu.training import COMPRESSOR
from vlm_jax.compress import catalog
from vlm_jax.core.specs import ComputeSpec, ModelSpec
from vlm_jax.core.structs import Inputs, Params, Views
from vlm_jax.data.rows import bucket
from vlm_jax.distributed import partitioning
from vlm_jax.inference import decoding, programs, sampling
from vlm_jax.models.decoder import unstack_layers
from vlm_jax.models.vlm import Vlm
from vlm_jax.sizing import calibration, chips, cost, roofline

PART = "planner"
TARGET = 0.10
PARTS = ("encoder", "prefill", "decode")
_COMPUTE = ComputeSpec("bfloat16", "none", "xla", 1, "replicated", (1, 1, 1))


def cases(sizes: Sizes, results: Results, chip: chips.Chip) -> list[Case]:
    """A case for each cell. The prediction follows from their rows, see `prediction`."""
    return [
        Case(
            cell_name(model, batch),
            functools.partial(compiled_parts, model, batch, sizes),
            functools.partial(measured, model, batch, sizes, chip),
        )
        for model, batch in cells(sizes)
    ]


def cells(sizes: Sizes) -> Iterator[tuple[ModelSpec, int]]:
    """(model, batch) of every cell; neighbours differ in one of LLM, V and batch."""
    for decoder in sizes.decoders:
        for tokens in sizes.tokens:
            for batch in sizes.batches:
                yield catalog.model_spec(sizes.encoder, COMPRESSOR, tokens, decoder), batch


def calibrates(sizes: Sizes, model: ModelSpec, batch: int) -> bool:
    """Whether a cell calibrates: a chessboard over LLM, V and batch, so that both halves have all of them."""
    names = [decoder.name for decoder in sizes.decoders]
    places = names.index(model.decoder.name), sizes.tokens.index(model.compressor.tokens), sizes.batches.index(batch)
    return sum(places) % 2 == 0


def cell_name(model: ModelSpec, batch: int) -> str:
    return f"{model.decoder.name}, V = {model.compressor.tokens}, batch {batch}"


def compiled_parts(model: ModelSpec, batch: int, sizes: Sizes) -> dict[str, Callable[..., Any]]:
    """Functions that run a part and wait for it, each already called once: "encoder" and "prefill" of nothing, "decode"
    of what "prefill" returned.
    """
    compute = sampling.compute_for_decoding(_COMPUTE)
    plan = partitioning.make_plan(compute, jax.local_devices()[:1])
    vlm, config, count = Vlm(model, compute), (model, compute, plan), sizes.answer_tokens
    params = random_params(model, plan)
    encode = plan.jit(lambda params, pixels: vlm.features(params, pixels))
    side = model.encoder.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), np.uint8)
    pixels, limits = plan.put((pixels, decoding.sampling_params(batch, count, 0.0, 1.0, 0)))
    features = jax.tree.map(lambda leaf: leaf[:, None], encode(params, pixels))
    inputs = prompt(model, batch, sizes)._replace(views=Views(features=features))
    inputs = jax.device_put(inputs, plan.examples)
    first = programs.prefill_program(*config, count)
    start = programs.start_program(*config, (), count, "greedy")
    decode = programs.decode_program(*config, (), "greedy")

    def prefill() -> Any:
        prefilled = first(params, inputs)
        state = start(params, prefilled.hidden, limits)
        return jax.block_until_ready(state._replace(cache=prefilled.cache))

    parts = {
        "encoder": lambda: jax.block_until_ready(encode(params, pixels)),
        "prefill": prefill,
        "decode": lambda state: jax.block_until_ready(decode(params, state, limits, np.int32(count))),
    }
    parts["decode"](parts["prefill"]())
    return parts


def random_params(model: ModelSpec, plan: partitioning.Plan) -> Params:
    """Random bfloat16 weights with unrolled layers. They are drawn stacked, which compiles faster."""
    vlm = Vlm(model, _COMPUTE)

    def init(key: jax.Array) -> Params:
        weights = {**vlm.init(key), "encoder": vlm.init_encoder(key)}
        return jax.tree.map(lambda leaf: leaf.astype("bfloat16"), weights)

    params = plan.init(init, jax.random.key(0))
    params["decoder"] = unstack_layers(params.pop("decoder"), model.decoder.depth)
    return params


def prompt(model: ModelSpec, batch: int, sizes: Sizes) -> Inputs:
    """V visual tokens and a question in every row, padded on the right as `vlm_jax.generate` does."""
    visual, text = model.compressor.tokens, sizes.question_tokens
    place = np.tile(np.arange(visual + bucket(text), dtype=np.int32), (batch, 1))
    valid = (place < visual + text).astype(np.int32)
    tokens = np.random.default_rng(1).integers(1, model.decoder.vocab, place.shape, np.int32)
    return Inputs(tokens * valid, valid, place * valid, place * valid, np.where(place < visual, place, -1))


def measured(
    model: ModelSpec, batch: int, sizes: Sizes, chip: chips.Chip, parts: dict[str, Callable[..., Any]]
) -> dict[str, Any]:
    """FLOPs, bytes and median seconds of every part of a batch of requests."""
    times: dict[str, list[float]] = {name: [] for name in PARTS}
    for _ in range(sizes.repeats):
        state = None
        for name in PARTS:
            start = time.perf_counter()
            found = parts[name](state) if name == "decode" else parts[name]()
            times[name].append(time.perf_counter() - start)
            state = found if name == "prefill" else state
    lengths = sizes.question_tokens, sizes.answer_tokens
    flops, moved = cost.flops(model, *lengths).by_part, cost.moved_bytes(model, *lengths, batch)
    return {
        "chip": chip.name, "llm": model.decoder.name, "tokens": model.compressor.tokens, "batch": batch,
        "calibrates": calibrates(sizes, model, batch),
        "parts": {
            name: {
                "flops": batch * sum(flops[part] for part in _planned(name)),
                "bytes": sum(moved[part] for part in _planned(name)),
                "secs": statistics.median(times[name]),
            }
            for name in PARTS
        },
    }  # fmt: skip


def _planned(part: str) -> tuple[str, ...]:
    """The parts of `cost.PARTS` in a measured part."""
    return {"encoder": ("encoder",), "prefill": ("compressor", "question", "prefill"), "decode": ("decode",)}[part]


def write_calibration(path: Path, rows: Iterable[Row]) -> None:
    """The CSV that `--calibrate` of `vlm_jax.plan` reads, from the calibrating cells of one device."""
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(calibration.CALIBRATION)
        for row in rows:
            for part in row["parts"].values() if row["calibrates"] else ():
                table.writerow([row["chip"], 1, part["flops"], part["bytes"], part["secs"]])


def prediction(sizes: Sizes, rows: Mapping[str, Row]) -> dict[str, dict[str, float]]:
    """Relative errors of the planner's seconds, by cell that does not calibrate, of the parts and of their sum
    "request". `rows` are the cells of one device by name; {} unless all are measured.
    """
    every = [(model, batch, cell_name(model, batch)) for model, batch in cells(sizes)]
    if any("parts" not in rows.get(name, {}) for _, _, name in every):
        return {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "calibration.csv"
        write_calibration(path, [rows[name] for _, _, name in every])
        efficiency = calibration.calibrate(path)
    errors = {}
    for model, batch, name in every:
        if not calibrates(sizes, model, batch):
            on = chips.chip(rows[name]["chip"])
            request = roofline.Request(sizes.question_tokens, sizes.answer_tokens, batch, on=on, efficiency=efficiency)
            times = roofline.request_times(model, request)
            planned = {part: sum(times[each].secs for each in _planned(part)) for part in PARTS}
            actual = {part: values["secs"] for part, values in rows[name]["parts"].items()}
            errors[name] = {part: planned[part] / actual[part] - 1 for part in PARTS}
            errors[name]["request"] = sum(planned.values()) / sum(actual.values()) - 1
    return errors


def median_errors(errors: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Medians over the cells of the absolute errors, by part; {} without cells."""
    parts = (*PARTS, "request") if errors else ()
    return {part: statistics.median(abs(each[part]) for each in errors.values()) for part in parts}
