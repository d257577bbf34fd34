"""`mqt`: the Matryoshka Query Transformer (arXiv 2405.19315). The first V of `spec.queries` learned queries:

    token = Attention(LN(query + position), keys = LN(positions), values = LN(tokens))

with the fixed sine and cosine positions of a square of queries, resized to the patch grid for the keys: the scores
have no image content, so that each token is a learned linear map of the normalised patches. Tokens do not see each
other: those of m queries are the first m of V. The published projection has no bias; here it is the `ModelSpec`'s.
"""

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.compress import layers
from vlm_jax.compress.contract import Cost
from vlm_jax.compress.layers import Count, Weights
from vlm_jax.core.axes import POSITION, VISION
from vlm_jax.core.specs import CompressorSpec, DecoderSpec, EncoderSpec
from vlm_jax.core.structs import Evidence, Prefix
from vlm_jax.ops import grid as g
from vlm_jax.ops.initializers import table

_EPS = 1e-6
QUERIES = 256


def defaults(name: str, encoder: EncoderSpec, decoder: DecoderSpec, tokens: int) -> CompressorSpec:
    """As published: 256 queries, at the encoder's width with its number of heads (16 for CLIP-L)."""
    sizes = (encoder.width, encoder.heads, 1, 0)
    return CompressorSpec(name, tokens, encoder.token_grid, encoder.width, 0, decoder.width, *sizes, queries=QUERIES)


def mqt_tokens(grid: g.GridShape) -> tuple[int, ...]:
    return tuple(range(1, min(QUERIES, grid[0] * grid[1]) + 1))


def problem(spec: CompressorSpec) -> str:
    side = round(spec.queries**0.5)
    if side**2 != spec.queries or spec.queries < spec.tokens:
        return f"queries={spec.queries} must be a square of at least tokens={spec.tokens}"
    return ""


def init_mqt(key: jax.Array, spec: CompressorSpec) -> Weights:
    queries, attention = jax.random.split(key)
    width = spec.encoder_width
    return {
        "queries": table(queries, (spec.queries, width), (POSITION, VISION)),
        **{f"{name}_norm": layers.init_norm(width) for name in ("query", "key", "value")},
        "attention": layers.init_attention(attention, spec.width, spec.heads, width, width, width),
    }


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


def mqt_cost(spec: CompressorSpec, question_tokens: Count) -> Cost:
    tokens, patches, width = spec.tokens, spec.grid[0] * spec.grid[1], spec.encoder_width
    return Cost(layers.attention_flops(tokens, patches, tokens * patches, spec.width, width, width, width))
