"""Sharding by logical axis names inside jitted programs.

`partitioning.Plan.jit` sets the rules (`use_rules`) that map names to mesh axes; without rules every function here is a
no-op. A kernel is stored sharded in float32 and multiplied in the activations' dtype: `gather_for_compute` casts, then
gathers, which halves the traffic; its gradient is reduce-scattered to the storage sharding, so that no device holds the
summed gradient of a whole kernel.
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
    """The interface of `partitioning.Plan` that this module uses."""

    @property
    def platform(self) -> str: ...

    def axis_size(self, name: str) -> int: ...

    def sharding(self, names: AxisNames, shape: tuple[int, ...]) -> Any: ...

    def compute_shardings(self, names: AxisNames, shape: tuple[int, ...]) -> list[Any]: ...

    def storage_shardings(self, names: AxisNames, shape: tuple[int, ...]) -> list[Any]: ...

    def shard_map(
        self, fn: Callable[..., Array], inputs: tuple[AxisNames, ...], output: AxisNames
    ) -> Callable[..., Array]: ...


_rules: contextvars.ContextVar[ShardingRules | None] = contextvars.ContextVar("rules", default=None)


@contextlib.contextmanager
def use_rules(rules: ShardingRules) -> Iterator[None]:
    """Sets the sharding rules within the block."""
    token = _rules.set(rules)
    try:
        yield
    finally:
        _rules.reset(token)


def platform() -> str:
    """Kind of device that the program is for: "cpu", "gpu" or "tpu"; without rules, this process's."""
    rules = _rules.get()
    return jax.default_backend() if rules is None else rules.platform


def axis_size(name: str) -> int:
    """Number of shards of an axis of that name."""
    rules = _rules.get()
    return 1 if rules is None else rules.axis_size(name)


def constrain(x: Array, names: AxisNames) -> Array:
    """`x` with the sharding of its axis names; an axis that does not divide evenly is not sharded."""
    rules = _rules.get()
    return x if rules is None else jax.lax.with_sharding_constraint(x, rules.sharding(names, x.shape))


def on_each_device(fn: Callable[..., Array], inputs: tuple[AxisNames, ...], output: AxisNames) -> Callable[..., Array]:
    """`fn` under shard_map, for kernels that XLA cannot partition; every axis must divide evenly."""
    rules = _rules.get()
    return fn if rules is None else rules.shard_map(fn, inputs, output)


def gather_for_compute(kernel: Array | np.ndarray, names: AxisNames, dtype: jax.typing.DTypeLike) -> Array:
    """A kernel with axis names `names`, cast to `dtype` and moved to its compute sharding."""
    return _gather_for_compute(kernel, names, jax.numpy.dtype(dtype).name, kernel.dtype.name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather_for_compute(kernel: Array | np.ndarray, names: AxisNames, dtype: str, storage_dtype: str) -> Array:
    del storage_dtype
    values: Any = kernel.astype(dtype)
    return _reshard(values, lambda rules: rules.compute_shardings(names, kernel.shape))


def _forward(kernel: Array | np.ndarray, names: AxisNames, dtype: str, storage_dtype: str) -> tuple[Array, None]:
    return _gather_for_compute(kernel, names, dtype, storage_dtype), None


def _backward(names: AxisNames, dtype: str, storage_dtype: str, _: None, gradient: Array) -> tuple[Array]:
    del dtype
    return (_reshard(gradient, lambda rules: rules.storage_shardings(names, gradient.shape)).astype(storage_dtype),)


def _reshard(x: Array, shardings: Callable[[ShardingRules], list[Any]]) -> Array:
    """Applies several shardings one after another."""
    rules = _rules.get()
    for sharding in () if rules is None else shardings(rules):
        x = jax.lax.with_sharding_constraint(x, sharding)
    return x


_gather_for_compute.defvjp(_forward, _backward)
