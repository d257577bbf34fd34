"""Pixel normalisation, on the host (numpy) and on the device (jax)."""

from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from vlm_jax.core.specs import EncoderSpec


def normalise(pixels: UInt8[Any, "... 3"], spec: EncoderSpec) -> Float[Any, "... 3"]:
    """uint8 pixels -> float32 (pixels * pixel_rescale - pixel_mean) / pixel_std.

    Bit-exact with the Pillow processors of transformers on numpy arrays (the product is float64); float32 on jax ones.
    """
    mean, std = np.asarray(spec.pixel_mean, np.float32), np.asarray(spec.pixel_std, np.float32)
    return ((pixels * spec.pixel_rescale).astype(np.float32) - mean) / std
