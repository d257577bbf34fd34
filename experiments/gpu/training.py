"""MFU of the train step: packed rows, stored features of a frozen encoder, random weights.

MFU is the model FLOPs of a step (`sizing.cost.step_flops`: recomputation is not counted, attention is counted densely)
over its seconds and the chip's peak. A step is timed within a row of steps that starts and ends with a finished device.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from experiments.data_speed import packing
from experiments.gpu import correctness
from experiments.gpu.cases import Case
from experiments.gpu.results import Results
from experiments.gpu.sizes import Sizes, StepChoice
from vlm_jax import build
from vlm_jax.build.fitting import with_shardings
from vlm_jax.compress import catalog
from vlm_jax.core.specs import DecoderSpec, RunSpec
from vlm_jax.core.structs import Inputs, Views, Visual
from vlm_jax.data import rows
from vlm_jax.data.packing import RowLayout
from vlm_jax.data.rows import RowPlan
from vlm_jax.distributed import partitioning
from vlm_jax.sizing import cost
from vlm_jax.sizing.chips import Chip
from vlm_jax.training import step as training_step

PART = "training"
TARGET = 0.45
COMPRESSOR = "resampler"
_WARM_UP = 2
_CONVERSATIONS = 2000


def cases(sizes: Sizes, results: Results, chip: Chip) -> list[Case]:
    """The most promising choice of every cell first."""
    attention = "cudnn" if correctness.fused_is_correct(results) else "xla"
    attention = attention if jax.default_backend() != "cpu" else "xla"
    cells = [(decoder, tokens) for decoder in sizes.decoders for tokens in sizes.tokens]
    return [case(sizes, *cell, choice, attention, chip) for choice in sizes.choices for cell in cells]


def cell_name(decoder: DecoderSpec, tokens: int) -> str:
    return f"{decoder.name}, V = {tokens}"


def choice_name(decoder: DecoderSpec, tokens: int, choice: StepChoice) -> str:
    return f"{cell_name(decoder, tokens)}, {choice.batch_rows} rows, remat {choice.remat}"


def case(
    sizes: Sizes, decoder: DecoderSpec, tokens: int, choice: StepChoice, attention: str, chip: Chip
) -> Case:  # fmt: skip
    """One cell with one choice of how it runs."""
    spec = run_spec(sizes, decoder, tokens, choice, attention)
    name = choice_name(decoder, tokens, choice)

    def measure(prepared: tuple[Callable[..., Any], Any, Inputs, float]) -> dict[str, Any]:
        program, state, inputs, fill = prepared
        secs = step_secs(program, state, inputs, sizes.steps)
        flops = cost.step_flops(spec, spec.stages[0])
        return {
            "cell": cell_name(decoder, tokens), **choice._asdict(), "attention": attention, "chip": chip.name,
            "step_secs": secs, "step_flops": flops, "mfu": flops / secs / chip.peak_flops, "row_fill": fill,
            "tokens_per_sec": choice.batch_rows * sizes.row_tokens / secs,
        }  # fmt: skip

    return Case(name, lambda: compiled_step(spec), measure, may_not_fit=True)


def run_spec(sizes: Sizes, decoder: DecoderSpec, tokens: int, choice: StepChoice, attention: str) -> RunSpec:
    """LLaVA's second stage on stored features: connector and decoder are trained."""
    spec = packing.recipe(
        f"configs/llava.py:stage=2,llm=qwen1.5-0.5b,tokens={min(tokens, 1)},devices=1,tensor=1,batch=1"
    )
    model = catalog.model_spec(sizes.encoder, COMPRESSOR, tokens, decoder)
    conversation = tokens + packing.MEAN
    data = dataclasses.replace(
        spec.data, batch_rows=choice.batch_rows, row_tokens=sizes.row_tokens, frozen_features=True, pack="fit",
        row_images=max(1, round(1.5 * sizes.row_tokens / conversation)),
    )  # fmt: skip
    compute = dataclasses.replace(
        spec.compute, dtype="bfloat16", remat=choice.remat, attention=attention, strategy="replicated", mesh=(1, 1, 1)
    )
    stages = (dataclasses.replace(spec.stages[0], data=None, total_steps=1000, epochs=0.0, warmup_steps=10),)
    evaluation = dataclasses.replace(spec.evaluation, batch_examples=1)
    return dataclasses.replace(spec, model=model, data=data, compute=compute, stages=stages, evaluation=evaluation)


def compiled_step(spec: RunSpec) -> tuple[Callable[..., Any], Callable[[], Any], Inputs, float]:
    """(compiled step, function that makes its first state, a batch on the host, share of positions in use)."""
    plan = partitioning.make_plan(spec.compute, jax.local_devices()[:1])
    network = build.lay_out(spec, plan)
    stage = spec.stages[0]
    update = build.train_step(network, stage)
    inputs, fill = packed_inputs(spec)
    abstract = with_shardings(nn.meta.unbox(update.abstract), update.shardings)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=plan.examples), inputs)
    program = update.program.lower(abstract, shapes, None).compile()

    def first_state() -> Any:
        params = plan.init(network.model.init, jax.random.key(0))
        return training_step.init_state(params, update.optimiser, stage.train)

    return lambda state, batch: program(state, batch, None), first_state, inputs, fill


def packed_inputs(spec: RunSpec) -> tuple[Inputs, float]:
    """A batch of packed conversations of drawn lengths with random features, and the share of positions in use."""
    data, tokens = spec.data, spec.model.compressor.tokens
    mixture = packing.drawn(_CONVERSATIONS)
    found, fill, sizes = packing.epoch(mixture, data, tokens)
    plans = [RowPlan(found[row].tolist(), sizes.ids[found[row]].tolist()) for row in range(data.batch_rows)]
    inputs, _ = rows.pack(mixture, plans, RowLayout(tokens), data.row_tokens)
    shape = (data.batch_rows, data.row_images, spec.model.encoder.patches, spec.model.encoder.width)
    features = np.random.default_rng(0).standard_normal(shape, np.float32).astype(np.float16)
    return inputs._replace(views=Views(features=Visual(features))), fill


def step_secs(program: Callable[..., Any], first_state: Callable[[], Any], inputs: Inputs, steps: int) -> float:
    """Mean seconds of `steps` steps after a warm-up."""
    state, batch = first_state(), jax.device_put(inputs)
    for _ in range(_WARM_UP):
        state, sums, _ = program(state, batch)
    jax.block_until_ready((state, sums))
    start = time.perf_counter()
    for _ in range(steps):
        state, sums, _ = program(state, batch)
    jax.block_until_ready((state, sums))
    secs = (time.perf_counter() - start) / steps
    if not np.isfinite(float(sums.nll)):
        raise RuntimeError("expected a finite loss, got " + str(float(sums.nll)))
    return secs
