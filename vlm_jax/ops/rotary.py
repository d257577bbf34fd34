"""Rotary position embedding (arXiv 2104.09864), half-split: channel c is rotated with channel c + C/2."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlm_jax.core.specs import RopeBands


def angles(
    position: Int[Array, "B L"], head_dim: int, theta: float, factor: float = 1.0, bands: RopeBands | None = None
) -> Float[Array, "B L half"]:
    """position * f_c, f_c = theta^(-2c/C) for c = 0 .. C/2 - 1, in float32.

    factor: divides every frequency; with `bands` f_c becomes (1 - s) f_c / factor + s f_c, where s is linear in the
        turns within the original context (Llama 3.1, arXiv 2407.21783) or in the channel (YaRN, arXiv 2309.00071, as in
        its authors' code; first and last are clipped to 0 .. C - 1, and with "whole channels" rounded outwards):

            s = clip((turns(c) - low) / (high - low), 0, 1),    turns(c) = original_context f_c / 2 pi
            s = 1 - clip((c - first) / (last - first), 0, 1),    turns(first) = high, turns(last) = low
    """
    channel = jnp.arange(head_dim // 2, dtype=jnp.float32)
    frequency = theta ** (-2 * channel / head_dim)
    keep: Array | float = 0.0
    if bands is not None and bands.ramp == "turns":
        turns = bands.original_context * frequency / (2 * math.pi)
        keep = jnp.clip((turns - bands.low) / (bands.high - bands.low), 0, 1)
    elif bands is not None:
        first, last = _ends(bands, head_dim, theta)
        keep = 1 - jnp.clip((channel - first) / (last - first), 0, 1)
    return position[..., None].astype(jnp.float32) * ((1 - keep) * frequency / factor + keep * frequency)


def _ends(bands: RopeBands, head_dim: int, theta: float) -> tuple[float, float]:
    """YaRN's first and last channel; last > first."""

    def channel(turns: float) -> float:
        return head_dim * math.log(bands.original_context / (2 * math.pi * turns)) / (2 * math.log(theta))

    first, last = channel(bands.high), channel(bands.low)
    if bands.ramp == "whole channels":
        first, last = float(math.floor(first)), float(math.ceil(last))
    first, last = max(first, 0.0), min(last, head_dim - 1.0)
    return first, last if last != first else first + 1e-3


def rotate(x: Float[Array, "B L N C"], angle: Float[Array, "B L half"]) -> Float[Array, "B L N C"]:
    """Rotates each channel pair (c, c + C/2) by its angle, in float32; returns the dtype of `x`."""
    wide, sin = x.astype(jnp.float32), jnp.sin(angle)
    cos, sin = (jnp.concatenate(halves, axis=-1)[:, :, None] for halves in ((jnp.cos(angle),) * 2, (-sin, sin)))
    return (wide * cos + jnp.roll(wide, x.shape[-1] // 2, axis=-1) * sin).astype(x.dtype)
