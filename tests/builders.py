"""Small specs and batches that several tests build from."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.compress import catalog, contract
from vlm_jax.core.specs import ComputeSpec, DecoderSpec, EncoderSpec, ModelSpec
from vlm_jax.core.structs import AttentionMetadata, Inputs, Views
from vlm_jax.models.vlm import Vlm

COMPUTE = ComputeSpec("float32", "none", "xla", 1, "replicated", (1, 1, 1))
ENCODER = EncoderSpec("test", image_size=16, patch_size=4, width=16, depth=3, heads=2, mlp_width=24, taps=(1, 3))
DECODER = DecoderSpec("test", width=16, depth=2, heads=4, kv_heads=2, head_dim=8, mlp_width=24, vocab=32)


def compute(**fields: object) -> ComputeSpec:
    return dataclasses.replace(COMPUTE, **fields)


def model(compressor: str = "resampler", tokens: int = 4, mask: str = "causal", **decoder: object) -> ModelSpec:
    """A model of a few thousand parameters."""
    dec = dataclasses.replace(DECODER, **decoder)
    method = catalog.row(compressor)
    encoder = dataclasses.replace(contract.encoder_for(method, ENCODER), taps=ENCODER.taps)
    sizes = {"taps": len(ENCODER.taps), "width": 16, "heads": 2, "depth": 1, "mlp_width": 24}
    spec = dataclasses.replace(method.defaults(encoder, dec, tokens), key_width=contract.key_width(encoder), **sizes)
    return ModelSpec(encoder, spec, "linear", dec, mask)


def nearest_tokens(compressor: str, tokens: int) -> int:
    """The V of the method nearest to this one, on the grid of `ENCODER`."""
    return min(catalog.row(compressor).tokens_out(ENCODER.grid), key=lambda v: abs(v - tokens))


def inputs(
    rows: int = 4, questions: int = 2, visual_tokens: int = 4, seed: int = 0, mask: str = "causal", views: int = 1
) -> Inputs:
    """Random rows, as the drawing in `core.structs.Inputs`: each question has the image's tokens, two tokens of text
    and an answer of three; then one position of padding. With as many `views` as questions each reads one of its own.
    """
    rng = np.random.default_rng(seed)
    length = visual_tokens + 5
    tokens = rng.integers(2, 32, (rows, questions * length))
    position = np.tile(np.arange(length), (rows, questions))
    segment = np.repeat(np.tile(np.arange(1, questions + 1), (rows, 1)), length, axis=1)
    is_visual = position < visual_tokens
    view = (segment - 1) * (views > 1)
    order = np.where((mask == "prefix") & (position < visual_tokens + 2), 0, position)
    visual = np.where(is_visual, position + visual_tokens * view, -1)
    weight = (position >= visual_tokens + 1) & (position < length - 1)
    pad = ((0, 0), (0, 1))
    arrays = [np.pad(x, pad).astype(np.int32) for x in (np.where(is_visual, 0, tokens), segment, position, order)]
    asked = tokens.reshape(rows, questions, length)[:, :views, visual_tokens : visual_tokens + 2]
    return Inputs(
        *arrays,
        visual=np.pad(visual, pad, constant_values=-1).astype(np.int32),
        views=Views(
            rng.integers(0, 256, (rows, views, 16, 16, 3)).astype(np.uint8),
            question=np.pad(asked, ((0, 0), (0, 0), (0, 1)), constant_values=-1).astype(np.int32),
        ),
        weight=np.pad(weight, pad).astype(np.float32),
    )


def apart(packed: Inputs) -> list[Inputs]:
    """Packed rows, taken apart: rows of one conversation each for each segment number."""
    out = []
    for segment in range(1, packed.segment.max() + 1):
        mine = packed.segment == segment
        length = mine[0].sum()
        fields = {
            name: getattr(packed, name)[mine].reshape(-1, length)
            for name in ("tokens", "position", "order", "visual", "weight")
        }
        out.append(Inputs(**fields, segment=np.ones_like(fields["tokens"]), views=packed.views))
    return out


def share_image(packed: Inputs, visual_tokens: int) -> Inputs:
    """The same rows with the image's tokens once, in front of all questions."""
    first = (packed.segment == 1) & (packed.visual >= 0)
    kept = first | (packed.visual < 0)
    fields = [part[kept].reshape(len(kept), -1) for part in (*packed[:5], packed.weight)]
    fields[1] = np.where(fields[4] >= 0, -1, fields[1])
    return Inputs(*fields[:5], packed.views, fields[5])


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
