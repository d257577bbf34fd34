"""Between the encoder and the decoder: a compressor from the catalog, then a projector to the decoder's width."""

from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from vlm_jax.compress import catalog
from vlm_jax.core.axes import ACT_EMBED, BATCH, EMBED, LENGTH, MLP, VISION
from vlm_jax.core.errors import unknown
from vlm_jax.core.specs import ModelSpec
from vlm_jax.core.structs import Visual
from vlm_jax.ops import weights as w

PROJECTORS = ("linear", "mlp")


def init_weights(key: Array, spec: ModelSpec) -> dict[str, Any]:
    """Boxed weights of both halves. Raises `UserError` for an unknown projector, or V that the grid cannot give."""
    catalog.check(spec.compressor)
    if spec.projector not in PROJECTORS:
        raise unknown("projector", spec.projector, PROJECTORS)
    compress_key, first, second = jax.random.split(key, 3)
    encoder_width, width = spec.encoder.width, spec.decoder.width
    inner = EMBED if spec.projector == "linear" else MLP
    projector = {"kernel": w.dense(first, (encoder_width, width), (VISION, inner)), "bias": w.zeros((width,), (inner,))}
    if spec.projector == "mlp":
        projector["out_kernel"] = w.dense(second, (width, width), (MLP, EMBED))
        projector["out_bias"] = w.zeros((width,), (EMBED,))
    return {
        "compressor": catalog.row(spec.compressor.name).init_weights(compress_key, spec.compressor),
        "projector": projector,
    }


def compress(
    weights: Any, visual: Visual, text_vector: Float[Array, "B D"] | None, spec: ModelSpec
) -> Float[Array, "B V D"]:
    """P patches -> V tokens of the decoder's width."""
    out = catalog.row(spec.compressor.name).apply(weights["compressor"], visual, text_vector, spec.compressor).tokens
    projector = jax.tree.map(lambda leaf: leaf.astype(out.dtype), weights["projector"])
    out = out @ projector["kernel"] + projector["bias"]
    if spec.projector == "mlp":
        out = jax.nn.gelu(out, approximate=True) @ projector["out_kernel"] + projector["out_bias"]
    return nn.with_logical_constraint(out, (BATCH, LENGTH, ACT_EMBED))
