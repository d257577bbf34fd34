"""Token merging in the encoder: nothing merged is the plain encoder, equal patches merge without loss, and the cost."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import builders
from tests.models.test_drop_stages import products
from vlm_jax.compress import catalog
from vlm_jax.config.arguments import load_config
from vlm_jax.config.resolve import resolve
from vlm_jax.core.errors import UserError
from vlm_jax.inference import token_maps
from vlm_jax.inference.loading import Model
from vlm_jax.models.vision import Encoder
from vlm_jax.models.vlm import Vlm
from vlm_jax.sizing import cost, zoo

SPEC = dataclasses.replace(builders.ENCODER, taps=(), pooling_head=False)


def encoded(spec, image, params=None):
    encoder = Encoder(spec, builders.COMPUTE)
    if params is None:
        params = jax.tree.map(jnp.asarray, builders.params(Vlm(builders.model("none", 16), builders.COMPUTE)))[
            "encoder"
        ]
        params = {name: leaf for name, leaf in params.items() if name != "pooling"}
    return jax.jit(lambda params: encoder.apply({"params": params}, image, method="encode"))(params).tokens


def image(seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(2, 16, 16, 3)), jnp.float32)


def test_merging_nothing_is_the_plain_encoder() -> None:
    merged = dataclasses.replace(SPEC, merge=(0, 0, 0))
    np.testing.assert_allclose(encoded(merged, image()), encoded(SPEC, image()), atol=1e-5)


def test_tokens_fall_block_by_block_and_follow_the_image() -> None:
    merged = dataclasses.replace(SPEC, merge=(4, 0, 6))
    one, other = (encoded(merged, image(seed)) for seed in (0, 1))
    assert one.shape == (2, 6, 16)
    assert merged.token_grid == (1, 6)
    assert jnp.abs(one - other).max() > 1e-3


@pytest.mark.parametrize("merge", [(4, 0, 6), (8, 4, 2)])
def test_flops_are_those_of_the_program(merge) -> None:
    spec = dataclasses.replace(SPEC, merge=merge)
    encoder, pixels = Encoder(spec, builders.COMPUTE), jnp.zeros((1, 16, 16, 3))
    params = jax.eval_shape(lambda: encoder.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3))))
    counted = products(lambda params: encoder.apply(params, pixels, method="encode").tokens, params)
    assert counted == cost.encoder_flops(spec)


@pytest.mark.parametrize(
    ("compressor", "merge", "message"),
    [
        ("none", (8,) * 11, "expected a number for each of the 12 blocks, got 11"),
        ("none", (99,) + (0,) * 11, "block 1: expected 0 to 98, half of its tokens, got 99"),
        ("none", (90, 60) + (0,) * 10, "block 2: expected 0 to 53"),
        ("perceiver", (196,) + (0,) * 11, r"^model\.merge=.*: block 1: expected 0 to 98"),
        ("pool", (8,) * 12, "'pool' reads the patch grid, which merged tokens do not have"),
        ("vision_zip", (8,) * 12, "'vision_zip' reads class_token, keys, salience"),
    ],
)
def test_a_merge_that_cannot_be_is_one_line(compressor, merge, message) -> None:
    encoder = dataclasses.replace(zoo.encoder("siglip-b16-224"), merge=merge)
    with pytest.raises(UserError, match=message):
        catalog.model_spec(encoder, compressor, None if compressor == "none" else 4, zoo.decoder("qwen1.5-1.8b"))


def test_what_is_left_is_v() -> None:
    encoder = dataclasses.replace(zoo.encoder("siglip-b16-224"), merge=(8,) * 12)
    model = catalog.model_spec(encoder, "none", None, zoo.decoder("qwen1.5-1.8b"))
    assert model.compressor.tokens == 196 - 96


def test_it_is_a_field_of_any_config() -> None:
    values = {"model.merge": "(8,8,8,8)"}
    spec = resolve(load_config("configs/vlm.py:compressor=perceiver", values))
    assert spec.model.encoder.merge == (8, 8, 8, 8)
    assert spec.model.compressor.grid == (1, 32)


def test_merged_tokens_have_no_places_to_show() -> None:
    encoder = dataclasses.replace(zoo.encoder("siglip-b16-224"), merge=(8,) * 12)
    spec = catalog.model_spec(encoder, "none", None, zoo.decoder("qwen1.5-1.8b"))
    with pytest.raises(UserError, match="encoder merges tokens"):
        token_maps.shown(Model(spec, builders.COMPUTE, None, None))
