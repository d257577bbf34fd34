"""What the encoder returns for compressors: keys, salience and class token, against a transcription in numpy."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import builders
from vlm_jax.models.vision import Encoder


@pytest.mark.parametrize("layer", [1, 3])
@pytest.mark.parametrize("salience", ["heads", "width"])
@pytest.mark.parametrize("class_token", [True, False])
def test_keys_and_salience_of_a_block(class_token: bool, salience: str, layer: int) -> None:
    spec = dataclasses.replace(
        builders.ENCODER, class_token=class_token, feature_layer=2, taps=(1, 2), pooling_head=False,
        returns=("keys", "salience", "class_token"), attention_layer=layer, salience=salience,
    )  # fmt: skip
    encoder, rng = Encoder(spec, builders.COMPUTE), np.random.default_rng(0)
    image = jnp.asarray(rng.normal(size=(2, 16, 16, 3)), jnp.float32)
    shapes = nn.meta.unbox(jax.eval_shape(encoder.init, jax.random.key(0), image))
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape, scale=0.3), jnp.float32), shapes)

    def tokens(feature_layer: int) -> np.ndarray:
        """All tokens behind a block, the class token first."""
        bare = dataclasses.replace(spec, feature_layer=feature_layer, taps=())
        visual = jax.jit(lambda params: Encoder(bare, builders.COMPUTE).apply(params, image, method="encode"))(params)
        first = [] if visual.class_token is None else [visual.class_token[:, None]]
        return np.concatenate([*first, visual.tokens], axis=1)

    visual = jax.jit(lambda params: encoder.apply(params, image, method="encode"))(params)
    assert len(params["params"]["blocks"]["mlp"]["up"]["bias"]) == max(layer, 2)
    whole = tokens(2)
    np.testing.assert_allclose(visual.tokens, whole[:, class_token:], atol=1e-5)
    if class_token:
        np.testing.assert_allclose(visual.class_token, whole[:, 0], atol=1e-5)
    else:
        assert visual.class_token is None
    if layer == 1:
        return  # its input is the embedding, which no encoder returns
    block = jax.tree.map(lambda leaf: np.asarray(leaf[layer - 1]), params["params"]["blocks"])
    x = tokens(layer - 1)
    norm, attention = block["attention_norm"], block["attention"]
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + spec.norm_eps)
    y = y * norm["scale"] + norm["bias"]
    q, k = (
        np.einsum("bse,enc->bnsc", y, attention[name]["kernel"]) + attention[name]["bias"][None, :, None]
        for name in ("query", "key")
    )
    np.testing.assert_allclose(visual.keys, k.transpose(0, 2, 1, 3)[:, class_token:], atol=1e-5)
    scores = np.einsum("bntc,bnsc->bnts", q, k)
    if salience == "width":
        scores = scores.sum(1, keepdims=True) / spec.width**0.5
    else:
        scores = scores / (spec.width // spec.heads) ** 0.5
    share = np.exp(scores - scores.max(-1, keepdims=True))
    share = (share / share.sum(-1, keepdims=True)).mean(1)
    expected = share[:, 0, 1:] if class_token else share.mean(1)
    np.testing.assert_allclose(visual.salience, expected, atol=1e-6)
