"""The product of activations and a kernel."""

import jax
from jaxtyping import Array


def dense(x: Array, kernel: Array, contracted: int = 1) -> Array:
    """x[*rows, *inputs] kernel[*inputs, *outputs] -> [*rows, *outputs], with `contracted` axes of inputs.

    The axes of rows are merged, so that the gradient of the kernel contracts one axis. For two, XLA on CPUs transposes
    both operands and computes them (a derivative of GELU) one element at a time in that copy, which took a third of a
    train step.
    """
    rows, inputs = x.shape[: x.ndim - contracted], x.shape[x.ndim - contracted :]
    axes = tuple(range(1, 1 + contracted)), tuple(range(contracted))
    out = jax.lax.dot_general(x.reshape(-1, *inputs), kernel, (axes, ((), ())))
    return out.reshape(*rows, *out.shape[1:])
