"""Sharding: meshes, and tables from logical axis names to mesh axes.

A `Plan` is a mesh of (slice, data, fsdp, tensor) and one of these tables:

    replicated   data parallelism; parameters are replicated, examples sharded over all devices
    fsdp         parameters and optimiser state sharded over fsdp and tensor; a kernel is gathered for its product;
                 examples sharded over all devices
    fsdp_tensor  parameters as in fsdp; heads, feed-forward and vocabulary stay sharded over `tensor` in products too,
                 so a group of `tensor` devices has the same examples

Under fsdp, `tensor` is a second direction of the same sharding: a width that fsdp x tensor does not divide (1152 over
256 devices) is sharded over `fsdp`, and another axis of the kernel over `tensor`. Parameters are replicated over
slices, so that only summed gradients cross the slow network.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from vlm_jax.core import axes, tree
from vlm_jax.core.errors import UserError, unknown
from vlm_jax.core.specs import ComputeSpec
from vlm_jax.core.structs import TrainState
from vlm_jax.ops import logical_axes

MESH_AXES = ("slice", "data", "fsdp", "tensor")
_TILE = 16  # rows of a TPU tile of 16-bit numbers
_UNSHARDED_LIMIT = 0.25  # share of the parameters that a sharding table may leave replicated

Rules = tuple[tuple[str, Any], ...]

_TENSOR = (axes.HEADS, axes.KV_HEADS, axes.MLP, axes.VOCAB, axes.VISION_HEADS, axes.VISION_MLP)
_REPLICATED: dict[str, Any] = {
    **dict.fromkeys((*axes.KERNEL_AXES, *axes.COMPUTE_AXES, *axes.ACTIVATION_AXES)),
    axes.BATCH: MESH_AXES,
    axes.LOOKUP: ("slice", "data"),
}
_FSDP = _REPLICATED | {
    axes.EMBED: ("fsdp", "tensor"),
    axes.VISION: "fsdp",
    axes.VISION_HEADS: "tensor",
    axes.VISION_MLP: "tensor",
    axes.QUERIES: "fsdp",
}
_FSDP_TENSOR = {
    **_REPLICATED,
    axes.BATCH: ("slice", "data", "fsdp"),
    axes.EMBED: "fsdp",
    axes.VISION: "fsdp",
    axes.QUERIES: "fsdp",
    **{name: "tensor" for axis in _TENSOR for name in (axis, axes.compute_axis(axis))},
    axes.ACT_VOCAB: "tensor",
    axes.ACT_HEADS: "tensor",
}
TABLES: dict[str, Mapping[str, Any]] = {"replicated": _REPLICATED, "fsdp": _FSDP, "fsdp_tensor": _FSDP_TENSOR}


class Plan(NamedTuple):
    """A mesh and a rule table, for every jit, device_put and sharding of a run."""

    mesh: Mesh
    rules: Rules

    def jit(self, fn: Callable[..., Any], **kwargs: Any) -> Any:
        """`jax.jit` with these rules while `fn` is traced (set inside, since they are not part of jit's cache key)."""

        def traced(*args: Any) -> Any:
            with logical_axes.use_rules(self):
                return fn(*args)

        traced.__name__ = getattr(fn, "__name__", "traced")
        return jax.jit(traced, **kwargs)

    def shardings(self, abstract: Any) -> Any:
        """Shardings of a tree of boxed shapes, with unboxed structure; leaves without names are replicated. Moments of
        replicated vectors in a `TrainState` are sharded too: unlike the vectors, a step reads them only once."""
        shardings = jax.tree.map(
            lambda names, leaf: self.sharding(tuple(names), leaf.shape),
            nn.get_partition_spec(abstract),
            nn.meta.unbox(abstract),
            is_leaf=_is_spec,
        )
        if isinstance(abstract, TrainState) and dict(self.rules)[axes.EMBED]:
            moments = jax.tree.map(self._shard_replicated, shardings.opt_state, nn.meta.unbox(abstract.opt_state))
            shardings = shardings._replace(opt_state=moments)
        return shardings

    def _shard_replicated(self, sharding: NamedSharding, leaf: Any) -> NamedSharding:
        """A replicated leaf sharded over fsdp and tensor, each along the widest axis that it divides."""
        if any(sharding.spec):
            return sharding
        sizes, spec = list(leaf.shape), [() for _ in leaf.shape]
        for axis in ("fsdp", "tensor"):
            divisible = [i for i, size in enumerate(sizes) if size % self.mesh.shape[axis] == 0]
            if divisible:
                widest = max(divisible, key=sizes.__getitem__)
                sizes[widest] //= self.mesh.shape[axis]
                spec[widest] += (axis,)
        return NamedSharding(self.mesh, PartitionSpec(*(part or None for part in spec)))

    def sharding(self, names: logical_axes.AxisNames, shape: tuple[int, ...]) -> NamedSharding:
        """The sharding of an array of this shape with these axis names. Mesh axes that do not divide a size are dropped
        from the last. Raises `UserError` where two names map to the same mesh axis.
        """
        table, spec, owner = dict(self.rules), [], {}
        for name, size in zip(names + (None,) * (len(shape) - len(names)), shape, strict=True):
            target = table.get(name) if name else None
            mesh_axes = target if isinstance(target, tuple) else (target,) if target else ()
            for axis in mesh_axes:
                if owner.setdefault(axis, name) != name:
                    raise UserError(
                        f"axes {owner[axis]!r} and {name!r} of an array {names} both map to mesh axis {axis!r}: "
                        "rename one of them or change its rule in partitioning.TABLES"
                    )
            while size % math.prod(self.mesh.shape[axis] for axis in mesh_axes):
                mesh_axes = mesh_axes[:-1]
            spec.append(mesh_axes if len(mesh_axes) > 1 else mesh_axes[0] if mesh_axes else None)
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    def storage_shardings(self, names: logical_axes.AxisNames, shape: tuple[int, ...]) -> list[NamedSharding]:
        """Shardings of a kernel's gradient from compute to storage, one more mesh axis each.

        In a single step over two mesh axes, XLA:TPU all-reduces the gradient and slices it, which is twice the traffic
        of a reduce-scatter.
        """
        compute, storage = (
            [(part,) if isinstance(part, str) else part or () for part in self.sharding(n, shape).spec]
            for n in (_compute_names(names), names)
        )
        done, steps = set(sum(compute, ())), []
        for axis in [axis for axis in MESH_AXES if axis in sum(storage, ()) and axis not in done]:
            done.add(axis)
            steps.append(PartitionSpec(*(tuple(a for a in part if a in done) or None for part in storage)))
        return [NamedSharding(self.mesh, step) for step in steps]

    def compute_shardings(self, names: logical_axes.AxisNames, shape: tuple[int, ...]) -> list[NamedSharding]:
        """Shardings of a kernel from storage to compute: in one all-gather over both mesh axes, which uses all links of
        a 2D torus. On a 3D torus, and for shards thinner than a tile, XLA:TPU would all-reduce zero-padded kernels
        instead; there one mesh axis is gathered after another.
        """
        storage, compute = (self.sharding(n, shape) for n in (names, _compute_names(names)))
        steps = self.storage_shardings(names, shape)
        shards = storage.shard_shape(shape)
        is_thin = any(size > part >= 1 and part < _TILE for size, part in zip(shape, shards, strict=True))
        devices = getattr(self.mesh, "devices", np.array([None]))
        is_3d = sum(coordinate > 0 for coordinate in getattr(devices.flat[-1], "coords", ())) > 2
        return [storage, *(steps[-2::-1] if is_thin or is_3d else ()), compute]

    def shard_map(
        self, fn: Callable[..., Any], inputs: tuple[logical_axes.AxisNames, ...], output: logical_axes.AxisNames
    ) -> Callable[..., Any]:
        """`jax.shard_map` of `fn` over arrays with these axis names."""
        rules = dict(self.rules)
        *specs, out = (PartitionSpec(*(name and rules[name] for name in names)) for names in (*inputs, output))
        return jax.shard_map(fn, mesh=self.mesh, in_specs=tuple(specs), out_specs=out, check_vma=False)

    @property
    def platform(self) -> str:
        """Kind of device of the mesh, "cpu", "gpu" or "tpu"; of an abstract mesh, this process's."""
        devices = getattr(self.mesh, "devices", None)
        return jax.default_backend() if devices is None else devices.flat[0].platform

    def axis_size(self, name: str) -> int:
        """Number of shards of an axis of that logical name."""
        target = dict(self.rules)[name] or ()
        return math.prod(self.mesh.shape[axis] for axis in ((target,) if isinstance(target, str) else target))

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def examples(self) -> NamedSharding:
        """The leading axis sharded as examples."""
        return NamedSharding(self.mesh, PartitionSpec(dict(self.rules)[axes.BATCH]))

    def rows(self, count: int) -> Int[np.ndarray, " b"]:
        """Indices of the rows of a batch of `count` that are on this process's devices."""
        parts = self.examples.addressable_devices_indices_map((count,)).values()
        return np.unique(np.concatenate([np.arange(count)[part] for part in parts]))

    def put(self, batch: Any) -> Any:
        """This process's `rows` of a batch (numpy) -> global arrays sharded by example."""
        if jax.process_count() == 1:
            return jax.device_put(batch, self.examples)
        return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(self.examples, leaf), batch)

    def init(self, fn: Callable[..., Any], *args: Any) -> Any:
        """Runs an initialiser of boxed arrays under jit with their shardings; returns unboxed arrays."""
        shardings = self.shardings(jax.eval_shape(fn, *args))
        # It runs once, so on a CPU most of its time would be LLVM's optimisation.
        options = {"xla_backend_optimization_level": 0} if self.platform == "cpu" else None
        init = lambda *a: nn.meta.unbox(fn(*a))  # noqa: E731
        return self.jit(init, out_shardings=shardings, compiler_options=options)(*args)


def make_plan(compute: ComputeSpec, devices: list[Any] | None = None) -> Plan:
    """The plan of a `ComputeSpec` over the given devices (None: all). Raises `UserError` for an unknown strategy, or
    slices and a mesh that do not divide the devices.
    """
    devices = jax.devices() if devices is None else devices
    strategy, shape = _strategy_and_shape(compute, devices[0].platform, len(devices))
    slices = (compute.slices, 1, 1, 1)
    if compute.slices > 1 and len({getattr(device, "slice_index", 0) for device in devices}) > 1:
        grid = mesh_utils.create_hybrid_device_mesh((1, *shape), slices, devices, allow_split_physical_axes=True)
    elif compute.slices > 1:
        grid = np.asarray(devices).reshape(compute.slices, *shape)
    else:
        grid = mesh_utils.create_device_mesh((1, *shape), devices, allow_split_physical_axes=True)
    return Plan(Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * 4), tuple(TABLES[strategy].items()))


def outline(compute: ComputeSpec, platform: str, devices: int) -> Plan:
    """The plan over an abstract mesh, enough for `check_batch`. Raises `UserError` as `make_plan` does."""
    strategy, shape = _strategy_and_shape(compute, platform, devices)
    mesh = AbstractMesh((compute.slices, *shape), MESH_AXES)
    return Plan(mesh, tuple(TABLES[strategy].items()))  # type: ignore[arg-type]


def _strategy_and_shape(compute: ComputeSpec, platform: str, devices: int) -> tuple[str, tuple[int, int, int]]:
    """The name of the table, and (data, fsdp, tensor) of one slice."""
    if compute.strategy not in ("auto", *TABLES):
        raise unknown("compute.strategy", compute.strategy, ("auto", *TABLES))
    if devices % compute.slices:
        raise UserError(f"compute.slices={compute.slices} does not divide {devices} device(s)")
    strategy, shape = compute.strategy, compute.mesh
    if strategy == "auto":
        strategy, best = by_kind(platform, devices // compute.slices)
        shape = best if shape == (-1, 1, 1) else shape
    return strategy, mesh_shape(shape, devices // compute.slices)


def by_kind(platform: str, devices: int) -> tuple[str, tuple[int, int, int]]:
    """What "auto" means: a table, and the mesh that replaces (-1, 1, 1). Accelerators shard over two mesh axes, as
    square as powers of two allow, so that widths which the number of devices does not divide are sharded too.
    """
    if platform == "cpu" or devices == 1:
        return "replicated", (-1, 1, 1)
    side = max(2**n for n in range(devices.bit_length()) if devices % 2**n == 0 and 4**n <= devices)
    return "fsdp", (1, -1, side)


def mesh_shape(mesh: tuple[int, int, int], devices: int) -> tuple[int, int, int]:
    """(data, fsdp, tensor) with -1 replaced by the remaining devices. Raises `UserError` if it does not fit."""
    given = int(np.prod([size for size in mesh if size != -1]))
    shape = tuple(devices // max(given, 1) if size == -1 else size for size in mesh)
    if sum(size == -1 for size in mesh) > 1 or min(shape) < 1 or int(np.prod(shape)) != devices:
        raise UserError(
            f"compute.mesh {list(mesh)} (data, fsdp, tensor) does not divide {devices} device(s): "
            "the product must equal the number of devices; write -1 on one axis to fill it"
        )
    return shape  # type: ignore[return-value]


def check_batch(plan: Plan, field: str, batch_examples: int, microbatches: int = 1) -> None:
    """Raises `UserError` unless the batch size of `field` divides over the mesh and the microbatches."""
    parts = plan.axis_size(axes.BATCH) * microbatches
    if batch_examples % parts:
        groups = "groups of devices" + " x microbatches" * (microbatches > 1)
        raise UserError(
            f"{field}={batch_examples} does not divide into {groups} = {parts} parts: "
            f"use {max(1, batch_examples // parts) * parts}"
        )


def check_sharded(plan: Plan, abstract: Any) -> None:
    """Raises `UserError` where a sharding table leaves too many parameters replicated."""
    share = unsharded_share(plan, abstract)
    if plan.mesh.size > 1 and plan.rules != tuple(TABLES["replicated"].items()) and share > _UNSHARDED_LIMIT:
        raise UserError(
            f"compute.strategy splits parameters, but compute.mesh {dict(plan.mesh.shape)} leaves {share:.0%} of them "
            "whole on every device: give fsdp or tensor more than one device, or choose strategy=replicated"
        )


def unsharded_share(plan: Plan, abstract: Any) -> float:
    """Share of the parameters that are replicated."""
    shapes, shards = tree.flatten(nn.meta.unbox(abstract)), tree.flatten(plan.shardings(abstract))
    replicated = {path: leaf for path, leaf in shapes.items() if shards[path].shard_shape(leaf.shape) == leaf.shape}
    return tree.count(replicated) / max(tree.count(shapes), 1)


def _compute_names(names: logical_axes.AxisNames) -> logical_axes.AxisNames:
    return tuple(axes.compute_axis(name) for name in names)


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, PartitionSpec)
