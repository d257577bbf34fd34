"""Small specs and batches that several tests build from."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.core.specs import CompressorSpec, ComputeSpec, DecoderSpec, EncoderSpec, ModelSpec
from vlm_jax.core.structs import AttentionMetadata, Batch
from vlm_jax.models.vlm import Vlm

COMPUTE = ComputeSpec("float32", "none", "xla", 1, "replicated", (1, 1, 1))
ENCODER = EncoderSpec("test", image_size=16, patch_size=4, width=16, depth=3, heads=2, mlp_width=24, taps=(1, 3))
DECODER = DecoderSpec("test", width=16, depth=2, heads=4, kv_heads=2, head_dim=8, mlp_width=24, vocab=32)


def compute(**fields: object) -> ComputeSpec:
    return dataclasses.replace(COMPUTE, **fields)


def model(compressor: str = "resampler", tokens: int = 4, mask: str = "causal", **decoder: object) -> ModelSpec:
    """A model of a few thousand parameters."""
    dec = dataclasses.replace(DECODER, **decoder)
    spec = CompressorSpec(compressor, tokens, ENCODER.grid, ENCODER.width, len(ENCODER.taps), dec.width, 16, 2, 1, 24)
    return ModelSpec(ENCODER, spec, "linear", dec, mask)


def batch(rows: int = 4, questions: int = 2, seed: int = 0) -> Batch:
    """Random packed questions of two tokens with answers of three, then one slot of padding; pixels as the image."""
    rng = np.random.default_rng(seed)
    length = 5
    text = rng.integers(2, 32, (rows, questions * length)).astype(np.int32)
    position = np.tile(np.arange(length, dtype=np.int32), (rows, questions))
    segment = np.repeat(np.tile(np.arange(1, questions + 1, dtype=np.int32), (rows, 1)), length, axis=1)
    pad = ((0, 0), (0, 1))
    text, position, segment = (np.pad(x, pad) for x in (text, position, segment))
    real = segment > 0
    last = position == length - 1
    weight = (real & (position >= 1) & ~last).astype(np.float32)
    return Batch(
        text=text,
        target=np.where(real & ~last, np.roll(text, -1, axis=1), 0).astype(np.int32),
        weight=weight,
        segment=segment,
        position=position,
        question=real & (position < 2),
        example=np.arange(rows, dtype=np.int32),
        image=rng.integers(0, 256, (rows, 16, 16, 3)).astype(np.uint8),
    )


def causal(segment: Any) -> AttentionMetadata:
    """Where the tokens of rows of these segments stand, all of them causal; padding (0) may stand anywhere."""
    segment = np.array(segment, np.int32)
    position = np.zeros_like(segment)
    for (b, i), number in np.ndenumerate(segment):
        position[b, i] = (segment[b, :i] == number).sum() if number else 0
    return AttentionMetadata(*map(jnp.asarray, (segment, position, position)))


def boxed_shapes(vlm: Vlm) -> dict[str, Any]:
    """Shapes and axis names of encoder, connector and decoder."""
    return jax.eval_shape(lambda key: {**vlm.init(key), "encoder": vlm.init_encoder(key)}, jax.random.key(0))


def params(vlm: Vlm, seed: int = 0) -> dict[str, Any]:
    """Random parameters of all three parts, from their shapes: compiling the initialisers would take seconds."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return (centre + 0.25 * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, nn.meta.unbox(boxed_shapes(vlm)))
