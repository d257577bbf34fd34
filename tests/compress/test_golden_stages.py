"""Compressors inside the language model against the official code: FastV, PyramidDrop, VoCo."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import builders
from tests.compress import official as ref
from vlm_jax.core.specs import DecoderSpec, DropStage
from vlm_jax.core.structs import AttentionMetadata
from vlm_jax.models import stages
from vlm_jax.models.decoder import Block, Decoder, attention_inputs
from vlm_jax.models.vlm import summary_segments
from vlm_jax.ops import masks

HEADS, START = 2, 4  # of all three models; the image is at 4, 5, ...


def decoder_spec(width, depth, mlp_width):
    return DecoderSpec("llama", width, depth, HEADS, HEADS, width // HEADS, mlp_width, 8)


def block(w, name):
    """A layer's parameters, as far as they are given."""
    kernel = lambda part: w[f"{name}{part}.weight"].T  # noqa: E731
    width = kernel("self_attn.q_proj").shape[0]
    attention = {
        part: {"kernel": kernel(f"self_attn.{part[0]}_proj").reshape(width, HEADS, -1)}
        for part in ("query", "key", "value")
    }
    out = {"attention_norm": {"scale": w[f"{name}input_layernorm.weight"]}, "attention": attention}
    if f"{name}mlp.up_proj.weight" not in w:
        return out
    attention["out"] = {"kernel": kernel("self_attn.o_proj").reshape(HEADS, -1, width)}
    mlp = {part: {"kernel": kernel(f"mlp.{part}_proj")} for part in ("gate", "up", "down")}
    return out | {"mlp": mlp, "mlp_norm": {"scale": w[f"{name}post_attention_layernorm.weight"]}}


def one_view(length, tokens, batch):
    """The visual index of rows with one image."""
    index = np.arange(length) - START
    return np.tile(np.where((index >= 0) & (index < tokens), index, -1), (batch, 1)).astype(np.int32)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_golden_fastv(scan_layers):
    arrays = ref.read("fastv")
    x, keep, w = arrays["x"], arrays["keep"], ref.under(arrays, "w.")
    length, tokens = x.shape[1], 2 * (x.shape[1] - len(keep))
    depth = sum(name.endswith("q_proj.weight") for name in w)
    spec = decoder_spec(x.shape[2], depth, len(w["layers.0.mlp.up_proj.weight"]))
    blocks = jax.tree.map(jnp.asarray, [block(w, f"layers.{i}.") for i in range(depth)])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
    layers = {"blocks": stacked} if scan_layers else {f"blocks_{i}": one for i, one in enumerate(blocks)}
    embedding = jnp.zeros((spec.vocab, spec.width))  # not read
    params = {"embedding": embedding, "norm": {"scale": jnp.asarray(w["norm.weight"])}, **layers}
    cut = DropStage(2, tokens // 2, "attention", 1)
    metadata, visual = builders.causal(np.ones((1, length))), jnp.asarray(one_view(length, tokens, 1))

    @jax.jit
    def run(x, params):
        places = stages.visual_places(visual, metadata, None, 1, tokens)
        decoder = Decoder(spec, builders.compute(scan_layers=scan_layers), (cut,))
        hidden, _ = decoder.apply({"params": params}, x, metadata, None, places, method="hidden")
        inputs = attention_inputs(spec, metadata, metadata, jnp.int32(0))
        before, _ = Block(spec, "xla").apply({"params": blocks[0]}, x, inputs)
        return hidden, stages.attention_scores(blocks[1], spec, before, metadata, places, False)

    hidden, scores = run(jnp.asarray(x), params)
    ref.close(scores[0, 0], arrays["row"])
    np.testing.assert_array_equal(np.flatnonzero(np.abs(hidden[0]).sum(-1)), keep)
    ref.close(hidden[:, keep], arrays["out"])


@pytest.mark.parametrize("kind", ["train", "test"])
def test_golden_pyramid_drop(kind):
    arrays = ref.read("pyramiddrop")
    x, real, labels = arrays["x"], arrays["real"], arrays["labels"]
    expected = arrays[f"{kind}_out"]
    batch, length, width = x.shape
    tokens = 2 * (length - expected.shape[1])
    spec, parameters = decoder_spec(width, 1, 1), jax.tree.map(jnp.asarray, block(ref.under(arrays, "w."), ""))
    stage = DropStage(1, tokens // 2, "attention", 1, "recounted")
    metadata, visual = builders.causal(real), jnp.asarray(one_view(length, tokens, batch))
    weight = np.pad(labels[:, 1:] != -100, ((0, 0), (0, 1))).astype(np.float32)

    @jax.jit
    def run(x):
        places = stages.visual_places(visual, metadata, jnp.asarray(weight), 1, tokens)
        if kind == "test":
            last = arrays["prompt_len"] + tokens - 1
            places = places._replace(reads=jnp.arange(length) == last[:, None])
        scores = stages.attention_scores(parameters, spec, x, metadata, places, False)
        kept = stages.staying(stage, metadata, places, scores)
        return kept, *stages.gather(stage, kept, x, metadata, places)[:2]

    kept, out, place = run(jnp.asarray(x))
    mask = arrays[f"{kind}_mask"]
    np.testing.assert_array_equal(place.segment > 0, mask)
    np.testing.assert_array_equal(np.where(mask, place.position, 0), np.where(mask, arrays[f"{kind}_position"], 0))
    np.testing.assert_array_equal(np.take_along_axis(labels, np.asarray(kept), 1), arrays[f"{kind}_labels"])
    ref.close(np.where(mask[..., None], out, 0), np.where(mask[..., None], expected, 0))


def test_golden_voco():
    arrays = ref.read("voco")
    for kind, sees in zip(arrays["kind"], arrays["sees"], strict=True):
        visual = np.where(kind > 1, np.cumsum(kind > 1) - 1, -1)[None]
        own = tuple(masks.HIDDEN if one == 2 else masks.SHARED for one in kind[kind > 1])
        metadata = builders.causal(np.ones((1, len(kind))))
        if own:
            segment = summary_segments(metadata, jnp.asarray(visual, jnp.int32), own)
            metadata = AttentionMetadata(segment, metadata.position, metadata.order)
        np.testing.assert_array_equal(masks.attention_mask(metadata, metadata)[0, 0], sees)
