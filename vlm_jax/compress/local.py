"""Compressors whose tokens attend only within their own cell of the patch grid.

The h x w grid is divided into r x c equal cells, V = r c. Both methods differ only in the query of a cell:

    z      = the A tapped encoder layers concatenated, [P, A E]; the tokens if spec.taps is 0
    keys   = LN(Linear(GELU(Linear(z)))),  values likewise with other weights
    token  = MultiHead(query, keys of its cell, values of its cell)

`tokenpacker` (arXiv 2407.02392): query = LN(Linear(bilinear down-sampling of the tokens to r x c)), without a bias.
`quecc` (arXiv 2411.03312): the question enters the query,

    u      = tokens + LN(Linear(text))
    query  = Conv(LN(Linear(GELU(Linear(u)))))          depthwise, kernel = stride = one cell

where text is the decoder's question vector, without gradient. The inner width is `spec.width` (E in the papers); the
attention's output projection returns to E. The papers' last MLP is the projector of the `ModelSpec`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.compress import layers, published_init
from vlm_jax.compress.layers import Weights
from vlm_jax.compress.sizes.local import (  # noqa: F401
    cell_shape,
    cell_tokens,
    defaults,
    quecc_cost,
    tapped_layers,
    tokenpacker_cost,
)
from vlm_jax.core.axes import NORM, POSITION, VISION
from vlm_jax.core.specs import CompressorSpec
from vlm_jax.core.structs import Evidence, Prefix
from vlm_jax.ops import grid as g
from vlm_jax.ops.initializers import dense, zeros


def init_tokenpacker(key: jax.Array, spec: CompressorSpec) -> Weights:
    shared, query, values = jax.random.split(key, 3)
    weights = {
        "query": layers.without_bias(layers.init_linear(query, spec.encoder_width, spec.width)),
        "query_norm": layers.init_norm(spec.width),
        **_init_cells(shared, spec),
    }
    return published_init.draw(weights, values, published_init.truncated_normal)


def tokenpacker(weights: Weights, evidence: Evidence, spec: CompressorSpec) -> Prefix:
    """Tokens [B, V, E]; the query of a cell is its down-sampled tokens."""
    (h, w), (r, c) = spec.grid, cell_shape(spec)
    coarse, _ = g.weighted_mean(evidence.tokens, evidence.mask, g.bilinear(h, r), g.bilinear(w, c))
    queries = layers.layer_norm(weights["query_norm"], layers.linear(weights["query"], coarse))
    return _attend_to_cells(weights, queries, evidence, spec)


def init_quecc(key: jax.Array, spec: CompressorSpec) -> Weights:
    shared, text, query, down, values = jax.random.split(key, 5)
    cell = spec.grid[0] * spec.grid[1] // spec.tokens
    weights = {
        "text": layers.init_linear(text, spec.text_width, spec.encoder_width, layers.OF_TEXT),
        "text_norm": layers.init_norm(spec.encoder_width),
        "query": layers.init_mlp(query, spec.encoder_width, spec.width, spec.width),
        "query_norm": layers.init_norm(spec.width),
        "down": {"kernel": dense(down, (cell, spec.width), (POSITION, VISION)), "bias": zeros((spec.width,), (NORM,))},
        **_init_cells(shared, spec),
    }
    return published_init.draw(weights, values, published_init.torch_default)


def quecc(weights: Weights, evidence: Evidence, spec: CompressorSpec) -> Prefix:
    """Tokens [B, V, E]; the query of a cell combines its tokens and the question."""
    tokens, text = evidence.tokens, evidence.question_vector
    question = layers.layer_norm(
        weights["text_norm"], layers.linear(weights["text"], text.astype(tokens.dtype), layers.OF_TEXT)
    )
    fine = layers.layer_norm(weights["query_norm"], layers.mlp(weights["query"], tokens + question[:, None]))
    if evidence.mask is not None:
        fine = jnp.where(evidence.mask[..., None], fine, 0)
    # Depthwise convolution with stride = kernel size: one weighted sum for each cell and channel.
    cells = g.split_cells(fine, spec.grid, cell_shape(spec))
    kernel, bias = (weights["down"][name].astype(fine.dtype) for name in ("kernel", "bias"))
    queries = jnp.einsum("bvse,se->bve", cells, kernel) + bias
    return _attend_to_cells(weights, queries, evidence, spec)


def _init_cells(key: jax.Array, spec: CompressorSpec) -> Weights:
    keys, values, attention = jax.random.split(key, 3)
    layers_width = max(spec.taps, 1) * spec.encoder_width
    return {
        "keys": layers.init_mlp(keys, layers_width, spec.width, spec.width),
        "keys_norm": layers.init_norm(spec.width),
        "values": layers.init_mlp(values, layers_width, spec.width, spec.width),
        "values_norm": layers.init_norm(spec.width),
        "attention": layers.init_attention(attention, spec.width, spec.heads, spec.encoder_width),
    }


def _attend_to_cells(
    weights: Weights, queries: Float[Array, "B V width"], evidence: Evidence, spec: CompressorSpec
) -> Prefix:
    """Attention of query v to the patches of cell v, as a batch of B V single queries."""
    z = _tap_layers(evidence, spec)

    def by_cell(x: Array) -> Array:
        cells = g.split_cells(x, spec.grid, cell_shape(spec))
        return cells.reshape(-1, *cells.shape[2:])

    keys, values = (
        by_cell(layers.layer_norm(weights[f"{name}_norm"], layers.mlp(weights[name], z))) for name in ("keys", "values")
    )
    mask = None if evidence.mask is None else by_cell(evidence.mask)
    tokens = layers.attention(weights["attention"], queries.reshape(-1, 1, spec.width), keys, values, mask)
    kept = None if mask is None else mask.any(1).reshape(-1, spec.tokens)
    return Prefix(tokens.reshape(-1, spec.tokens, spec.encoder_width), kept)


def _tap_layers(evidence: Evidence, spec: CompressorSpec) -> Float[Array, "B P features"]:
    if spec.taps == 0:
        return evidence.tokens
    if evidence.taps is None or evidence.taps.shape[1] != spec.taps:
        found = 0 if evidence.taps is None else evidence.taps.shape[1]
        raise ValueError(f"{spec.name}: expected {spec.taps} tapped layers, got {found}")
    batch, _, patches, _ = evidence.taps.shape
    return jnp.swapaxes(evidence.taps, 1, 2).reshape(batch, patches, -1).astype(evidence.tokens.dtype)
