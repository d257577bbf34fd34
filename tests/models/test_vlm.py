"""The joined model: packed rows, views, dead tokens, the question vector, the encoder."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import builders
from vlm_jax.core.structs import Inputs, Views, Visual
from vlm_jax.models.vision import Encoder
from vlm_jax.models.vlm import Vlm
from vlm_jax.training import loss


def built(**kwargs):
    model = Vlm(builders.model(**kwargs), builders.COMPUTE)
    return model, jax.tree.map(jnp.asarray, builders.params(model))


def loss_sums(model: Vlm):
    return jax.jit(lambda params, inputs: loss.sums(model.forward(params, inputs)[0], model.head(params), inputs))


@pytest.mark.parametrize(
    ("compressor", "tokens", "views", "mask"),
    [
        ("blind", 0, 1, "causal"),
        ("resampler", 1, 1, "causal"),
        ("resampler", 4, 1, "prefix"),
        ("quecc", 4, 3, "causal"),
    ],
)
def test_packed_equals_alone(compressor: str, tokens: int, views: int, mask: str) -> None:
    """Conversations packed in a row give the hidden states and the loss that they give one at a time; segments may name
    the same view, or one each, which then follows its own question.
    """
    model, params = built(compressor=compressor, tokens=tokens, mask=mask)
    packed = builders.inputs(questions=3, visual_tokens=tokens, mask=mask, views=views)
    hidden = jax.jit(lambda inputs: model.forward(params, inputs)[0])
    together = hidden(packed)
    alone = builders.apart(packed)
    for segment, one in enumerate(alone, start=1):
        expected = hidden(one).reshape(-1, together.shape[-1])
        np.testing.assert_allclose(together[packed.segment == segment], expected, atol=2e-6)
    sums = loss_sums(model)
    parts = zip(*(jax.tree.leaves(sums(params, one)) for one in alone), strict=True)
    for whole, each in zip(jax.tree.leaves(sums(params, packed)), parts, strict=True):
        np.testing.assert_allclose(whole, sum(each), rtol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
def test_questions_may_share_the_image(window: int | None) -> None:
    """With the image's tokens once in front of all, every token of text has the state, and the loss the value and the
    gradient, that copies give.
    """
    model, params = built(window=window, window_pattern=2)
    packed = builders.inputs(questions=3)
    shared = builders.share_image(packed, 4)
    assert shared.tokens.shape[1] == packed.tokens.shape[1] - 2 * 4
    hidden = jax.jit(lambda inputs: model.forward(params, inputs)[0])
    ours, theirs = (hidden(row)[(row.visual < 0) & (row.segment > 0)] for row in (shared, packed))
    np.testing.assert_allclose(ours, theirs, atol=2e-6)
    nll = jax.jit(
        jax.value_and_grad(
            lambda params, inputs: loss.sums(model.forward(params, inputs)[0], model.head(params), inputs).nll
        )
    )
    for one, other in zip(jax.tree.leaves(nll(params, shared)), jax.tree.leaves(nll(params, packed)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_any_number_of_images_in_a_conversation() -> None:
    """Two images in one conversation: its states follow both, each image's tokens stand where its placeholders are."""
    model, params = built(compressor="pool")
    inputs = builders.inputs(questions=2, views=2)
    joined = inputs._replace(segment=np.minimum(inputs.segment, 1), position=np.arange(19)[None].repeat(4, 0))
    joined = joined._replace(order=joined.position)
    read = jax.jit(lambda inputs: model.forward(params, inputs)[0])
    hidden = lambda pixels: read(joined._replace(views=Views(pixels)))  # noqa: E731
    pixels = joined.views.pixels
    for view in (0, 1):
        other = pixels.copy()
        other[:, view] = 255 - other[:, view]
        differs = np.abs(hidden(other) - hidden(pixels)).max(axis=(0, 2)) > 0
        assert not differs[: 9 * view].any()
        assert differs[9 * view : 18].all()
    swapped = joined._replace(visual=np.where(joined.visual < 0, -1, (joined.visual + 4) % 8))
    expected = hidden(pixels[:, ::-1])
    np.testing.assert_allclose(read(swapped._replace(views=Views(pixels))), expected, atol=1e-6)


@pytest.mark.parametrize("shared", [False, True])
def test_dead_visual_tokens_move_nothing(shared: bool) -> None:
    """With masked patches, rows are as if the dead tokens had never stood in them: no logit follows what they hold, and
    positions count the living.
    """
    model, params = built(compressor="none", tokens=16)
    inputs = builders.inputs(questions=2, visual_tokens=16)
    inputs = builders.share_image(inputs, 16) if shared else inputs
    alive = np.random.default_rng(1).random((4, 1, 16)) < 0.6
    tokens = np.random.default_rng(2).standard_normal((4, 1, 16, 16)).astype(np.float32)

    read = jax.jit(lambda inputs: model.logits(params, model.forward(params, inputs)[0]))

    def logits(tokens: np.ndarray, inputs: Inputs, mask: np.ndarray | None) -> np.ndarray:
        views = Views(features=Visual(tokens, mask=mask))
        return np.asarray(read(inputs._replace(views=views)))

    found = logits(tokens, inputs, alive)
    changed = logits(np.where(alive[..., None], tokens, 9.0), inputs, alive)
    stands = (inputs.segment != 0) & ((inputs.visual < 0) | np.take_along_axis(alive[:, 0], inputs.visual % 16, axis=1))
    np.testing.assert_array_equal(found[stands], changed[stands])
    for row in range(4):
        kept = stands[row]
        alone = Inputs(*(part[row][kept][None] for part in inputs[:5]))
        counts = [(alone.segment == s).sum() for s in (-1, 1, 2)]
        position = np.concatenate([np.arange(n) + (k > 0) * counts[0] for k, n in enumerate(counts)])[None]
        expected = logits(tokens[row, None], alone._replace(position=position, order=position), None)
        np.testing.assert_allclose(found[row, kept], expected[0], atol=2e-5)


def test_fused_causal_attention_takes_packed_rows() -> None:
    """Asked for the fused kernel, states of real tokens are the same, with local layers too."""
    model, params = built(window=64, window_pattern=2, local_rope_theta=100.0)
    inputs = builders.inputs(questions=2)
    fused = Vlm(model.spec, dataclasses.replace(model.compute, attention="splash"))
    ours, theirs = (jax.jit(each.forward)(params, inputs)[0] for each in (fused, model))
    real = (inputs.segment > 0)[..., None]
    np.testing.assert_allclose(jnp.where(real, ours, 0), jnp.where(real, theirs, 0), atol=1e-5)


def test_no_conversation_sees_another() -> None:
    """States of segment 1 have exactly zero gradient with respect to the embeddings of segment 2."""
    model, params = built()
    inputs = builders.inputs(rows=2, questions=2)
    table = params["decoder"]["embedding"]
    text = (inputs.segment == 2) & (inputs.visual < 0)
    marked = inputs._replace(tokens=np.where(text, 31, np.minimum(inputs.tokens, 30)))

    def first_segment(row):
        frozen = {**params, "decoder": {**params["decoder"], "embedding": jnp.asarray(table).at[31].set(row)}}
        hidden, _ = model.forward(frozen, jax.tree.map(jnp.asarray, marked))
        return jnp.sum(jnp.where((marked.segment == 1)[..., None], hidden, 0))

    assert np.all(jax.jit(jax.grad(first_segment))(table[31]) == 0)


def test_features_stand_for_pixels() -> None:
    """The same states from stored features as from the live encoder."""
    model, params = built(compressor="tokenpacker")
    inputs = builders.inputs()
    forward = jax.jit(lambda inputs: model.forward(params, inputs)[0])
    features = jax.tree.map(lambda leaf: leaf[:, None], jax.jit(model.encode)(params, inputs.views.pixels[:, 0]))
    np.testing.assert_allclose(forward(inputs._replace(views=Views(features=features))), forward(inputs), atol=1e-6)


def test_question_vector() -> None:
    """It is the state of the question's last token alone, whatever the padding, and sends no gradient into the
    decoder.
    """
    model, params = built(compressor="quecc")
    question = np.array([[5, 6, 7], [9, -1, -1]])
    read = jax.jit(model.question_vector)
    vector = read(params, question)
    for row, length in enumerate((3, 1)):
        ids = question[row, None, :length]
        position = np.arange(length)[None]
        alone = Inputs(ids, np.ones_like(ids), position, position, np.full_like(ids, -1))
        np.testing.assert_allclose(vector[row], jax.jit(model.forward)(params, alone)[0][0, -1], atol=1e-6)
    grads = jax.jit(jax.grad(lambda p: model.question_vector(p, jnp.asarray(question)).sum()))(params)
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
