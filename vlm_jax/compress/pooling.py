"""Compressors without weights of their own: the two ends, average pooling before and after the projector, and pixel
shuffling.

`none` V = P; `blind` V = 0; `pool` adaptive average pooling of the encoder's tokens.
`m3` (arXiv 2405.17430): all P tokens are projected, then averaged over equal cells; the weights serve every V.
`pixel_shuffle` (InternVL, arXiv 2404.16821): the r x r tokens of a cell side by side, [r r E], and a LayerNorm; the
    projector is an MLP.
`idefics3` (arXiv 2408.12637, also SmolVLM): the same without LayerNorm; the projector is one linear layer.
"""

import jax
import jax.numpy as jnp

from vlm_jax.compress import layers
from vlm_jax.compress.layers import Weights
from vlm_jax.compress.sizes.pooling import (  # noqa: F401
    all_tokens,
    cell_tokens,
    defaults,
    m3_cost,
    no_cost,
    no_tokens,
    pool_cost,
    pool_tokens,
    shuffle_tokens,
    shuffled_width,
)
from vlm_jax.core.specs import CompressorSpec
from vlm_jax.core.structs import Evidence, Prefix
from vlm_jax.ops import grid as g


def no_weights(key: jax.Array, spec: CompressorSpec) -> dict:
    return {}


def keep_all(weights: dict, evidence: Evidence, spec: CompressorSpec) -> Prefix:
    """V = P: the tokens unchanged."""
    return Prefix(evidence.tokens, evidence.mask)


def drop_all(weights: dict, evidence: Evidence, spec: CompressorSpec) -> Prefix:
    """V = 0: no visual tokens, the blind baseline."""
    return Prefix(evidence.tokens[:, :0], None if evidence.mask is None else evidence.mask[:, :0])


def pool(weights: dict, evidence: Evidence, spec: CompressorSpec) -> Prefix:
    """Token (i, j) of r x c is the mean of the valid patches in row bin i and column bin j."""
    (h, w), (r, c) = spec.grid, g.pooling_shapes(spec.grid)[spec.tokens]
    tokens, mask = g.weighted_mean(evidence.tokens, evidence.mask, g.bins(h, r), g.bins(w, c))
    return Prefix(tokens, mask)


def m3(weights: dict, evidence: Evidence, spec: CompressorSpec) -> Prefix:
    """Token (i, j) is the mean of the projected valid patches of its cell."""
    (h, w), (r, c) = spec.grid, g.cell_shapes(spec.grid)[spec.tokens]
    return Prefix(*g.weighted_mean(evidence.project(evidence.tokens), evidence.mask, g.bins(h, r), g.bins(w, c)))


def shuffle(weights: dict, evidence: Evidence, spec: CompressorSpec) -> Prefix:
    """The tokens of a cell side by side, by row and then by column within the cell; masked ones are zero."""
    r = round((spec.grid[0] * spec.grid[1] / spec.tokens) ** 0.5)
    shape = (spec.grid[0] // r, spec.grid[1] // r)
    x, mask = evidence.tokens, evidence.mask
    if mask is not None:
        x = jnp.where(mask[..., None], x, 0)
        mask = g.split_cells(mask, spec.grid, shape).any(-1)
    cells = g.split_cells(x, spec.grid, shape)
    return Prefix(cells.reshape(*cells.shape[:2], -1), mask)


def init_pixel_shuffle(key: jax.Array, spec: CompressorSpec) -> Weights:
    return {"norm": layers.init_norm(shuffled_width(spec))}


def pixel_shuffle(weights: Weights, evidence: Evidence, spec: CompressorSpec) -> Prefix:
    """LayerNorm of the shuffled tokens."""
    cells = shuffle({}, evidence, spec)
    return cells._replace(tokens=layers.layer_norm(weights["norm"], cells.tokens, eps=1e-5))
