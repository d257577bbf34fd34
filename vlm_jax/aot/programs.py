"""A run's programs, compiled for a topology from shapes alone: the train step, and the prefill and decode loop that
`generate` runs.
"""

import importlib.metadata
import importlib.util
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from vlm_jax import build
from vlm_jax.build import fitting
from vlm_jax.build.fitting import Program
from vlm_jax.core import axes
from vlm_jax.core.errors import UserError, unknown
from vlm_jax.core.specs import RunSpec
from vlm_jax.core.structs import AttentionMetadata, Cache
from vlm_jax.distributed import partitioning
from vlm_jax.distributed.partitioning import Plan
from vlm_jax.inference import programs as inference
from vlm_jax.inference import sampling
from vlm_jax.models.cache import cache_axes, pad_cache
from vlm_jax.models.vlm import Vlm

MODES = ("train", "prefill", "decode")
# Examples, for suggestions.
TOPOLOGIES = (
    "v4:2x2x1", "v4:4x4x4", "v5e:2x2", "v5e:4x4", "v5e:8x8", "v5e:16x16", "v5p:2x2x1", "v5p:4x4x4", "v5p:4x4x8",
    "v5p:8x8x8", "v6e:2x2", "v6e:4x4", "v6e:8x8", "v6e:16x16", "tpu7x:2x2x2", "tpu7x:4x4x4",
)  # fmt: skip
_STATE_DTYPE = "float32"


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


def compile_mode(spec: RunSpec, plan: Plan, mode: str) -> Program:
    """The compiled prefill or decode loop. Raises `UserError` if the spec is invalid on this plan."""
    build.lay_out(spec, plan)
    jitted, arguments = (_prefill if mode == "prefill" else _decode)(spec, plan)
    return fitting.compile_program(jitted, arguments, arguments[0], ())


def _decoding_model(spec: RunSpec) -> Vlm:
    return Vlm(spec.model, sampling.compute_for_decoding(spec.compute))


def _params(spec: RunSpec, plan: Plan, model: Vlm) -> Any:
    """Shapes of the parameters for inference, in the dtype of the activations."""
    boxed = jax.eval_shape(lambda key: {**model.init(key), "encoder": model.init_encoder(key)}, jax.random.key(0))
    low = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, spec.compute.dtype if leaf.dtype == _STATE_DTYPE else leaf.dtype),
        nn.meta.unbox(boxed),
    )
    return fitting.with_shardings(low, plan.shardings(boxed))


def _prefill(spec: RunSpec, plan: Plan) -> tuple[Any, tuple]:
    model = _decoding_model(spec)
    run = inference.prefill_program(model.spec, model.compute, plan, spec.evaluation.max_new_tokens)
    return run, (_params(spec, plan, model), fitting.inputs_of(spec, plan, spec.evaluation.batch_examples, 1))


def _decode(spec: RunSpec, plan: Plan) -> tuple[Any, tuple]:
    model, rows, steps = _decoding_model(spec), spec.evaluation.batch_examples, spec.evaluation.max_new_tokens
    shape = fitting.row_shapes(plan, rows)
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
    return fitting.with_shardings(shapes, shardings(shapes))


def mesh_axes(plan: Plan) -> Mapping[str, int]:
    """Sizes by mesh axis, slowest first."""
    return dict(zip(partitioning.MESH_AXES, plan.mesh.devices.shape, strict=True))
