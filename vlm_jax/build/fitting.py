"""Memory of a train step on its devices, from the compiled program, and the rematerialisation that fits there.

`compute.remat="auto"` is the first of `sizing.remat.POLICIES`, least recomputation first, whose step fits. Training
asks the compiler of its devices, `vlm_jax.aot` that of a topology. What cannot fit by the bytes that it keeps is not
compiled.
"""

import dataclasses
import re
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from vlm_jax.build.network import Network, train_step
from vlm_jax.core import axes, specs
from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import RunSpec, StageSpec
from vlm_jax.core.structs import Inputs, Views
from vlm_jax.data.features import empty
from vlm_jax.distributed import processes
from vlm_jax.distributed.partitioning import Plan
from vlm_jax.models.vlm import Vlm
from vlm_jax.sizing import compression, remat

AUTO = "auto"
MARGIN = 0.03  # of a device's memory, for the next batch, metrics and fragmentation
MIB, GIB = 2**20, 2**30


class Memory(NamedTuple):
    """Bytes on one device."""

    params: float
    optimiser: float
    other_inputs: float  # batch, cache
    temporaries: float
    peak: float


class Program(NamedTuple):
    """A compiled program; one that does not fit has an empty `text` and its required bytes as `memory.peak`."""

    memory: Memory
    text: str
    compile_secs: float


class Fitted(NamedTuple):
    """A policy with the program of each stage; the last policy where none fits."""

    policy: str
    programs: tuple[Program, ...]
    fits: bool


def usable_bytes(plan: Plan) -> float | None:
    """The memory of one device of a plan that programs may use, the same in every process; None where it is not known,
    as on a CPU."""
    device = next(each for each in plan.mesh.devices.flat if each.process_index == jax.process_index())
    if device.platform == "cpu":
        return None
    limit = (device.memory_stats() or {}).get("bytes_limit", 0)
    return processes.broadcast_from_primary(limit // MIB) * float(MIB) or None


def fitted(network: Network, limit: float | None, stages: Iterable[StageSpec]) -> tuple[Network, Fitted | None]:
    """The network with "auto" replaced by the first policy with which the steps of these stages fit in `limit` bytes,
    and the programs that say so. Without a limit it is "none". Raises `UserError` if no policy fits.
    """
    if network.spec.compute.remat != AUTO:
        return network, None
    if limit is None:
        return with_remat(network, remat.POLICIES[0]), None
    choice = choose(network, stages, limit)
    if not choice.fits:
        peak = max(program.memory.peak for program in choice.programs)
        raise UserError(
            f"config field compute.remat=auto: expected a train step that fits in {limit / GIB:.2f} GiB of a device, "
            f"got {peak / GIB:.2f} GiB with every block rematerialised (set a smaller data.batch_rows or "
            f"data.row_tokens, compute.microbatches={2 * network.spec.compute.microbatches}, or compute.strategy=fsdp "
            "over more devices)"
        )
    return with_remat(network, choice.policy), choice


def choose(network: Network, stages: Iterable[StageSpec], limit: float) -> Fitted:
    """The first policy with which the steps of all these stages fit in `limit` bytes of a device, less `MARGIN`."""
    stages, usable, last = tuple(stages), limit * (1 - MARGIN), remat.POLICIES[-1]
    for policy in remat.POLICIES:
        if policy != last and max(_least_bytes(network, stage, policy) for stage in stages) > usable:
            continue
        programs: list[Program] = []
        for stage in stages:
            programs.append(compile_step(with_remat(network, policy), stage))
            if not programs[-1].text or programs[-1].memory.peak > usable:
                break
        else:
            return Fitted(policy, tuple(programs), True)
    return Fitted(last, tuple(programs), False)


def with_remat(network: Network, policy: str) -> Network:
    """The network whose model has this policy; its spec, which identifies the run, stays."""
    compute = dataclasses.replace(network.model.compute, remat=policy)
    return network._replace(model=network.model._replace(compute=compute))


def kept_bytes(spec: RunSpec, stage: StageSpec, plan: Plan, policy: str) -> float:
    """`sizing.remat.kept_bytes` on a device of a plan."""
    return remat.kept_bytes(
        spec, stage, policy, plan.axis_size(axes.BATCH), plan.axis_size(axes.compute_axis(axes.MLP))
    )


def _least_bytes(network: Network, stage: StageSpec, policy: str) -> float:
    """A lower bound of a step's memory: its state, and what its blocks keep."""
    train = train_step(network, stage)
    state = device_bytes(with_shardings(nn.meta.unbox(train.abstract), train.shardings))
    return state + kept_bytes(network.spec, stage, network.plan, policy)


def compile_step(network: Network, stage: StageSpec) -> Program:
    """The compiled train step of a stage."""
    spec, train = network.spec, train_step(network, stage)
    most = None if train.tokens(1) is None else spec.model.compressor.tokens
    state = with_shardings(nn.meta.unbox(train.abstract), train.shardings)
    arguments = state, train_inputs(spec, stage, network.plan), most
    return compile_program(train.program, arguments, state.params, state.opt_state)


def compile_program(jitted: Any, arguments: tuple, params: Any, optimiser: Any) -> Program:
    """Lowers and compiles a jitted function for arguments that are shapes. `params` and `optimiser` are those parts of
    the arguments whose bytes are counted apart.
    """
    start = time.monotonic()
    lowered = jitted.lower(*arguments)
    params_bytes, moments, inputs = device_bytes(params), device_bytes(optimiser), device_bytes(arguments)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        text, peak = "", _required_bytes(str(error), inputs)
    else:
        sizes, text = compiled.memory_analysis(), compiled.as_text()
        outputs = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
        # What a program does not read (the encoder, while decoding) is no argument of it, but stays on the device.
        peak = max(sizes.argument_size_in_bytes, inputs) + sizes.temp_size_in_bytes + outputs
    memory = Memory(params_bytes, moments, inputs - params_bytes - moments, peak - inputs, peak)
    return Program(memory, text, time.monotonic() - start)


def _required_bytes(message: str, inputs_bytes: float) -> float:
    """Required memory, from the compiler's out-of-memory message. Raises `RuntimeError` with any other message."""
    match = re.search(r"(?:Used |temporaries \(|required[^(]*\()([\d.]+)([KMGT])", message)
    if "RESOURCE_EXHAUSTED" not in message or not match:
        raise RuntimeError(message)
    required = float(match[1]) * 2 ** (10 * ("KMGT".index(match[2]) + 1))
    return required + (inputs_bytes if "temporaries" in message else 0)


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """Shapes with shardings."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )


def device_bytes(tree: Any) -> float:
    """Bytes of a tree of sharded shapes on one device."""
    shards = ((leaf.sharding.shard_shape(leaf.shape), leaf.dtype.itemsize) for leaf in jax.tree.leaves(tree))
    return float(sum(np.prod(shape) * itemsize for shape, itemsize in shards))


def train_inputs(spec: RunSpec, stage: StageSpec, plan: Plan) -> Inputs:
    """Shapes of a training batch of a stage."""
    data = specs.data_of(spec, stage)
    inputs = inputs_of(spec, plan, data.batch_rows, compression.views_of_row(spec, data))
    shape = row_shapes(plan, data.batch_rows)
    part = shape(data.row_tokens) if len(data.train) > 1 else None
    return inputs._replace(weight=shape(data.row_tokens, dtype="float32"), part=part)


def inputs_of(spec: RunSpec, plan: Plan, rows: int, views: int) -> Inputs:
    """Shapes of a batch without what training adds."""
    shape = row_shapes(plan, rows)
    return Inputs(*(shape(spec.data.row_tokens) for _ in range(5)), views=_views(spec, shape, views))


def row_shapes(plan: Plan, rows: int) -> Callable[..., jax.ShapeDtypeStruct]:
    """`shape(*sizes, dtype)` of an array with an element for each row."""

    def shape(*sizes: int, dtype: str = "int32") -> jax.ShapeDtypeStruct:
        names = (axes.BATCH, *(None,) * (len(sizes) - 1))
        return jax.ShapeDtypeStruct((rows, *sizes), dtype, sharding=plan.sharding(names, (rows, *sizes)))

    return shape


def _views(spec: RunSpec, shape: Any, count: int) -> Views | None:
    """Shapes of pixels, or of stored features of every patch."""
    encoder, model = spec.model.encoder, Vlm(spec.model, spec.compute)
    if not model.visual_tokens:
        return None
    question = shape(count, spec.data.question_tokens) if model.reads_question else None
    if not spec.data.frozen_features:
        side = encoder.image_size
        return Views(shape(count, side, side, 3, dtype="uint8"), question=question)
    pixels = jax.ShapeDtypeStruct((1, encoder.image_size, encoder.image_size, 3), "uint8")
    weights = nn.meta.unbox(jax.eval_shape(model.init_encoder, jax.random.key(0)))
    encoded = jax.eval_shape(model.features, {"encoder": weights}, pixels)
    features = jax.tree.map(lambda leaf: shape(count, *leaf.shape[1:], dtype=str(leaf.dtype)), empty(encoded, 0))
    return Views(features=features, question=question)
