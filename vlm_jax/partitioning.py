"""Where every array lives: the only file that says Mesh, PartitionSpec or Sharding.

A `Plan` is a mesh of (data, fsdp, tensor) and a table from logical axis names (`core.axes`) to mesh axes. The tables:

    replicated   data parallelism; parameters everywhere
    fsdp         parameters and optimiser state split over `fsdp` along the wide axis; examples over data and fsdp
    fsdp_tensor  the same, and heads, feed-forward and vocabulary split over `tensor`

The same code runs on one device and on a pod: a mesh of one device turns every rule into a no-op.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vlm_jax.core import axes, tree
from vlm_jax.core.errors import UserError, unknown
from vlm_jax.core.specs import ComputeSpec

MESH_AXES = ("data", "fsdp", "tensor")
_EXAMPLES = ("data", "fsdp")
_UNSHARDED_LIMIT = 0.25  # share of the parameters that a splitting table may leave whole

Rules = tuple[tuple[str, Any], ...]

_REPLICATED: dict[str, Any] = dict.fromkeys((*axes.KERNEL_AXES, *axes.ACTIVATION_AXES)) | {axes.BATCH: _EXAMPLES}
_FSDP = _REPLICATED | {axes.EMBED: "fsdp", axes.VISION: "fsdp"}
_SPLIT = (axes.HEADS, axes.KV_HEADS, axes.MLP, axes.VOCAB, axes.VISION_HEADS, axes.VISION_MLP, axes.ACT_VOCAB)
_TENSOR = dict.fromkeys(_SPLIT, "tensor")
TABLES: dict[str, Mapping[str, Any]] = {"replicated": _REPLICATED, "fsdp": _FSDP, "fsdp_tensor": _FSDP | _TENSOR}


class Plan(NamedTuple):
    """A mesh and a rule table; every jit, device placement and sharding of a run goes through it."""

    mesh: Mesh
    rules: Rules

    def jit(self, fn: Callable[..., Any], **kwargs: Any) -> Any:
        """`jax.jit` with this plan in force while `fn` is traced.

        Mesh and rules are entered inside the traced function: entered outside, flax drops every activation constraint,
        and jit's own cache would not know the rules.
        """

        def traced(*args: Any) -> Any:
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh), nn.logical_axis_rules(self.rules):
                return fn(*args)

        traced.__name__ = getattr(fn, "__name__", "traced")
        return jax.jit(traced, **kwargs)

    def shardings(self, abstract: Any) -> Any:
        """Shardings of a tree of boxed shapes; leaves without names (counters, keys) are replicated. Unboxed
        structure.
        """
        specs = nn.get_partition_spec(abstract)
        shapes = nn.meta.unbox(abstract)
        return jax.tree.map(
            lambda spec, leaf: NamedSharding(
                self.mesh, self._fit(nn.logical_to_mesh_axes(spec, self.rules), leaf.shape)
            ),
            specs,
            shapes,
            is_leaf=_is_spec,
        )

    def _fit(self, spec: PartitionSpec | None, shape: tuple[int, ...]) -> PartitionSpec:
        """Drops a mesh axis where it does not divide the dimension (a vocabulary of 96 over 5 devices)."""
        kept = []
        for size, axis in zip(shape, tuple(spec or ()) + (None,) * len(shape), strict=False):
            names = axis if isinstance(axis, tuple) else (axis,) if axis else ()
            kept.append(axis if size % int(np.prod([self.mesh.shape[name] for name in names])) == 0 else None)
        return PartitionSpec(*kept)

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def examples(self) -> NamedSharding:
        """Leading axis split over data and fsdp."""
        return NamedSharding(self.mesh, PartitionSpec(_EXAMPLES))

    def put(self, batch: Any) -> Any:
        """This process's rows of a batch (numpy) -> global arrays split by example."""
        if jax.process_count() == 1:
            return jax.device_put(batch, self.examples)
        return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(self.examples, leaf), batch)

    def init(self, fn: Callable[..., Any], *args: Any) -> Any:
        """Runs an initialiser of boxed arrays straight into its shardings; returns unboxed arrays."""
        shardings = self.shardings(jax.eval_shape(fn, *args))
        return self.jit(lambda *a: nn.meta.unbox(fn(*a)), out_shardings=shardings)(*args)


def make_plan(compute: ComputeSpec, devices: list[Any] | None = None) -> Plan:
    """The plan that a `ComputeSpec` asks for, over all devices unless some are given.

    Raises `UserError` for an unknown strategy, or a mesh that does not divide the devices.
    """
    if compute.strategy not in TABLES:
        raise unknown("compute.strategy", compute.strategy, TABLES)
    devices = jax.devices() if devices is None else devices
    return Plan(
        jax.make_mesh(
            mesh_shape(compute.mesh, len(devices)), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices
        ),
        tuple(TABLES[compute.strategy].items()),
    )


def mesh_shape(wanted: tuple[int, int, int], devices: int) -> tuple[int, int, int]:
    """(data, fsdp, tensor) with one -1 replaced by what is left. Raises `UserError` where it does not come out."""
    given = int(np.prod([size for size in wanted if size != -1]))
    shape = tuple(devices // max(given, 1) if size == -1 else size for size in wanted)
    if sum(size == -1 for size in wanted) > 1 or min(shape) < 1 or int(np.prod(shape)) != devices:
        raise UserError(
            f"compute.mesh {list(wanted)} (data, fsdp, tensor) does not divide {devices} device(s): "
            "the product must equal the number of devices; write -1 on one axis to fill it"
        )
    return shape  # type: ignore[return-value]


def check_batch(plan: Plan, field: str, batch_examples: int, microbatches: int = 1) -> None:
    """Raises `UserError` unless the batch that `field` sets splits evenly over the mesh and the microbatches."""
    parts = plan.mesh.shape["data"] * plan.mesh.shape["fsdp"] * microbatches
    if batch_examples % parts:
        raise UserError(
            f"{field}={batch_examples} does not divide into data x fsdp x microbatches = {parts} parts: "
            f"use {max(1, batch_examples // parts) * parts}"
        )


def placements(plan: Plan, abstract: Any) -> dict[str, str]:
    """Parameter path -> 'shape (logical names) -> (mesh axes)', for golden files and for people."""
    names = tree.flatten(nn.get_partition_spec(abstract), is_leaf=_is_spec)
    shapes, shards = tree.flatten(nn.meta.unbox(abstract)), tree.flatten(plan.shardings(abstract))
    return {
        path: f"{tuple(leaf.shape)} {tuple(names[path])} -> {tuple(shards[path].spec)}" for path, leaf in shapes.items()
    }


def check_sharded(plan: Plan, abstract: Any) -> None:
    """Raises `UserError` where a table that should split the parameters leaves most of them whole on every device."""
    share = unsharded_share(plan, abstract)
    if plan.mesh.size > 1 and plan.rules != tuple(TABLES["replicated"].items()) and share > _UNSHARDED_LIMIT:
        raise UserError(
            f"compute.strategy splits parameters, but compute.mesh {dict(plan.mesh.shape)} leaves {share:.0%} of them "
            "whole on every device: give fsdp or tensor more than one device, or choose strategy=replicated"
        )


def unsharded_share(plan: Plan, abstract: Any) -> float:
    """Share of the parameters that every device holds in full."""
    shapes, shards = tree.flatten(nn.meta.unbox(abstract)), tree.flatten(plan.shardings(abstract))
    whole = {path: leaf for path, leaf in shapes.items() if shards[path].shard_shape(leaf.shape) == leaf.shape}
    return tree.count(whole) / max(tree.count(shapes), 1)


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, PartitionSpec)
