"""A run's programs, compiled for a topology from shapes alone: the train step, and the prefill and decode loop that
`generate` runs.
"""

import importlib.metadata
import importlib.util
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from vlm_jax import build
from vlm_jax.core import axes, specs
from vlm_jax.core.errors import UserError, unknown
from vlm_jax.core.specs import RunSpec, StageSpec
from vlm_jax.core.structs import AttentionMetadata, Cache, Inputs, Views
from vlm_jax.data.features import empty
from vlm_jax.distributed import partitioning
from vlm_jax.distributed.partitioning import Plan
from vlm_jax.inference import programs as inference
from vlm_jax.inference import sampling
from vlm_jax.models.cache import cache_axes, pad_cache
from vlm_jax.models.vlm import Vlm
from vlm_jax.sizing import compression

MODES = ("train", "prefill", "decode")
# Examples, for suggestions.
TOPOLOGIES = (
    "v4:2x2x1", "v4:4x4x4", "v5e:2x2", "v5e:4x4", "v5e:8x8", "v5e:16x16", "v5p:2x2x1", "v5p:4x4x4", "v5p:4x4x8",
    "v5p:8x8x8", "v6e:2x2", "v6e:4x4", "v6e:8x8", "v6e:16x16", "tpu7x:2x2x2", "tpu7x:4x4x4",
)  # fmt: skip
_STATE_DTYPE = "float32"


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


def devices(topology: str, slices: int = 1) -> list[Any]:
    """Device descriptions of a topology. Raises `UserError` without libtpu and for unknown names."""
    if importlib.util.find_spec("libtpu") is None:
        required = [text for text in importlib.metadata.requires("jax") or () if text.startswith("libtpu")]
        pinned = required[0].split(";")[0].strip() if required else "libtpu"
        raise UserError(f"compiling for a TPU needs libtpu, which is not installed (pip install '{pinned}')")
    from jax.experimental import topologies

    try:
        more = {"num_slices": slices} if slices > 1 else {}
        return list(topologies.get_topology_desc(topology, platform="tpu", **more).devices)
    except Exception as error:
        raise unknown("topology", topology, TOPOLOGIES) from error


def compile_program(spec: RunSpec, stage: StageSpec, plan: Plan, mode: str) -> Program:
    """Lowers and compiles the program of a mode. Raises `UserError` if the spec is invalid on this plan."""
    network = build.lay_out(spec, plan)
    if mode == "train":
        train = build.train_step(network, stage)
        most = None if train.tokens(1) is None else spec.model.compressor.tokens
        state = with_shardings(nn.meta.unbox(train.abstract), train.shardings)
        jitted, arguments = train.program, (state, _train_inputs(spec, stage, plan), most)
        params, optimiser = state.params, state.opt_state
    else:
        jitted, arguments = (_prefill if mode == "prefill" else _decode)(spec, plan)
        params, optimiser = arguments[0], ()
    start = time.monotonic()
    lowered = jitted.lower(*arguments)
    params_bytes, moments, inputs = _device_bytes(params), _device_bytes(optimiser), _device_bytes(arguments)
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


def _train_inputs(spec: RunSpec, stage: StageSpec, plan: Plan) -> Inputs:
    """Shapes of a training batch of a stage."""
    data = specs.data_of(spec, stage)
    inputs = _inputs(spec, plan, data.batch_rows, compression.views_of_row(spec, data))
    shape = _shape(plan, data.batch_rows)
    part = shape(data.row_tokens) if len(data.train) > 1 else None
    return inputs._replace(weight=shape(data.row_tokens, dtype="float32"), part=part)


def _inputs(spec: RunSpec, plan: Plan, rows: int, views: int) -> Inputs:
    """Shapes of a batch without what training adds."""
    shape = _shape(plan, rows)
    return Inputs(*(shape(spec.data.row_tokens) for _ in range(5)), views=_views(spec, shape, views))


def _shape(plan: Plan, rows: int) -> Callable[..., jax.ShapeDtypeStruct]:
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


def _decoding_model(spec: RunSpec) -> Vlm:
    return Vlm(spec.model, sampling.compute_for_decoding(spec.compute))


def _params(spec: RunSpec, plan: Plan, model: Vlm) -> Any:
    """Shapes of the parameters for inference, in the dtype of the activations."""
    boxed = jax.eval_shape(lambda key: {**model.init(key), "encoder": model.init_encoder(key)}, jax.random.key(0))
    low = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, spec.compute.dtype if leaf.dtype == _STATE_DTYPE else leaf.dtype),
        nn.meta.unbox(boxed),
    )
    return with_shardings(low, plan.shardings(boxed))


def _prefill(spec: RunSpec, plan: Plan) -> tuple[Any, tuple]:
    model = _decoding_model(spec)
    run = inference.prefill_program(model.spec, model.compute, plan, spec.evaluation.max_new_tokens)
    return run, (_params(spec, plan, model), _inputs(spec, plan, spec.evaluation.batch_examples, 1))


def _decode(spec: RunSpec, plan: Plan) -> tuple[Any, tuple]:
    model, rows, steps = _decoding_model(spec), spec.evaluation.batch_examples, spec.evaluation.max_new_tokens
    shape = _shape(plan, rows)
    count = jax.ShapeDtypeStruct((), "int32", sharding=plan.replicated)
    state = sampling.Decoding(count, shape(), shape(dtype="bool"), shape(steps), cache_shapes(spec, plan))
    params = sampling.SamplingParams(
        shape(), shape(dtype="float32"), shape(dtype="float32"), shape(dtype="uint32"), shape()
    )
    run = inference.decode_program(model.spec, model.compute, plan, (0,), "greedy")
    return run, (_params(spec, plan, model), state, params, count)


def cache_shapes(spec: RunSpec, plan: Plan) -> Cache:
    """Shapes of the cache of a batch, with the shardings of its examples and heads."""
    model, rows = _decoding_model(spec), spec.evaluation.batch_examples

    def prefilled() -> Cache:
        cache = model.evict(model.init_cache(rows, spec.data.row_tokens, 1), 1)
        return pad_cache(cache, cache.metadata.segment.shape[1] + spec.evaluation.max_new_tokens)

    def shardings(cache: Cache) -> Cache:
        names = cache_axes(rows, spec.model.decoder.kv_heads)
        heads = tuple(plan.sharding(names, leaf.shape) for leaf in cache.key)
        metadata = AttentionMetadata(*(plan.sharding((axes.BATCH, None), leaf.shape) for leaf in cache.metadata))
        return Cache(heads, heads, metadata, plan.sharding((), ()), tuple(map(shardings, cache.later)))

    shapes = jax.eval_shape(prefilled)
    return with_shardings(shapes, shardings(shapes))


def _device_bytes(tree: Any) -> float:
    """Bytes of a tree of sharded shapes on one device."""
    shards = ((leaf.sharding.shard_shape(leaf.shape), leaf.dtype.itemsize) for leaf in jax.tree.leaves(tree))
    return float(sum(np.prod(shape) * itemsize for shape, itemsize in shards))


def mesh_axes(plan: Plan) -> Mapping[str, int]:
    """Sizes by mesh axis, slowest first."""
    return dict(zip(partitioning.MESH_AXES, plan.mesh.devices.shape, strict=True))
