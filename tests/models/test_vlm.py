"""The joined model: packing, the image prefix, the question vector, the encoder."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import builders
from vlm_jax.core.structs import Batch
from vlm_jax.models.vision import Encoder
from vlm_jax.models.vlm import Vlm
from vlm_jax.training import loss


def built(**kwargs):
    model = Vlm(builders.model(**kwargs), builders.COMPUTE)
    init = jax.jit(lambda key: nn.meta.unbox({**model.init(key), "encoder": model.init_encoder(key)}))
    return model, init(jax.random.key(0))


def on_device(batch: Batch) -> Batch:
    return jax.tree.map(jnp.asarray, batch)


def single_questions(batch: Batch) -> list[Batch]:
    """The packed batch, taken apart: one batch for each segment number."""
    out = []
    for segment in range(1, batch.segment.max() + 1):
        mine = batch.segment == segment
        length = mine[0].sum()
        arrays = {
            f: getattr(batch, f)[mine].reshape(-1, length) for f in ("text", "target", "weight", "position", "question")
        }
        out.append(Batch(**arrays, segment=np.ones_like(arrays["text"]), example=batch.example, image=batch.image))
    return out


@pytest.mark.parametrize("tokens", [0, 1, 4])
def test_packing_changes_nothing(tokens: int) -> None:
    """Questions packed behind one image give the sums that they give one at a time."""
    model, params = built(compressor="resampler" if tokens else "blind", tokens=tokens)
    batch = builders.batch(questions=3)
    sums = jax.jit(lambda b: loss.sums(model.states(params, b), model.head(params), b))
    packed = sums(on_device(batch))
    apart = [sums(b) for b in map(on_device, single_questions(batch))]
    for whole, parts in zip(packed, zip(*apart, strict=True), strict=True):
        np.testing.assert_allclose(whole, sum(parts), rtol=1e-5)


def test_splash_sees_what_the_mask_shows() -> None:
    """One question a row: asked for the fused kernel, states of real tokens are the same, with local layers too."""
    model, params = built(window=64, window_pattern=2, local_rope_theta=100.0)
    batch = on_device(builders.batch(questions=1))
    fused = Vlm(model.spec, dataclasses.replace(model.compute, attention="splash"))
    ours, theirs = (jax.jit(each.states)(params, batch) for each in (fused, model))
    real = (batch.segment > 0)[..., None]
    np.testing.assert_allclose(jnp.where(real, ours, 0), jnp.where(real, theirs, 0), atol=1e-5)


def test_no_question_sees_another() -> None:
    """Logits of segment 1 have exactly zero gradient with respect to the embeddings of segment 2, and back."""
    model, params = built()
    batch = on_device(builders.batch(rows=2, questions=2))
    prefix = model.visual_prefix(params, batch)
    table = params["decoder"]["embedding"]
    marked = batch._replace(text=jnp.where(batch.segment == 2, 31, jnp.minimum(batch.text, 30)))

    def first_segment(row):
        frozen = {**params, "decoder": {**params["decoder"], "embedding": table.at[31].set(row)}}
        hidden, _ = model.hidden(frozen, prefix, marked)
        return jnp.sum(jnp.where((marked.segment == 1)[..., None], hidden, 0))

    assert np.all(jax.jit(jax.grad(first_segment))(table[31]) == 0)


def test_blind_does_not_look() -> None:
    model, params = built(compressor="blind", tokens=0)
    batch = on_device(builders.batch())
    other = batch._replace(image=255 - batch.image)
    forward = jax.jit(model.forward)
    np.testing.assert_array_equal(forward(params, batch), forward(params, other))


def test_features_stand_for_pixels() -> None:
    """The same logits from stored features as from the live encoder."""
    model, params = built(compressor="tokenpacker")
    batch = on_device(builders.batch())
    forward = jax.jit(model.forward)
    stored = batch._replace(image=None, features=jax.jit(model.encode)(params, batch.image))
    np.testing.assert_allclose(forward(params, stored), forward(params, batch), atol=1e-6)


def test_question_vector() -> None:
    """It follows the question and nothing behind it, and sends no gradient into the decoder."""
    model, params = built(compressor="quecc")
    batch = on_device(builders.batch(questions=1))
    read = jax.jit(model.question_vector)
    vector = read(params, batch)
    answer_changed = batch._replace(text=jnp.where(batch.question, batch.text, 7))
    np.testing.assert_array_equal(read(params, answer_changed), vector)
    question_changed = batch._replace(text=jnp.where(batch.question, 7, batch.text))
    assert np.abs(read(params, question_changed) - vector).max() > 0
    grads = jax.jit(jax.grad(lambda p: model.question_vector(p, batch).sum()))(params)
    assert all(np.all(g == 0) for g in jax.tree.leaves(grads))


def test_encoder_against_numpy() -> None:
    """Tokens and taps against a transcription in float64 with explicit loops over patches and heads."""
    spec = builders.ENCODER
    module = Encoder(spec, builders.COMPUTE)
    image = np.random.default_rng(0).uniform(-1, 1, (1, 16, 16, 3)).astype(np.float32)
    params = nn.meta.unbox(jax.jit(module.init)(jax.random.key(0), jnp.asarray(image)))["params"]
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape), params)
    visual = jax.jit(lambda p, x: module.apply({"params": p}, x, method="encode"))(params, jnp.asarray(image))
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, w):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + spec.norm_eps) * w["scale"] + w["bias"]

    patches = [image[0, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4].ravel() for r in range(4) for c in range(4)]
    x = np.stack(patches) @ p["patch"]["kernel"] + p["patch"]["bias"] + p["position"]
    outputs = []
    for i in range(spec.depth):
        b = jax.tree.map(lambda leaf, i=i: leaf[i], p["blocks"])
        y, att = norm(x, b["attention_norm"]), b["attention"]
        mixed = att["out"]["bias"].copy()
        for h in range(spec.heads):
            q, k, v = (y @ att[n]["kernel"][:, h] + att[n]["bias"][h] for n in ("query", "key", "value"))
            s = q @ k.T / np.sqrt(q.shape[1])
            w = np.exp(s - s.max(-1, keepdims=True))
            mixed = mixed + (w / w.sum(-1, keepdims=True)) @ v @ att["out"]["kernel"][h]
        x = x + mixed
        y = norm(x, b["mlp_norm"]) @ b["mlp"]["up"]["kernel"] + b["mlp"]["up"]["bias"]
        y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        x = x + y @ b["mlp"]["down"]["kernel"] + b["mlp"]["down"]["bias"]
        outputs.append(x)
    np.testing.assert_allclose(visual.tokens[0], norm(x, p["norm"]), atol=2e-5)
    np.testing.assert_allclose(visual.taps[0], [outputs[0], outputs[2]], atol=2e-5)


def test_clip_class_token_is_left_out() -> None:
    spec = dataclasses.replace(builders.ENCODER, class_token=True, pre_norm=True, patch_bias=False, pooling_head=False)
    module = Encoder(spec, builders.COMPUTE)
    image = jnp.zeros((2, 16, 16, 3))
    visual = jax.eval_shape(lambda: module.apply(module.init(jax.random.key(0), image), image, method="encode"))
    assert visual.tokens.shape == (2, 16, 16)
    assert visual.taps.shape == (2, 2, 16, 16)
