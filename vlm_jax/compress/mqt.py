"""`mqt`: the Matryoshka Query Transformer (arXiv 2405.19315). The first V of `spec.queries` learned queries:

    token = Attention(LN(query + position), keys = LN(positions), values = LN(tokens))

with the fixed sine and cosine positions of a square of queries, resized to the patch grid for the keys: the scores
have no image content, so that each token is a learned linear map of the normalised patches. Tokens do not see each
other: those of m queries are the first m of V. The published projection has no bias; here it is the `ModelSpec`'s.
"""

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.compress import layers, published_init
from vlm_jax.compress.layers import Weights
from vlm_jax.compress.sizes.mqt import (  # noqa: F401
    QUERIES,
    defaults,
    mqt_cost,
    mqt_tokens,
    problem,
)
from vlm_jax.core.axes import POSITION, VISION
from vlm_jax.core.specs import CompressorSpec
from vlm_jax.core.structs import Evidence, Prefix
from vlm_jax.ops import grid as g
from vlm_jax.ops.initializers import table

_EPS = 1e-6


def init_mqt(key: jax.Array, spec: CompressorSpec) -> Weights:
    queries, attention, values = jax.random.split(key, 3)
    width = spec.encoder_width
    weights = {
        "queries": table(queries, (spec.queries, width), (POSITION, VISION)),
        **{f"{name}_norm": layers.init_norm(width) for name in ("query", "key", "value")},
        "attention": layers.init_attention(attention, spec.width, spec.heads, width, width, width),
    }
    return published_init.draw(weights, values, published_init.truncated_normal)


def mqt(weights: Weights, evidence: Evidence, spec: CompressorSpec) -> Prefix:
    """Tokens [B, V, E]."""
    x, mask, side = evidence.tokens, evidence.mask, round(spec.queries**0.5)
    positions = g.sincos((side, side), spec.encoder_width).astype(np.float16).astype(np.float32)

    def rows(name: str, y: jax.Array) -> jax.Array:
        y = layers.layer_norm(weights[f"{name}_norm"], y, _EPS).astype(x.dtype)
        return jnp.broadcast_to(y, (x.shape[0], *y.shape))

    queries = rows("query", weights["queries"][: spec.tokens] + positions[: spec.tokens])
    keys = rows("key", jnp.asarray(g.resize(positions, (side, side), spec.grid)))
    tokens = layers.attention(
        weights["attention"], queries, keys, layers.layer_norm(weights["value_norm"], x, _EPS), mask
    )
    return Prefix(tokens, None if mask is None else jnp.broadcast_to(mask.any(1, keepdims=True), tokens.shape[:2]))
