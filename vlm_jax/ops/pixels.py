"""8-bit pixels to what an encoder was trained on: the one place, for the host (numpy) and for the device (jax)."""

from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from vlm_jax.core.specs import EncoderSpec


def normalise(pixels: UInt8[Any, "... 3"], spec: EncoderSpec) -> Float[Any, "... 3"]:
    """uint8 levels -> float32: times `pixel_rescale`, less `pixel_mean`, over `pixel_std`.

    On numpy arrays bit for bit what the Pillow processors of transformers give: there the scaled level is formed in
    float64 and rounded once. On jax arrays all of it is float32, which differs from that by a rounding or two.
    """
    mean, std = np.asarray(spec.pixel_mean, np.float32), np.asarray(spec.pixel_std, np.float32)
    return ((pixels * spec.pixel_rescale).astype(np.float32) - mean) / std
