"""Token merging in the encoder (ToMe, arXiv 2210.09461): block i merges r_i pairs of tokens between attention and MLP.

Tokens at even places are A, at odd places B. Each A token is likest, by the cosine of its key (mean over heads), to one
B token; the r A tokens with the highest such likeness are averaged into theirs, weighted with the number of patches
that a token stands for. Its logarithm is added to the scores of the token as a key.

The class token is never merged. Order of the output: the A tokens left, in the order of the sequence with a class
token, else by falling likeness; then B. Every block has a length of its own, so that the blocks are not scanned.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.core import axes
from vlm_jax.core.specs import EncoderSpec
from vlm_jax.core.structs import Params
from vlm_jax.models.layers import ACTIVATIONS, LayerNorm, Linear
from vlm_jax.ops.attention import attend


def run_blocks(
    stacked: Params, x: Float[Array, "B S E"], spec: EncoderSpec, implementation: str
) -> Float[Array, "B M E"]:
    """All blocks with merging, from their stacked parameters."""
    size = jnp.ones((*x.shape[:2], 1), jnp.float32)
    for number, pairs in enumerate(spec.merge):
        block = jax.tree.map(lambda leaf, number=number: leaf[number], stacked)
        change, keys = _attention(block, x, size, spec, implementation)
        x = x + change
        if pairs:
            x, size = merge(keys.mean(2), x, size, pairs, spec.class_token)
        y = _norm(spec).apply({"params": block["mlp_norm"]}, x)
        width, inner = ((spec.width, axes.VISION),), ((spec.mlp_width, axes.VISION_MLP),)
        y = ACTIVATIONS[spec.activation](_linear(width, inner, block["mlp"]["up"], y))
        x = x + _linear(inner, width, block["mlp"]["down"], y)
    return x


def merge(
    keys: Float[Array, "B S C"], x: Float[Array, "B S E"], size: Float[Array, "B S 1"], pairs: int, class_token: bool
) -> tuple[Float[Array, "B M E"], Float[Array, "B M 1"]]:
    """Tokens and their sizes after merging `pairs` of A into B; M = S - pairs."""
    unit = jax.lax.stop_gradient(keys).astype(jnp.float32)
    unit = unit / jnp.linalg.norm(unit, axis=-1, keepdims=True)
    likeness = jnp.einsum("bac,bdc->bad", unit[:, ::2], unit[:, 1::2])
    if class_token:
        likeness = likeness.at[:, 0].set(-jnp.inf)
    best, partner = likeness.max(-1), likeness.argmax(-1)
    order = jnp.argsort(-best, axis=-1, stable=True)
    gone, left = order[:, :pairs], order[:, pairs:]
    if class_token:
        left = jnp.sort(left, axis=-1)
    partner = jnp.take_along_axis(partner, gone, axis=1)
    joins = jax.nn.one_hot(partner, likeness.shape[2], dtype=jnp.float32)

    def merged(tokens: Float[Array, "B S width"]) -> Float[Array, "B M width"]:
        a, b = tokens[:, ::2], tokens[:, 1::2]
        take = lambda index: jnp.take_along_axis(a, index[..., None], axis=1)  # noqa: E731
        return jnp.concatenate([take(left), b + jnp.einsum("bpd,bpe->bde", joins, take(gone))], axis=1)

    total, count = merged(x.astype(jnp.float32) * size), merged(size)
    return (total / count).astype(x.dtype), count


def _attention(
    block: Params, x: Float[Array, "B S E"], size: Float[Array, "B S 1"], spec: EncoderSpec, implementation: str
) -> tuple[Float[Array, "B S E"], Float[Array, "B S N C"]]:
    y = _norm(spec).apply({"params": block["attention_norm"]}, x)
    width = ((spec.width, axes.VISION),)
    heads = ((spec.heads, axes.VISION_HEADS), (spec.width // spec.heads, axes.HEAD_DIM))
    q, k, v = (_linear(width, heads, block["attention"][name], y) for name in ("query", "key", "value"))
    bias = jnp.log(size[..., 0])[:, None, None].astype(x.dtype)
    bias = jnp.broadcast_to(bias, (*bias.shape[:2], y.shape[1], y.shape[1]))
    mixed = attend(q, k, v, None, implementation=implementation, bias=bias)
    return _linear(heads, width, block["attention"]["out"], mixed), k


def _norm(spec: EncoderSpec) -> LayerNorm:
    return LayerNorm(spec.norm_eps, parent=None)


def _linear(inputs: Any, outputs: Any, params: Params, x: Array) -> Array:
    return Linear(inputs, outputs, bias=True, parent=None).apply({"params": params}, x)
