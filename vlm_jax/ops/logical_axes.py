"""Where arrays live inside a jitted program, in logical names alone; the plan in force gives the names their meaning
(`partitioning.Plan.jit` puts it in force). Without a plan every function here leaves things as they are.

A kernel rests split over the devices in float32, and is multiplied in the dtype of the activations. `working` casts
first and gathers then, so that half the bytes travel; its gradient is scattered straight back to where the kernel
rests, so that no device ever holds the summed gradient of a whole kernel.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array

AxisNames = tuple[str | None, ...]


@runtime_checkable
class ShardingRules(Protocol):
    """What is asked of a plan."""

    def axis_size(self, name: str) -> int: ...

    def sharding(self, names: AxisNames, shape: tuple[int, ...]) -> Any: ...

    def compute_shardings(self, names: AxisNames, shape: tuple[int, ...]) -> list[Any]: ...

    def storage_shardings(self, names: AxisNames, shape: tuple[int, ...]) -> list[Any]: ...

    def shard_map(
        self, fn: Callable[..., Array], inputs: tuple[AxisNames, ...], output: AxisNames
    ) -> Callable[..., Array]: ...


_plan: contextvars.ContextVar[ShardingRules | None] = contextvars.ContextVar("plan", default=None)


@contextlib.contextmanager
def use_rules(plan: ShardingRules) -> Iterator[None]:
    """Within, names mean what `plan` says."""
    token = _plan.set(plan)
    try:
        yield
    finally:
        _plan.reset(token)


def axis_size(name: str) -> int:
    """Into how many parts the plan in force cuts an axis of that name."""
    plan = _plan.get()
    return 1 if plan is None else plan.axis_size(name)


def constrain(x: Array, names: AxisNames) -> Array:
    """Holds `x` to the placement of its names; an axis that does not divide evenly stays whole."""
    plan = _plan.get()
    return x if plan is None else jax.lax.with_sharding_constraint(x, plan.sharding(names, x.shape))


def on_each_device(fn: Callable[..., Array], inputs: tuple[AxisNames, ...], output: AxisNames) -> Callable[..., Array]:
    """`fn` of each device's own shards, for kernels that the compiler cannot split; every axis must divide evenly."""
    plan = _plan.get()
    return fn if plan is None else plan.shard_map(fn, inputs, output)


def gather_for_compute(kernel: Array | np.ndarray, names: AxisNames, dtype: jax.typing.DTypeLike) -> Array:
    """The kernel, whose axes rest under `names`, in `dtype` and gathered as the plan wants it for a product."""
    return _gather_for_compute(kernel, names, jax.numpy.dtype(dtype).name, kernel.dtype.name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather_for_compute(kernel: Array | np.ndarray, names: AxisNames, dtype: str, resting_dtype: str) -> Array:
    del resting_dtype
    return _along(kernel.astype(dtype), lambda plan: plan.compute_shardings(names, kernel.shape))


def _forward(kernel: Array | np.ndarray, names: AxisNames, dtype: str, resting_dtype: str) -> tuple[Array, None]:
    return _gather_for_compute(kernel, names, dtype, resting_dtype), None


def _backward(names: AxisNames, dtype: str, resting_dtype: str, _: None, gradient: Array) -> tuple[Array]:
    del dtype
    return (_along(gradient, lambda plan: plan.storage_shardings(names, gradient.shape)).astype(resting_dtype),)


def _along(x: Array, way: Callable[[ShardingRules], list[Any]]) -> Array:
    """Through several placements, one after another."""
    plan = _plan.get()
    for sharding in () if plan is None else way(plan):
        x = jax.lax.with_sharding_constraint(x, sharding)
    return x


_gather_for_compute.defvjp(_forward, _backward)
