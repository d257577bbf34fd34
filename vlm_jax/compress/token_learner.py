"""TokenLearner (arXiv 2106.11297): each token is a weighted sum of the patches x, with weights from the image.

`token_learner` (version 1.1): weights = softmax over the patches of W2 GELU(W1 LN(x)), of `spec.width` = 64 channels.
`token_learner_conv` (version 1): weights = sigmoid of four 3 x 3 convolutions of LN(x) to V channels, with a GELU
    behind each of the first three; no biases.

Published inside a vision transformer, with blocks behind it that run on the V tokens; here behind the encoder.
"""

import jax
import jax.numpy as jnp

from vlm_jax.compress import layers, published_init
from vlm_jax.compress.contract import most_tokens
from vlm_jax.compress.layers import Weights
from vlm_jax.compress.sizes.token_learner import (  # noqa: F401
    CONVS,
    defaults,
    learner_tokens,
    token_learner_conv_cost,
    token_learner_cost,
)
from vlm_jax.core.axes import PATCH, VISION, VISION_MLP
from vlm_jax.core.specs import CompressorSpec
from vlm_jax.core.structs import Evidence, Prefix
from vlm_jax.ops import grid as g
from vlm_jax.ops.initializers import dense

_EPS = 1e-6


def init_token_learner(key: jax.Array, spec: CompressorSpec) -> Weights:
    mlp, values = jax.random.split(key)
    weights = {
        "norm": layers.init_norm(spec.encoder_width),
        "mlp": layers.init_mlp(mlp, spec.encoder_width, spec.width, most_tokens(spec)),
    }
    return published_init.draw(weights, values, published_init.xavier)


def token_learner(weights: Weights, evidence: Evidence, spec: CompressorSpec) -> Prefix:
    """Tokens [B, V, E]."""
    x, mask, mlp = evidence.tokens, evidence.mask, weights["mlp"]
    inner = jax.nn.gelu(layers.linear(mlp["up"], layers.layer_norm(weights["norm"], x, _EPS)))  # the tanh form
    down = {name: leaf[..., : spec.tokens] for name, leaf in mlp["down"].items()}
    scores = layers.linear(down, inner, layers.OUTWARDS).astype(jnp.float32)
    if mask is not None:
        scores = jnp.where(mask[..., None], scores, jnp.finfo(jnp.float32).min / 2)
    share = jax.nn.softmax(scores, axis=1)
    return _weighted_sum(share, evidence)


def init_token_learner_conv(key: jax.Array, spec: CompressorSpec) -> Weights:
    def kernel(number: int, key: jax.Array) -> Weights:
        inputs = spec.encoder_width if number == 0 else spec.tokens
        return {"kernel": dense(key, (9, inputs, spec.tokens), (PATCH, VISION, VISION_MLP), inputs=2)}

    kernels = {f"conv{i}": kernel(i, key) for i, key in enumerate(jax.random.split(key, CONVS))}
    return {"norm": layers.init_norm(spec.encoder_width), **kernels}


def token_learner_conv(weights: Weights, evidence: Evidence, spec: CompressorSpec) -> Prefix:
    """Tokens [B, V, E]; a masked patch is zero before each convolution and has weight zero."""
    x, mask = evidence.tokens, evidence.mask
    y = layers.layer_norm(weights["norm"], x, _EPS)
    for i in range(CONVS):
        y = y if mask is None else jnp.where(mask[..., None], y, 0)
        kernel = weights[f"conv{i}"]["kernel"].astype(x.dtype)
        kernel = kernel.reshape(3, 3, *kernel.shape[1:])
        layout = ("NHWC", "HWIO", "NHWC")
        conv = jax.lax.conv_general_dilated(g.to_grid(y, spec.grid), kernel, (1, 1), "SAME", dimension_numbers=layout)
        y = g.to_rows(conv) if i == CONVS - 1 else jax.nn.gelu(g.to_rows(conv))
    return _weighted_sum(jax.nn.sigmoid(y.astype(jnp.float32)), evidence)


def _weighted_sum(share: jax.Array, evidence: Evidence) -> Prefix:
    x, mask = evidence.tokens, evidence.mask
    if mask is not None:
        x, share = jnp.where(mask[..., None], x, 0), jnp.where(mask[..., None], share, 0)
    tokens = jnp.einsum("bpv,bpe->bve", share.astype(x.dtype), x)
    return Prefix(tokens, None if mask is None else jnp.broadcast_to(mask.any(1, keepdims=True), tokens.shape[:2]))
