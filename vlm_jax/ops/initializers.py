"""Initialisers of float32 arrays, boxed (`flax.linen.LogicallyPartitioned`) with a logical name of
`core.axes.KERNEL_AXES` for each axis, none twice.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.core.axes import KERNEL_AXES

_Shape = tuple[int, ...]
_Names = tuple[str, ...]

_TRUNCATED_STDDEV = 0.8796256610342398  # of a unit normal truncated at two standard deviations


def dense(key: jax.Array, shape: _Shape, names: _Names, inputs: int = 1) -> nn.LogicallyPartitioned:
    """A kernel whose first `inputs` axes are contracted: LeCun normal, truncated, variance 1 / fan-in.

    `dense(key, (E, N, C), (VISION, VISION_HEADS, HEAD_DIM))` maps E to heads; `dense(key, (N, C, E), names, inputs=2)`
    maps back.
    """
    stddev = math.prod(shape[:inputs]) ** -0.5 / _TRUNCATED_STDDEV
    return boxed(stddev * jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32), names)


def table(key: jax.Array, shape: _Shape, names: _Names, stddev: float = 0.02) -> nn.LogicallyPartitioned:
    """An embedding table, positions or learned queries: normal."""
    return boxed(stddev * jax.random.normal(key, shape, jnp.float32), names)


def zeros(shape: _Shape, names: _Names) -> nn.LogicallyPartitioned:
    return boxed(jnp.zeros(shape, jnp.float32), names)


def ones(shape: _Shape, names: _Names) -> nn.LogicallyPartitioned:
    return boxed(jnp.ones(shape, jnp.float32), names)


def boxed(value: jax.Array, names: _Names) -> nn.LogicallyPartitioned:
    """A value boxed with its axis names. Raises `ValueError` for names that do not fit."""
    if len(names) != value.ndim or len(set(names)) != len(names) or not set(names) <= set(KERNEL_AXES):
        raise ValueError(
            f"axis names {names} do not fit an array of shape {value.shape}: one of {KERNEL_AXES} per axis"
        )
    return nn.LogicallyPartitioned(value, names)
