"""One row times a large kernel, on a CPU: what saying a token is made of.

The kernel is read once and nothing else costs, so the product should run at the speed of memory. XLA's own product of
one row stays well below it where the kernel is long: in groups of the kernel's rows, each a small product, whose
results are then added, it comes much nearer (experiments/inference_speed/products.py). Several rows stay with XLA: in
groups they won on one core and lost on four.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_SMALL = 2**20  # scalars of a kernel that stays in the cache, where nothing is gained
_GROUP = range(64, 31, -1)  # the kernel's rows in a group, the more the better


def contract(x: Float[Array, "... inputs"], kernel: Float[Array, "..."], count: int) -> Float[Array, "..."]:
    """Contracts the last `count` axes of x with the first of the kernel."""
    inputs, outputs = kernel.shape[:count], kernel.shape[count:]
    inner = math.prod(inputs)

    def plain(x: Array, kernel: Array) -> Array:
        ours, theirs = tuple(range(x.ndim - count, x.ndim)), tuple(range(count))
        return jax.lax.dot_general(x, kernel, ((ours, theirs), ((), ())))

    group = next((size for size in _GROUP if inner % size == 0), inner)
    if x.size != inner or kernel.size < _SMALL or group == inner or x.dtype != jnp.float32:
        return plain(x, kernel)

    def in_groups(x: Array, kernel: Array) -> Array:
        parts = jnp.einsum("gk,gkn->gn", x.reshape(-1, group), kernel.reshape(inner // group, group, -1))
        return jnp.sum(parts, axis=0).reshape(*x.shape[: x.ndim - count], *outputs)

    return jax.lax.platform_dependent(x, kernel, cpu=in_groups, default=plain)
