"""A few rows times a large kernel, on a CPU: what saying a token is made of.

The kernel is read once and nothing else costs, so the product should run at the speed of memory. XLA's own product of
a few rows stays well below it, most of all where the kernel is long: in groups of the kernel's rows, each a small
product, whose results are then added, it comes much nearer (experiments/inference_speed/products.py).
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_MOST_ROWS = 8
_SMALL = 2**18  # scalars of a kernel that stays in the cache, where nothing is gained
_SMALL_FOR_ONE = 2**20
_GROUP = range(64, 31, -1)  # the kernel's rows in a group, the more the better


def contract(x: Float[Array, "... inputs"], kernel: Float[Array, "..."], count: int) -> Float[Array, "..."]:
    """Contracts the last `count` axes of x with the first of the kernel."""
    inputs, outputs = kernel.shape[:count], kernel.shape[count:]

    def plain(x: Array, kernel: Array) -> Array:
        ours, theirs = tuple(range(x.ndim - count, x.ndim)), tuple(range(count))
        return jax.lax.dot_general(x, kernel, ((ours, theirs), ((), ())))

    rows, inner = math.prod(x.shape[: x.ndim - count]), math.prod(inputs)
    group = next((size for size in _GROUP if inner % size == 0), inner)
    small = kernel.size < (_SMALL_FOR_ONE if rows == 1 else _SMALL)
    if not 1 <= rows <= _MOST_ROWS or small or group == inner or x.dtype != jnp.float32:
        return plain(x, kernel)

    def in_groups(x: Array, kernel: Array) -> Array:
        parts = jnp.einsum("rgk,gkn->grn", x.reshape(rows, -1, group), kernel.reshape(inner // group, group, -1))
        return jnp.sum(parts, axis=0).reshape(*x.shape[: x.ndim - count], *outputs)

    return jax.lax.platform_dependent(x, kernel, cpu=in_groups, default=plain)
