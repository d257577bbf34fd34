"""`perceiver`: the Perceiver resampler as published (Flamingo, arXiv 2204.14198). V latents z of the encoder's width,
in `spec.depth` layers,

    m, q = LN(x), LN(z)
    z   <- z + Attention(q, keys = values = [m; q])              the latents see each other too
    z   <- z + W2 GELU(W1 LN(z))

then a last LayerNorm; no biases outside the norms. Attention has `spec.width` channels, all heads together. Positions
come with the encoder's tokens; Flamingo's time embeddings have no use with one image.
"""

import jax
import jax.numpy as jnp

from vlm_jax.compress import layers, published_init
from vlm_jax.compress.layers import Weights
from vlm_jax.compress.sizes.perceiver import (  # noqa: F401
    defaults,
    perceiver_cost,
)
from vlm_jax.core.axes import POSITION, VISION
from vlm_jax.core.specs import CompressorSpec
from vlm_jax.core.structs import Evidence, Prefix
from vlm_jax.ops.initializers import table

_EPS = 1e-5


def init_perceiver(key: jax.Array, spec: CompressorSpec) -> Weights:
    latents, values, *deep = jax.random.split(key, 2 + spec.depth)
    weights = {
        "latents": table(latents, (spec.tokens, spec.encoder_width), (POSITION, VISION), stddev=1.0),
        **{f"layer{i}": _init_layer(key, spec) for i, key in enumerate(deep)},
        "norm": layers.init_norm(spec.encoder_width),
    }
    return published_init.draw(weights, values, published_init.torch_linear)


def _init_layer(key: jax.Array, spec: CompressorSpec) -> Weights:
    attention, mlp = jax.random.split(key)
    width = spec.encoder_width
    attention = layers.init_attention(attention, spec.width, spec.heads, width, width, width)
    return {
        "media_norm": layers.init_norm(width),
        "latent_norm": layers.init_norm(width),
        "attention": layers.without_bias(attention),
        "mlp_norm": layers.init_norm(width),
        "mlp": layers.without_bias(layers.init_mlp(mlp, width, spec.mlp_width, width)),
    }


def perceiver(weights: Weights, evidence: Evidence, spec: CompressorSpec) -> Prefix:
    """Tokens [B, V, E]."""
    x, mask = evidence.tokens, evidence.mask
    z = jnp.broadcast_to(weights["latents"].astype(x.dtype), (x.shape[0], spec.tokens, spec.encoder_width))
    visible = None if mask is None else jnp.pad(mask, ((0, 0), (0, spec.tokens)), constant_values=True)
    for i in range(spec.depth):
        layer = weights[f"layer{i}"]
        queries = layers.layer_norm(layer["latent_norm"], z, _EPS)
        keys = jnp.concatenate([layers.layer_norm(layer["media_norm"], x, _EPS), queries], axis=1)
        z = z + layers.attention(layer["attention"], queries, keys, keys, visible)
        z = z + layers.mlp(layer["mlp"], layers.layer_norm(layer["mlp_norm"], z, _EPS))
    tokens = layers.layer_norm(weights["norm"], z, _EPS)
    return Prefix(tokens, None if mask is None else jnp.broadcast_to(mask.any(1, keepdims=True), tokens.shape[:2]))
