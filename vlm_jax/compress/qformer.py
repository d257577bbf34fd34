"""The Q-Former (BLIP-2, arXiv 2301.12597): V queries through `spec.depth` post-norm layers of width W,

    y = LN(queries)                              with a question: y = LN([queries; question])
    y = LN(y + SelfAttention(y))                 padding of the question masked
    q = LN(q + Attention(q, keys = values = patches))                         the queries, in every other layer
    q = LN(q + W2 GELU(W1 q))                    the question has such an MLP of its own

`qformer` has no question; `qformer_question` is InstructBLIP's (arXiv 2305.06500), whose text is the question: here the
decoder's embeddings of it in a linear map to W, where the published one has a table for BERT's vocabulary. The text's
part is dropped at the end. The published weights start from BERT and need two stages before the language model.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from vlm_jax.compress import layers, published_init
from vlm_jax.compress.layers import Weights
from vlm_jax.compress.sizes.qformer import (  # noqa: F401
    CROSS_EVERY,
    defaults,
    qformer_cost,
    with_question_cost,
)
from vlm_jax.core.axes import POSITION, VISION
from vlm_jax.core.specs import CompressorSpec
from vlm_jax.core.structs import Evidence, Prefix
from vlm_jax.ops.initializers import table

_EPS = 1e-12
_POSITIONS = 512  # of the question


def init_qformer(key: jax.Array, spec: CompressorSpec) -> Weights:
    queries, values, *deep = jax.random.split(key, 2 + spec.depth)
    weights = {
        "queries": table(queries, (spec.tokens, spec.width), (POSITION, VISION)),
        "norm": layers.init_norm(spec.width),
        **{f"layer{i}": _init_layer(key, i, spec) for i, key in enumerate(deep)},
    }
    return published_init.draw(weights, values, published_init.normal)


def init_with_question(key: jax.Array, spec: CompressorSpec) -> Weights:
    own, text, positions, values, *deep = jax.random.split(key, 4 + spec.depth)
    weights = init_qformer(own, spec)
    weights["text"] = layers.init_linear(text, spec.text_width, spec.width, layers.OF_TEXT)
    for i, key in enumerate(deep):
        weights[f"layer{i}"] |= _init_mlp(key, "text_mlp", spec)
    return {
        **published_init.draw(weights, values, published_init.normal),
        "text_positions": table(positions, (_POSITIONS, spec.width), (POSITION, VISION)),
    }


def _init_layer(key: jax.Array, number: int, spec: CompressorSpec) -> Weights:
    own, cross, mlp = jax.random.split(key, 3)
    width = spec.width
    weights = {
        "attention": layers.init_attention(own, width, spec.heads, width),
        "attention_norm": layers.init_norm(width),
        **_init_mlp(mlp, "mlp", spec),
    }
    if number % CROSS_EVERY == 0:
        weights["cross"] = layers.init_attention(cross, width, spec.heads, width, key_inputs=spec.encoder_width)
        weights["cross_norm"] = layers.init_norm(width)
    return weights


def _init_mlp(key: jax.Array, name: str, spec: CompressorSpec) -> Weights:
    mlp = layers.init_mlp(key, spec.width, spec.mlp_width, spec.width)
    return {name: mlp, f"{name}_norm": layers.init_norm(spec.width)}


def qformer(weights: Weights, evidence: Evidence, spec: CompressorSpec) -> Prefix:
    """Tokens [B, V, W]; with `question_tokens` they depend on the question."""
    x, mask, tokens = evidence.tokens, evidence.mask, spec.tokens
    y = jnp.broadcast_to(weights["queries"].astype(x.dtype), (x.shape[0], tokens, spec.width))
    visible = None
    if evidence.question_tokens is not None:
        text = layers.linear(weights["text"], evidence.question_tokens.astype(x.dtype), layers.OF_TEXT)
        position = jnp.minimum(jnp.arange(text.shape[1]), _POSITIONS - 1)
        y = jnp.concatenate([y, text + weights["text_positions"].astype(x.dtype)[position]], axis=1)
        visible = jnp.pad(evidence.question_mask, ((0, 0), (tokens, 0)), constant_values=True)
    y = layers.layer_norm(weights["norm"], y, _EPS)

    def added(layer: Weights, name: str, y: Array, change: Array) -> Array:
        return layers.layer_norm(layer[f"{name}_norm"], y + change, _EPS)

    for i in range(spec.depth):
        layer = weights[f"layer{i}"]
        y = added(layer, "attention", y, layers.attention(layer["attention"], y, y, y, visible))
        q, text = y[:, :tokens], y[:, tokens:]
        if "cross" in layer:
            q = added(layer, "cross", q, layers.attention(layer["cross"], q, x, x, mask))
        y = added(layer, "mlp", q, layers.mlp(layer["mlp"], q))
        if "text_mlp" in layer and i + 1 < spec.depth:  # nothing reads the text of the last layer
            text = added(layer, "text_mlp", text, layers.mlp(layer["text_mlp"], text))
            y = jnp.concatenate([y, text], axis=1)
    return Prefix(y, None if mask is None else jnp.broadcast_to(mask.any(1, keepdims=True), y.shape[:2]))
