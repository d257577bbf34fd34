"""A run's programs for a topology, compiled without its chips: the train step that training runs, prefill, one decode
step. Only shapes exist; nothing is allocated.
"""

import importlib.metadata
import importlib.util
import re
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from vlm_jax import build, partitioning
from vlm_jax.core import axes
from vlm_jax.core.errors import UserError, unknown
from vlm_jax.core.specs import RunSpec, StageSpec
from vlm_jax.core.structs import Batch, Cache, Slots
from vlm_jax.models.decoder import empty_cache
from vlm_jax.models.vlm import Vlm
from vlm_jax.partitioning import Plan

MODES = ("train", "prefill", "decode")
# Examples, for the message about a name that the compiler does not know, and for advice.
TOPOLOGIES = (
    "v4:2x2x1", "v4:4x4x4", "v5e:2x2", "v5e:4x4", "v5e:8x8", "v5e:16x16", "v5p:2x2x1", "v5p:4x4x4", "v5p:4x4x8",
    "v5p:8x8x8", "v6e:2x2", "v6e:4x4", "v6e:8x8", "v6e:16x16", "tpu7x:2x2x2", "tpu7x:4x4x4",
)  # fmt: skip
_STATE_DTYPE = "float32"


class Memory(NamedTuple):
    """Bytes on one chip."""

    params: float
    optimiser: float
    other_inputs: float  # batch, cache
    temporaries: float
    peak: float


class Program(NamedTuple):
    """A compiled program; where it needs more memory than a chip has, `text` is empty and `memory.peak` is what it
    asks for.
    """

    memory: Memory
    text: str
    compile_secs: float


def devices(topology: str, slices: int = 1) -> list[Any]:
    """The chips of a topology, as descriptions. Raises `UserError` without libtpu, or for a name it does not know."""
    if importlib.util.find_spec("libtpu") is None:
        wanted = [text for text in importlib.metadata.requires("jax") or () if text.startswith("libtpu")]
        pinned = wanted[0].split(";")[0].strip() if wanted else "libtpu"
        raise UserError(f"compiling for a TPU needs its compiler: pip install '{pinned}' (no TPU is needed)")
    from jax.experimental import topologies

    try:
        more = {"num_slices": slices} if slices > 1 else {}
        return list(topologies.get_topology_desc(topology, platform="tpu", **more).devices)
    except Exception as error:
        raise unknown("topology", topology, TOPOLOGIES) from error


def compile_program(spec: RunSpec, stage: StageSpec, plan: Plan, mode: str) -> Program:
    """Lowers and compiles one of `MODES`. Raises `UserError` for what the spec cannot have on this plan."""
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    network = build.lay_out(spec, plan)
    if mode == "train":
        train = build.train_step(network, stage)
        state = placed(nn.meta.unbox(train.abstract), train.shardings)
        jitted, arguments, params, optimiser = (
            train.step, (state, batch_shapes(spec, plan, spec.data.batch_examples)), state.params, state.opt_state
        )  # fmt: skip
    else:
        jitted, arguments = (_prefill if mode == "prefill" else _decode)(spec, plan, network.model)
        params, optimiser = arguments[0], ()
    start = time.monotonic()
    lowered = jitted.lower(*arguments)
    held, moments, all_inputs = _held(params), _held(optimiser), _held(arguments)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        peak = _asked(str(error), all_inputs)
        return Program(Memory(held, moments, all_inputs - held - moments, peak - all_inputs, peak), "",
                       time.monotonic() - start)  # fmt: skip
    sizes = compiled.memory_analysis()
    outputs = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    peak = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes + outputs
    memory = Memory(held, moments, all_inputs - held - moments, peak - all_inputs, peak)
    return Program(memory, compiled.as_text(), time.monotonic() - start)


def _asked(message: str, inputs_bytes: float) -> float:
    """Bytes that a program which does not fit asks for, from the compiler's message; others are raised again."""
    found = re.search(r"(?:Used |temporaries \(|required[^(]*\()([\d.]+)([KMGT])", message)
    if "RESOURCE_EXHAUSTED" not in message or not found:
        raise RuntimeError(message)
    asked = float(found[1]) * 2 ** (10 * ("KMGT".index(found[2]) + 1))
    return asked + (inputs_bytes if "temporaries" in message else 0)


def placed(shapes: Any, shardings: Any) -> Any:
    """Shapes with a place each."""
    return jax.tree.map(
        lambda leaf, there: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=there), shapes, shardings
    )


def batch_shapes(spec: RunSpec, plan: Plan, rows: int) -> Batch:
    """A batch that holds pixels, or the stored features of every patch."""
    from vlm_jax.core.structs import Visual

    def shape(*sizes: int, dtype: str = "int32") -> jax.ShapeDtypeStruct:
        names = (axes.BATCH, *(None,) * (len(sizes) - 1))
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=plan.sharding(names, sizes))

    encoder, text = spec.model.encoder, (rows, spec.data.text_tokens)
    side, tokens = encoder.image_size, (rows, encoder.patches, encoder.width)
    taps = len(encoder.taps)
    stored = spec.data.frozen_features
    return Batch(
        text=shape(*text), target=shape(*text), weight=shape(*text, dtype="float32"), segment=shape(*text),
        position=shape(*text), question=shape(*text, dtype="bool"), example=shape(rows),
        image=None if stored else shape(rows, side, side, 3, dtype="uint8"),
        features=Visual(
            shape(*tokens, dtype="float16"),
            shape(rows, taps, *tokens[1:], dtype="float16") if taps else None,
        ) if stored else None,
    )  # fmt: skip


def _params(spec: RunSpec, plan: Plan, model: Vlm) -> Any:
    """Parameters as they answer: in the dtype of the activations."""
    boxed = jax.eval_shape(lambda key: {**model.init(key), "encoder": model.init_encoder(key)}, jax.random.key(0))
    low = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, spec.compute.dtype if leaf.dtype == _STATE_DTYPE else leaf.dtype),
        nn.meta.unbox(boxed),
    )
    return placed(low, plan.shardings(boxed))


def _prefill(spec: RunSpec, plan: Plan, model: Vlm) -> tuple[Any, tuple]:
    rows, slots = spec.evaluation.batch_examples, _slots(spec)
    cache = cache_shapes(spec, plan)
    out = (None, jax.tree.map(lambda leaf: leaf.sharding, cache))
    run = plan.jit(lambda params, batch: model.prefill(params, batch, slots), out_shardings=out)
    return run, (_params(spec, plan, model), batch_shapes(spec, plan, rows))


def _decode(spec: RunSpec, plan: Plan, model: Vlm) -> tuple[Any, tuple]:
    cache, rows = cache_shapes(spec, plan), spec.evaluation.batch_examples
    one = jax.ShapeDtypeStruct((rows,), "int32", sharding=plan.examples)
    out = (None, jax.tree.map(lambda leaf: leaf.sharding, cache))
    return plan.jit(model.extend, donate_argnums=3, out_shardings=out), (_params(spec, plan, model), one, one, cache)


def _slots(spec: RunSpec) -> int:
    return spec.model.compressor.tokens + spec.data.text_tokens + spec.evaluation.max_new_tokens


def cache_shapes(spec: RunSpec, plan: Plan) -> Cache:
    """Keys and values of a batch: rows split as examples are, heads as heads are."""
    decoder, rows = spec.model.decoder, spec.evaluation.batch_examples
    shapes = jax.eval_shape(lambda: empty_cache(decoder, rows, _slots(spec), spec.compute.dtype))
    keys, slots = (None, axes.BATCH, None, axes.ACT_HEADS, None), (axes.BATCH, None)
    names = Cache(keys, keys, Slots(slots, slots, slots), ())
    shardings = Cache(
        *(plan.sharding(names[i], shapes[i].shape) for i in (0, 1)),
        Slots(*(plan.sharding(slots, leaf.shape) for leaf in shapes.slots)),
        plan.sharding((), ()),
    )
    return placed(shapes, shardings)


def _held(tree: Any) -> float:
    """Bytes of a placed tree on one chip."""
    return float(
        sum(
            np.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
            for leaf in jax.tree.leaves(tree)
        )
    )


def mesh_axes(plan: Plan) -> Mapping[str, int]:
    """Mesh axis -> its size, slowest first."""
    return dict(zip(partitioning.MESH_AXES, plan.mesh.devices.shape, strict=True))
