"""Where every array lives: the only file that says Mesh, PartitionSpec or Sharding.

A `Plan` is a mesh of (slice, data, fsdp, tensor) and a table from logical axis names (`core.axes`) to mesh axes. The
tables:

    replicated   data parallelism; parameters everywhere, examples over every device
    fsdp         parameters and optimiser state split over fsdp and tensor; a kernel is gathered where it is multiplied;
                 examples over every device
    fsdp_tensor  parameters split as before; heads, feed-forward and vocabulary stay split over `tensor` at work too,
                 so that a group of `tensor` devices shares its examples

Under fsdp, `tensor` is the second direction of one split: a width that the product of both does not divide (1152 of an
encoder over 256 devices) is cut by `fsdp`, and another axis of the same kernel by `tensor`. Slices are joined by a slow
network: examples are split over them, parameters never, so that only summed gradients cross.

The same code runs on one device and on a pod: a mesh of one device turns every rule into a no-op.
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
_TILE = 16  # rows of a tile of 16-bit numbers
_UNSHARDED_LIMIT = 0.25  # share of the parameters that a splitting table may leave whole

Rules = tuple[tuple[str, Any], ...]

_HEADS = (axes.HEADS, axes.KV_HEADS, axes.MLP, axes.VOCAB, axes.VISION_HEADS, axes.VISION_MLP)
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
    **{name: "tensor" for head in _HEADS for name in (head, axes.compute_axis(head))},
    axes.ACT_VOCAB: "tensor",
    axes.ACT_HEADS: "tensor",
}
TABLES: dict[str, Mapping[str, Any]] = {"replicated": _REPLICATED, "fsdp": _FSDP, "fsdp_tensor": _FSDP_TENSOR}


class Plan(NamedTuple):
    """A mesh and a rule table; every jit, device placement and sharding of a run goes through it."""

    mesh: Mesh
    rules: Rules

    def jit(self, fn: Callable[..., Any], **kwargs: Any) -> Any:
        """`jax.jit` with this plan in force while `fn` is traced (entered inside, because jit's own cache does not know
        it).
        """

        def traced(*args: Any) -> Any:
            with logical_axes.use_rules(self):
                return fn(*args)

        traced.__name__ = getattr(fn, "__name__", "traced")
        return jax.jit(traced, **kwargs)

    def shardings(self, abstract: Any) -> Any:
        """Shardings of a tree of boxed shapes; leaves without names (counters, keys) are replicated. Unboxed
        structure.

        Of a `TrainState`, moments of the small vectors that every device holds whole are cut as well: a step reads them
        once, where it reads the vectors in every layer.
        """
        placed = jax.tree.map(
            lambda names, leaf: self.sharding(tuple(names), leaf.shape),
            nn.get_partition_spec(abstract),
            nn.meta.unbox(abstract),
            is_leaf=_is_spec,
        )
        if isinstance(abstract, TrainState) and dict(self.rules)[axes.EMBED]:
            moments = jax.tree.map(self._cut, placed.opt_state, nn.meta.unbox(abstract.opt_state))
            placed = placed._replace(opt_state=moments)
        return placed

    def _cut(self, sharding: NamedSharding, leaf: Any) -> NamedSharding:
        """Where nothing is split yet: each of fsdp and tensor along the widest axis that it still divides."""
        if any(sharding.spec):
            return sharding
        sizes, spec = list(leaf.shape), [() for _ in leaf.shape]
        for axis in ("fsdp", "tensor"):
            fitting = [i for i, size in enumerate(sizes) if size % self.mesh.shape[axis] == 0]
            if fitting:
                widest = max(fitting, key=sizes.__getitem__)
                sizes[widest] //= self.mesh.shape[axis]
                spec[widest] += (axis,)
        return NamedSharding(self.mesh, PartitionSpec(*(part or None for part in spec)))

    def sharding(self, names: logical_axes.AxisNames, shape: tuple[int, ...]) -> NamedSharding:
        """Of an array of that shape whose axes have these logical names.

        Where the mesh axes of a name do not divide the size, the last are dropped (a vocabulary of 96 over 5 devices).
        Raises `UserError` where two names of one array ask for the same mesh axis.
        """
        table, spec, owner = dict(self.rules), [], {}
        for name, size in zip(names + (None,) * (len(shape) - len(names)), shape, strict=True):
            target = table.get(name) if name else None
            wanted = target if isinstance(target, tuple) else (target,) if target else ()
            for axis in wanted:
                if owner.setdefault(axis, name) != name:
                    raise UserError(
                        f"axes {owner[axis]!r} and {name!r} of an array {names} both map to mesh axis {axis!r}: "
                        "rename one of them or change its rule in partitioning.TABLES"
                    )
            while size % math.prod(self.mesh.shape[axis] for axis in wanted):
                wanted = wanted[:-1]
            spec.append(wanted if len(wanted) > 1 else wanted[0] if wanted else None)
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    def storage_shardings(self, names: logical_axes.AxisNames, shape: tuple[int, ...]) -> list[NamedSharding]:
        """The way of a kernel's gradient from where the kernel works to where it rests, one mesh axis after another.

        In one step over both directions of a torus, XLA:TPU sums the whole gradient on every device and then cuts it:
        twice the traffic. Axis by axis it scatters.
        """
        work, rest = (
            [(part,) if isinstance(part, str) else part or () for part in self.sharding(n, shape).spec]
            for n in (tuple(axes.compute_axis(name) for name in names), names)
        )
        kept, steps = set(sum(work, ())), []
        for axis in [axis for axis in MESH_AXES if axis in sum(rest, ()) and axis not in kept]:
            kept.add(axis)
            steps.append(PartitionSpec(*(tuple(a for a in part if a in kept) or None for part in rest)))
        return [NamedSharding(self.mesh, step) for step in steps]

    def compute_shardings(self, names: logical_axes.AxisNames, shape: tuple[int, ...]) -> list[NamedSharding]:
        """The way of a kernel from where it rests to where it works: in one gather over both directions, which uses
        all links of a plane. In a network of three dimensions, and for parts thinner than a tile, XLA:TPU would write
        that gather as a sum of kernels that are mostly zeros; there one mesh axis is gathered after another.
        """
        rest, work = (self.sharding(n, shape) for n in (names, tuple(axes.compute_axis(name) for name in names)))
        home = self.storage_shardings(names, shape)
        thin = any(size > part >= 1 and part < _TILE for size, part in zip(shape, rest.shard_shape(shape), strict=True))
        devices = getattr(self.mesh, "devices", np.array([None]))
        solid = sum(place > 0 for place in getattr(devices.flat[-1], "coords", ())) > 2
        return [rest, *(home[-2::-1] if thin or solid else ()), work]

    def shard_map(
        self, fn: Callable[..., Any], inputs: tuple[logical_axes.AxisNames, ...], output: logical_axes.AxisNames
    ) -> Callable[..., Any]:
        """`fn` on each device's shards of arrays with these logical names."""
        rules = dict(self.rules)
        *specs, out = (PartitionSpec(*(name and rules[name] for name in names)) for names in (*inputs, output))
        return jax.shard_map(fn, mesh=self.mesh, in_specs=tuple(specs), out_specs=out, check_vma=False)

    def axis_size(self, name: str) -> int:
        """Into how many parts an axis of that logical name is cut."""
        target = dict(self.rules)[name] or ()
        return math.prod(self.mesh.shape[axis] for axis in ((target,) if isinstance(target, str) else target))

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def examples(self) -> NamedSharding:
        """Leading axis split as examples are."""
        return NamedSharding(self.mesh, PartitionSpec(dict(self.rules)[axes.BATCH]))

    def rows(self, count: int) -> Int[np.ndarray, " b"]:
        """Which of a batch's `count` rows this process's devices hold. Processes that share a row both hold it."""
        parts = self.examples.addressable_devices_indices_map((count,)).values()
        return np.unique(np.concatenate([np.arange(count)[part] for part in parts]))

    def put(self, batch: Any) -> Any:
        """The `rows` of a batch (numpy) that this process holds -> global arrays split by example."""
        if jax.process_count() == 1:
            return jax.device_put(batch, self.examples)
        return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(self.examples, leaf), batch)

    def init(self, fn: Callable[..., Any], *args: Any) -> Any:
        """Runs an initialiser of boxed arrays straight into its shardings; returns unboxed arrays."""
        shardings = self.shardings(jax.eval_shape(fn, *args))
        return self.jit(lambda *a: nn.meta.unbox(fn(*a)), out_shardings=shardings)(*args)


def make_plan(compute: ComputeSpec, devices: list[Any] | None = None) -> Plan:
    """The plan that a `ComputeSpec` asks for, over all devices unless some are given.

    Raises `UserError` for an unknown strategy, or slices and a mesh that do not divide the devices.
    """
    devices = jax.devices() if devices is None else devices
    strategy, one_slice = _chosen(compute, devices[0].platform, len(devices))
    if compute.slices > 1 and len({getattr(device, "slice_index", 0) for device in devices}) > 1:
        grid = mesh_utils.create_hybrid_device_mesh(
            one_slice, (compute.slices, 1, 1, 1), devices, allow_split_physical_axes=True
        )
    elif compute.slices > 1:
        grid = np.asarray(devices).reshape(compute.slices, *one_slice[1:])
    else:
        grid = mesh_utils.create_device_mesh(one_slice, devices, allow_split_physical_axes=True)
    return Plan(Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * 4), tuple(TABLES[strategy].items()))


def outline(compute: ComputeSpec, platform: str, devices: int) -> Plan:
    """The plan on devices that are not there: enough for `check_batch`. Raises `UserError` as `make_plan` does."""
    strategy, one_slice = _chosen(compute, platform, devices)
    mesh = AbstractMesh((compute.slices, *one_slice[1:]), MESH_AXES)
    return Plan(mesh, tuple(TABLES[strategy].items()))  # type: ignore[arg-type]


def _chosen(compute: ComputeSpec, platform: str, devices: int) -> tuple[str, tuple[int, int, int, int]]:
    """The table, and the mesh of one slice."""
    if compute.strategy not in ("auto", *TABLES):
        raise unknown("compute.strategy", compute.strategy, ("auto", *TABLES))
    if devices % compute.slices:
        raise UserError(f"compute.slices={compute.slices} does not divide {devices} device(s)")
    strategy, shape = compute.strategy, compute.mesh
    if strategy == "auto":
        strategy, best = by_kind(platform, devices // compute.slices)
        shape = best if shape == (-1, 1, 1) else shape
    return strategy, (1, *mesh_shape(shape, devices // compute.slices))


def by_kind(platform: str, devices: int) -> tuple[str, tuple[int, int, int]]:
    """What "auto" means: a table, and the mesh in the place of (-1, 1, 1).

    Accelerators split the state in two directions, as near to a square as powers of two come: gradients are scattered
    one direction at a time, and widths that all devices do not divide are divided by each direction.
    """
    if platform == "cpu" or devices == 1:
        return "replicated", (-1, 1, 1)
    side = max(2**n for n in range(devices.bit_length()) if devices % 2**n == 0 and 4**n <= devices)
    return "fsdp", (1, -1, side)


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
    parts = plan.axis_size(axes.BATCH) * microbatches
    if batch_examples % parts:
        groups = "groups of devices" + " x microbatches" * (microbatches > 1)
        raise UserError(
            f"{field}={batch_examples} does not divide into {groups} = {parts} parts: "
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
