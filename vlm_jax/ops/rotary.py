"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in the half-split convention of published checkpoints:
channel c turns together with channel c + C/2.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlm_jax.core.specs import RopeBands


def angles(
    position: Int[Array, "B L"], head_dim: int, theta: float, factor: float = 1.0, bands: RopeBands | None = None
) -> Float[Array, "B L half"]:
    """position * f_c, f_c = theta^(-2c/C) for c = 0 .. C/2 - 1, in float32.

    factor: divides every frequency, or with `bands` f_c becomes

        (1 - s) f_c / factor + s f_c,    s = clip((original_context f_c / 2 pi - low) / (high - low), 0, 1)

    so that fast frequencies stay and slow ones are divided (Llama 3.1, arXiv 2407.21783).
    """
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    keep = 0.0
    if bands is not None:
        turns = bands.original_context * frequency / (2 * math.pi)  # in the original context
        keep = jnp.clip((turns - bands.low) / (bands.high - bands.low), 0, 1)
    return position[..., None].astype(jnp.float32) * ((1 - keep) * frequency / factor + keep * frequency)


def rotate(x: Float[Array, "B L N C"], angle: Float[Array, "B L half"]) -> Float[Array, "B L N C"]:
    """Turns each pair (c, c + C/2) by its angle; computed in float32, returned in the dtype of `x`."""
    wide, sin = x.astype(jnp.float32), jnp.sin(angle)
    cos, sin = (jnp.concatenate(halves, axis=-1)[:, :, None] for halves in ((jnp.cos(angle),) * 2, (-sin, sin)))
    return (wide * cos + jnp.roll(wide, x.shape[-1] // 2, axis=-1) * sin).astype(x.dtype)
