"""The vision transformer: SigLIP (arXiv 2303.15343), and CLIP through the fields of `EncoderSpec`.

Pixels in [-1, 1] -> patches -> learned positions -> pre-norm blocks (scanned) -> final norm. Returns the final tokens
and the outputs of the tapped blocks. The attention-pool head is a method of its own: compressors that rank tokens want
it, most do not. `models.importers.big_vision` maps every parameter here to big_vision's names.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.core import axes
from vlm_jax.core.specs import ComputeSpec, EncoderSpec
from vlm_jax.core.structs import Visual
from vlm_jax.models.layers import ACTIVATIONS, LayerNorm, Linear, remat
from vlm_jax.ops.attention import attend

_ACT = (axes.BATCH, axes.LENGTH, axes.ACT_VISION)


class Attention(nn.Module):
    """Multi-head attention with biases, queries from one sequence and keys from another."""

    spec: EncoderSpec
    implementation: str

    @nn.compact
    def __call__(self, query: Float[Array, "B Q E"], tokens: Float[Array, "B P E"]) -> Float[Array, "B Q E"]:
        width = ((self.spec.width, axes.VISION),)
        heads = ((self.spec.heads, axes.VISION_HEADS), (self.spec.width // self.spec.heads, axes.HEAD_DIM))
        q = Linear(width, heads, bias=True, name="query")(query)
        k = Linear(width, heads, bias=True, name="key")(tokens)
        v = Linear(width, heads, bias=True, name="value")(tokens)
        x = attend(q, k, v, None, implementation=self.implementation)
        return Linear(heads, width, bias=True, name="out")(x)


class Mlp(nn.Module):
    """Two layers with the encoder's activation between them."""

    spec: EncoderSpec

    @nn.compact
    def __call__(self, x: Float[Array, "B P E"]) -> Float[Array, "B P E"]:
        width, inner = ((self.spec.width, axes.VISION),), ((self.spec.mlp_width, axes.VISION_MLP),)
        x = ACTIVATIONS[self.spec.activation](Linear(width, inner, bias=True, name="up")(x))
        return Linear(inner, width, bias=True, name="down")(x)


class Block(nn.Module):
    """A pre-norm block. The carry holds the tokens and the taps; `slot` is where this layer's output goes."""

    spec: EncoderSpec
    implementation: str

    @nn.compact
    def __call__(self, carry: tuple[Array, Array], slot: Array) -> tuple[tuple[Array, Array], None]:
        x, taps = carry
        y = LayerNorm(self.spec.norm_eps, name="attention_norm")(x)
        x = x + Attention(self.spec, self.implementation, name="attention")(y, y)
        x = x + Mlp(self.spec, name="mlp")(LayerNorm(self.spec.norm_eps, name="mlp_norm")(x))
        x = nn.with_logical_constraint(x, _ACT)
        return (x, jax.lax.dynamic_update_index_in_dim(taps, x, slot, axis=1)), None


class Pool(nn.Module):
    """SigLIP's attention pool: one learned probe reads all tokens, then a residual MLP."""

    spec: EncoderSpec
    implementation: str

    @nn.compact
    def __call__(self, tokens: Float[Array, "B P E"]) -> Float[Array, "B E"]:
        start = nn.with_logical_partitioning(nn.initializers.xavier_uniform(), (None, axes.POSITION, axes.VISION))
        probe = self.param("probe", start, (1, 1, self.spec.width)).astype(tokens.dtype)
        probe = jnp.broadcast_to(probe, (tokens.shape[0], 1, self.spec.width))
        x = Attention(self.spec, self.implementation, name="attention")(probe, tokens)
        x = x + Mlp(self.spec, name="mlp")(LayerNorm(self.spec.norm_eps, name="norm")(x))
        return x[:, 0]


class Encoder(nn.Module):
    """`EncoderSpec` as a module; `encode` gives tokens, `pool` turns them into one vector."""

    spec: EncoderSpec
    compute: ComputeSpec

    def setup(self) -> None:
        spec = self.spec
        pixels = ((spec.patch_size**2 * 3, axes.PATCH),)
        self.patch = Linear(pixels, ((spec.width, axes.VISION),), bias=spec.patch_bias)
        table = nn.with_logical_partitioning(nn.initializers.normal(spec.width**-0.5), (axes.POSITION, axes.VISION))
        self.position = self.param("position", table, (spec.patches + spec.class_token, spec.width))
        if spec.class_token:
            start = nn.with_logical_partitioning(nn.initializers.normal(spec.width**-0.5), (axes.VISION,))
            self.class_token = self.param("class_token", start, (spec.width,))
        if spec.pre_norm:
            self.pre_norm = LayerNorm(spec.norm_eps)
        self.blocks = nn.scan(
            remat(Block, self.compute.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=spec.depth,
            metadata_params={nn.PARTITION_NAME: axes.LAYERS},
        )(spec, self.compute.attention)
        self.norm = LayerNorm(spec.norm_eps)
        if spec.pooling_head:
            self.pooling = Pool(spec, self.compute.attention)

    def __call__(self, image: Float[Array, "B H H 3"]) -> tuple[Visual, Any]:
        """All parameters at work: what `init` traces."""
        visual = self.encode(image)
        return visual, self.pool(visual) if self.spec.pooling_head else None

    def encode(self, image: Float[Array, "B H H 3"]) -> Visual:
        """Pixels in [-1, 1] -> `Visual(tokens[B,P,E], taps[B,A,P,E])`; a class token takes part, and is left out of
        both.
        """
        spec, dtype = self.spec, jnp.dtype(self.compute.dtype)
        (rows, columns), size = spec.grid, spec.patch_size
        batch = image.shape[0]
        image = image[:, : rows * size, : columns * size]  # a side that patches do not divide loses its border (So400m)
        patches = image.astype(dtype).reshape(batch, rows, size, columns, size, 3)
        x = self.patch(patches.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, size * size * 3))
        if spec.class_token:
            first = jnp.broadcast_to(self.class_token.astype(dtype), (batch, 1, spec.width))
            x = jnp.concatenate([first, x], axis=1)
        x = x + self.position.astype(dtype)
        if spec.pre_norm:
            x = self.pre_norm(x)
        x = nn.with_logical_constraint(x, _ACT)
        # Layers that are not tapped write to one spare slot, so memory grows with the taps and not with the depth.
        spare = len(spec.taps)
        slots = jnp.array([spec.taps.index(i) if i in spec.taps else spare for i in range(1, spec.depth + 1)])
        taps = jnp.zeros((batch, spare + 1, *x.shape[1:]), dtype)
        (x, taps), _ = self.blocks((x, taps), slots)
        start = int(spec.class_token)
        return Visual(self.norm(x)[:, start:], taps[:, :spare, start:] if spare else None)

    def pool(self, visual: Visual) -> Float[Array, "B E"]:
        """The image as one vector."""
        return self.pooling(visual.tokens)
