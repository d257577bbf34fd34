"""The vision transformer: SigLIP (arXiv 2303.15343), and CLIP through the fields of `EncoderSpec`.

Normalised pixels -> patches -> learned positions -> pre-norm blocks (scanned) -> final norm. Returns the final tokens,
or with `feature_layer` those of an inner block, and the outputs of the tapped blocks.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from vlm_jax.core import axes
from vlm_jax.core.errors import UserError, unknown
from vlm_jax.core.specs import ComputeSpec, EncoderSpec
from vlm_jax.core.structs import Params, Visual
from vlm_jax.models import merging
from vlm_jax.models.layers import ACTIVATIONS, MLP_INNER, LayerNorm, Linear, remat
from vlm_jax.ops.attention import attend
from vlm_jax.ops.grid import bicubic
from vlm_jax.ops.logical_axes import constrain

_ACT = (axes.BATCH, axes.LENGTH, axes.ACT_VISION)


class VisionAttention(nn.Module):
    """Multi-head attention with biases; queries attend to `tokens`."""

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


class VisionMlp(nn.Module):
    """Two-layer MLP."""

    spec: EncoderSpec

    @nn.compact
    def __call__(self, x: Float[Array, "B P E"]) -> Float[Array, "B P E"]:
        width, inner = ((self.spec.width, axes.VISION),), ((self.spec.mlp_width, axes.VISION_MLP),)
        x = checkpoint_name(Linear(width, inner, bias=True, name="up")(x), MLP_INNER)
        return Linear(inner, width, bias=True, name="down")(ACTIVATIONS[self.spec.activation](x))


class VisionBlock(nn.Module):
    """A pre-norm block. The carry is (tokens, taps); the output is also written to `taps[:, slot]`."""

    spec: EncoderSpec
    implementation: str

    @nn.compact
    def __call__(self, carry: tuple[Array, Array], slot: Array) -> tuple[tuple[Array, Array], None]:
        x, taps = carry
        y = LayerNorm(self.spec.norm_eps, name="attention_norm")(x)
        x = x + VisionAttention(self.spec, self.implementation, name="attention")(y, y)
        x = x + VisionMlp(self.spec, name="mlp")(LayerNorm(self.spec.norm_eps, name="mlp_norm")(x))
        x = constrain(x, _ACT)
        return (x, jax.lax.dynamic_update_index_in_dim(taps, x, slot, axis=1)), None


class Pool(nn.Module):
    """SigLIP's attention pool: one learned probe attends to all tokens, then a residual MLP."""

    spec: EncoderSpec
    implementation: str

    @nn.compact
    def __call__(self, tokens: Float[Array, "B P E"]) -> Float[Array, "B E"]:
        start = nn.with_logical_partitioning(nn.initializers.xavier_uniform(), (None, axes.POSITION, axes.VISION))
        probe = self.param("probe", start, (1, 1, self.spec.width)).astype(tokens.dtype)
        probe = jnp.broadcast_to(probe, (tokens.shape[0], 1, self.spec.width))
        x = VisionAttention(self.spec, self.implementation, name="attention")(probe, tokens)
        x = x + VisionMlp(self.spec, name="mlp")(LayerNorm(self.spec.norm_eps, name="norm")(x))
        return x[:, 0]


class Encoder(nn.Module):
    """The encoder: `encode` returns tokens, `pool` one vector."""

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
            remat(VisionBlock, self.compute.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=spec.blocks,
            metadata_params={nn.PARTITION_NAME: axes.LAYERS},
        )(spec, self.compute.attention)
        if not spec.feature_layer:
            self.norm = LayerNorm(spec.norm_eps)
        if spec.pooling_head:
            self.pooling = Pool(spec, self.compute.attention)

    def __call__(self, image: Float[Array, "B H H 3"]) -> tuple[Visual, Any]:
        """Tokens and pooled vector; what `init` traces."""
        visual = self.encode(image)
        return visual, self.pool(visual) if self.spec.pooling_head else None

    def encode(self, image: Float[Array, "B H H 3"]) -> Visual:
        """Normalised pixels -> tokens[B,P,E], taps[B,A,P,E] and what `EncoderSpec.returns` names."""
        spec, dtype = self.spec, jnp.dtype(self.compute.dtype)
        (rows, columns), size = spec.grid, spec.patch_size
        batch = image.shape[0]
        image = image[:, : rows * size, : columns * size]  # the remainder is cropped (So400m)
        patches = image.astype(dtype).reshape(batch, rows, size, columns, size, 3)
        x = self.patch(patches.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, size * size * 3))
        if spec.class_token:
            class_token = jnp.broadcast_to(self.class_token.astype(dtype), (batch, 1, spec.width))
            x = jnp.concatenate([class_token, x], axis=1)
        x = x + self.position.astype(dtype)
        if spec.pre_norm:
            x = self.pre_norm(x)
        x = constrain(x, _ACT)
        if spec.merge and not self.is_initializing():
            x = merging.run_blocks(nn.meta.unbox(self.variables["params"]["blocks"]), x, spec, self.compute.attention)
            x = x if spec.feature_layer else self.norm(x)
            return Visual(x[:, int(spec.class_token) :])
        # All other layers write to one spare slot, so memory grows with the taps and not with the depth.
        inner = (spec.feature_layer, spec.attention_layer - 1)
        kept = tuple(dict.fromkeys((*spec.taps, *(layer for layer in inner if layer > 0))))
        slots = jnp.array([kept.index(i) if i in kept else len(kept) for i in range(1, spec.blocks + 1)])
        layers = jnp.zeros((batch, len(kept) + 1, *x.shape[1:]), dtype)
        embedded = x
        (x, layers), _ = self.blocks((x, layers), slots)
        first = int(spec.class_token)
        x = layers[:, kept.index(spec.feature_layer)] if spec.feature_layer else self.norm(x)
        visual = Visual(x[:, first:], layers[:, : len(spec.taps), first:] if spec.taps else None)
        if "class_token" in spec.returns and spec.class_token:
            visual = visual._replace(class_token=x[:, 0])
        if {"keys", "salience"} & set(spec.returns):
            layer = spec.attention_layer - 1
            block = jax.tree.map(lambda leaf: leaf[layer], nn.meta.unbox(self.variables["params"]["blocks"]))
            keys, salience = attention_evidence(block, layers[:, kept.index(layer)] if layer else embedded, spec)
            visual = visual._replace(keys=keys if "keys" in spec.returns else None, salience=salience)
        return visual

    def pool(self, visual: Visual) -> Float[Array, "B E"]:
        """The image as one vector."""
        return self.pooling(visual.tokens)


def attention_evidence(
    block: Params, x: Float[Array, "B S E"], spec: EncoderSpec
) -> tuple[Float[Array, "B P N C"], Float[Array, "B P"] | None]:
    """Keys of a block's attention, and the salience of the patches, from the block's input x and its parameters.

    Salience is the softmax of the class token's query over all S tokens; without a class token, the mean over all
    queries. `EncoderSpec.salience`: the mean over heads ("heads"), or one softmax with scores over the whole width,
    scaled by E ** -0.5 ("width").
    """
    normed = LayerNorm(spec.norm_eps, parent=None).apply({"params": block["attention_norm"]}, x)
    queries = normed[:, :1] if spec.class_token else normed
    names, sizes = (axes.VISION_HEADS, axes.HEAD_DIM), (spec.heads, spec.width // spec.heads)
    project = Linear(((spec.width, axes.VISION),), tuple(zip(sizes, names, strict=True)), bias=True, parent=None)
    attention, first = block["attention"], int(spec.class_token)
    keys = project.apply({"params": attention["key"]}, normed)
    if "salience" not in spec.returns:
        return keys[:, first:], None
    q = project.apply({"params": attention["query"]}, queries)
    scored = keys
    if spec.salience == "width":
        q, scored = (part.reshape(*part.shape[:2], 1, spec.width) for part in (q, keys))
    scores = jnp.einsum("btnc,bsnc->bnts", q, scored, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    return keys[:, first:], jax.nn.softmax(scores, axis=-1).mean(axis=(1, 2))[:, first:]


RESIZING = ("bicubic", "bilinear")


def at_size(spec: EncoderSpec, image_size: int | None) -> EncoderSpec:
    """The encoder for images of another size (None: unchanged). Raises `UserError` for less than one patch."""
    if image_size is None:
        return spec
    if image_size < spec.patch_size:
        raise UserError(f"image_size: expected at least {spec.name}'s patch size {spec.patch_size}, got {image_size}")
    edge = round(spec.shortest_edge * image_size / spec.image_size)
    return dataclasses.replace(spec, image_size=image_size, shortest_edge=edge)


def params_at_size(params: Any, spec: EncoderSpec, image_size: int, method: str) -> Any:
    """Parameters of `spec` for another image size: the position table is resized (`resize_positions`)."""
    old, grid = params["position"], at_size(spec, image_size).grid
    if grid == spec.grid:
        return params
    table = resize_positions(np.asarray(old, np.float32), spec.grid, grid, method).astype(old.dtype)
    return {**params, "position": jax.device_put(table, getattr(old, "sharding", None))}


def resize_positions(
    table: Float[np.ndarray, "N E"], grid: tuple[int, int], new_grid: tuple[int, int], method: str
) -> Float[np.ndarray, "M E"]:
    """A learned position table interpolated to another patch grid; the row of a class token is unchanged.

    method: "bicubic" as Hugging Face's `interpolate_pos_encoding` (cubic convolution with a = -3/4, Keys 1981; pixel
        centres, borders repeated), or "bilinear" as big_vision's `resample_posemb` (aligned corners).
    """
    if method not in RESIZING:
        raise unknown("method to resize positions", method, RESIZING)
    if grid == new_grid:
        return table
    before = len(table) - grid[0] * grid[1]
    weights = {"bicubic": bicubic, "bilinear": _corners}[method]
    rows, columns = (weights(old, new) for old, new in zip(grid, new_grid, strict=True))
    patches = np.einsum("ri,cj,ije->rce", rows, columns, table[before:].reshape(*grid, -1), optimize=True)
    return np.concatenate([table[:before], patches.reshape(-1, table.shape[1])]).astype(table.dtype)


def _corners(size: int, parts: int) -> Float[np.ndarray, "parts size"]:
    point = np.arange(parts) * (size - 1) / max(parts - 1, 1)
    return np.maximum(0.0, 1.0 - np.abs(point[:, None] - np.arange(size)))
