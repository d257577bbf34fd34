"""Pixel normalisation, on the host (numpy) and on the device (jax)."""

from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from vlm_jax.core.specs import EncoderSpec


def normalise(pixels: UInt8[Any, "... 3"], spec: EncoderSpec) -> Float[Any, "... 3"]:
    """uint8 pixels -> float32 (pixels * pixel_rescale - pixel_mean) / pixel_std.

    Bit-exact with the Pillow processors of transformers on numpy arrays (the product is float64; computed once for each
    level); float32 on jax ones.
    """
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8:
        return _normalise(pixels, spec)
    levels = np.arange(256, dtype=np.uint8)
    table = _normalise(np.stack([levels] * 3, axis=-1), spec)
    if (table == table[:, :1]).all():
        return table[:, 0].take(pixels)
    out = np.empty(pixels.shape, np.float32)
    for channel in range(3):
        out[..., channel] = table[:, channel].take(pixels[..., channel])
    return out


def _normalise(pixels: Any, spec: EncoderSpec) -> Any:
    mean, std = np.asarray(spec.pixel_mean, np.float32), np.asarray(spec.pixel_std, np.float32)
    return ((pixels * spec.pixel_rescale).astype(np.float32) - mean) / std
