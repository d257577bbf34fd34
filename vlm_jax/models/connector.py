"""The connector: a compressor of the catalog, then a projector to the decoder's width."""

from typing import Any

import jax
from jaxtyping import Array, Float

from vlm_jax.compress import catalog
from vlm_jax.core.axes import ACT_EMBED, BATCH, EMBED, LENGTH, MLP, VISION, VISION_MLP
from vlm_jax.core.errors import unknown
from vlm_jax.core.specs import ModelSpec
from vlm_jax.core.structs import Visual
from vlm_jax.ops import initializers as w
from vlm_jax.ops.logical_axes import constrain, gather_for_compute

PROJECTORS = ("linear", "mlp")
_IN, _OUT = (VISION, VISION_MLP), (MLP, EMBED)  # of the projector's kernels


def init_weights(key: Array, spec: ModelSpec) -> dict[str, Any]:
    """Boxed weights of compressor and projector. Raises `UserError` for an unknown projector or unsupported V."""
    catalog.check(spec.compressor)
    if spec.projector not in PROJECTORS:
        raise unknown("projector", spec.projector, PROJECTORS)
    compress_key, first, second = jax.random.split(key, 3)
    encoder_width, width = spec.encoder.width, spec.decoder.width
    projector = {"kernel": w.dense(first, (encoder_width, width), _IN), "bias": w.zeros((width,), _IN[1:])}
    if spec.projector == "mlp":
        projector["out_kernel"] = w.dense(second, (width, width), _OUT)
        projector["out_bias"] = w.zeros((width,), _OUT[1:])
    return {
        "compressor": catalog.row(spec.compressor.name).init_weights(compress_key, spec.compressor),
        "projector": projector,
    }


def compress(weights: Any, visual: Visual, text_vector: Float[Array, "B D"] | None, spec: ModelSpec) -> Visual:
    """P patches -> V tokens of the decoder's width, with their mask (None: all valid)."""
    out = catalog.row(spec.compressor.name).apply(weights["compressor"], visual, text_vector, spec.compressor)
    x, projector = out.tokens, weights["projector"]
    x = x @ gather_for_compute(projector["kernel"], _IN, x.dtype) + projector["bias"].astype(x.dtype)
    if spec.projector == "mlp":
        inner = jax.nn.gelu(x, approximate=False)
        x = inner @ gather_for_compute(projector["out_kernel"], _OUT, x.dtype) + projector["out_bias"].astype(x.dtype)
    return Visual(constrain(x, (BATCH, LENGTH, ACT_EMBED)), mask=out.mask)
