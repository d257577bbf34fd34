"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in the half-split convention of published checkpoints:
channel c turns together with channel c + C/2.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def angles(position: Int[Array, "B L"], head_dim: int, theta: float, factor: float = 1.0) -> Float[Array, "B L half"]:
    """position / factor * theta^(-2c/C) for c = 0 .. C/2 - 1, in float32."""
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    return position[..., None].astype(jnp.float32) / factor * frequency


def rotate(x: Float[Array, "B L N C"], angle: Float[Array, "B L half"]) -> Float[Array, "B L N C"]:
    """Turns each pair (c, c + C/2) by its angle; computed in float32, returned in the dtype of `x`."""
    cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
