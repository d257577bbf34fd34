"""One set of weights for several V."""

import dataclasses
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import builders
from vlm_jax.compress import catalog, contract
from vlm_jax.config.arguments import load_config
from vlm_jax.config.resolve import model_group, resolve
from vlm_jax.core.errors import UserError
from vlm_jax.core.structs import Evidence, Inputs, Views, Visual
from vlm_jax.models import elastic
from vlm_jax.models.vlm import Vlm
from vlm_jax.sizing import cost, zoo

ELASTIC = (1, 4, 9)
KINDS = {name: row.elastic for name, row in catalog.ROWS.items() if row.elastic != "no"}
PREFIX = [name for name, kind in KINDS.items() if kind == "prefix"]


def elastic_model(name):
    possible = catalog.row(name).tokens_out(builders.ENCODER.grid)
    sizes = tuple(v for v in ELASTIC if v in possible) or possible[:3]
    model = builders.model(name, sizes[-1], depth=4)
    return dataclasses.replace(model, compressor=dataclasses.replace(model.compressor, elastic=sizes))


@pytest.mark.parametrize("name", KINDS)
def test_the_weights_of_every_v_have_the_same_shapes(name):
    model = elastic_model(name)
    catalog.check(model.compressor)
    shapes = lambda spec: jax.eval_shape(lambda key: catalog.row(name).init_weights(key, spec), jax.random.key(0))  # noqa: E731
    whole = shapes(model.compressor)
    for tokens in model.compressor.elastic:
        assert jax.tree.map(jnp.shape, shapes(catalog.at_tokens(model, tokens).compressor)) == jax.tree.map(
            jnp.shape, whole
        )


@pytest.mark.parametrize("name", PREFIX)
def test_tokens_of_a_smaller_v_come_first(name):
    model, rng = elastic_model(name), np.random.default_rng(0)
    row, spec = catalog.row(name), model.compressor
    shapes = jax.eval_shape(lambda key: row.init_weights(key, spec), jax.random.key(0))
    weights = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape, scale=0.3), jnp.float32), nn.meta.unbox(shapes)
    )
    evidence = Evidence(jnp.asarray(rng.normal(size=(2, 16, 16)), jnp.float32))
    apply = jax.jit(row.apply, static_argnums=2)
    whole = apply(weights, evidence, spec).tokens
    for tokens in spec.elastic:
        some = apply(weights, evidence, catalog.at_tokens(model, tokens).compressor).tokens
        np.testing.assert_allclose(some, whole[:, :tokens], atol=1e-5)


@pytest.mark.parametrize("name", [name for name in KINDS if not catalog.row(name).scores_tokens])
def test_rows_for_the_most_tokens_are_the_model_of_every_v(name):
    """Their places in front are padding; positions count the others. One program for every V of a prefix."""
    spec = elastic_model(name)
    model = Vlm(spec, builders.COMPUTE)
    params = jax.tree.map(jnp.asarray, builders.params(model))
    features = Visual(jnp.asarray(np.random.default_rng(1).normal(size=(2, 1, 16, 16)), jnp.float32))

    def row(tokens):
        return builders.inputs(rows=2, questions=1, visual_tokens=tokens)._replace(views=Views(features=features))

    static = {} if KINDS[name] == "prefix" else dict(static_argnums=1)
    programs = jax.jit(lambda inputs, tokens: elastic.forward(model, params, inputs, tokens), **static)
    most = spec.compressor.tokens
    whole = row(most)
    for tokens in spec.compressor.elastic:
        alone = Vlm(catalog.at_tokens(spec, tokens), builders.COMPUTE)
        own = row(tokens)
        text = np.asarray(whole.tokens)[whole.visual < 0].reshape(2, -1)
        own = own._replace(tokens=np.concatenate([own.tokens[:, :tokens], text], axis=1))
        expected = jax.jit(lambda inputs, alone=alone: alone.forward(params, inputs)[0])(own)
        found = programs(whole, tokens)
        # The last places of the image, and the text.
        np.testing.assert_allclose(found[:, most - tokens :], expected, atol=3e-5)
    assert programs._cache_size() == (1 if KINDS[name] == "prefix" else len(spec.compressor.elastic))


def test_the_last_places_of_a_view_hold_its_first_tokens():
    """Two views of three places, text between and behind; of a compressor that still gives three, or only two."""
    row = lambda *numbers: jnp.array([numbers], jnp.int32)  # noqa: E731
    position = row(0, 1, 2, 3, 4, 5, 6, 7)
    inputs = Inputs(
        row(9, 0, 0, 0, 8, 0, 0, 0), row(1, 1, 1, 1, 1, 1, 1, 1), position, position, row(-1, 0, 1, 2, -1, 3, 4, 5)
    )
    kept = elastic.first_tokens(inputs, 3, 2, 3)
    np.testing.assert_array_equal(kept.segment, row(1, 0, 1, 1, 1, 0, 1, 1))
    np.testing.assert_array_equal(kept.visual[kept.segment > 0], [-1, 0, 1, -1, 3, 4])
    np.testing.assert_array_equal(kept.position[kept.segment > 0], [0, 1, 2, 3, 4, 5])
    np.testing.assert_array_equal(kept.order[kept.segment > 0], [0, 1, 2, 3, 4, 5])
    fewer = elastic.first_tokens(inputs, 3, 2, 2)
    np.testing.assert_array_equal(fewer.visual[fewer.segment > 0], [-1, 0, 1, -1, 2, 3])


def test_a_model_of_several_v_has_the_cost_of_each():
    encoder, decoder = zoo.encoder("clip-l14-336"), zoo.decoder("qwen1.5-1.8b")
    model = catalog.model_spec(encoder, "mqt", (1, 4, 16, 64), decoder)
    assert (model.compressor.tokens, model.compressor.elastic) == (64, (1, 4, 16, 64))
    for tokens in model.compressor.elastic:
        alone = catalog.model_spec(encoder, "mqt", tokens, decoder)
        assert cost.flops(catalog.at_tokens(model, tokens), 50, 10) == cost.flops(alone, 50, 10)


@pytest.mark.parametrize(
    ("name", "tokens", "message"),
    [
        ("mqt", (4, 1, 16), r"elastic=\[4, 1, 16\]: expected ascending numbers, got \[4, 1, 16\] \(sort them\)"),
        ("mqt", (1, 4, 4), r"expected distinct numbers, got \[1, 4, 4\] \(name each once\)"),
        ("mqt", (0, 4), r"cannot give 0 tokens; nearest possible: 1, 2"),
        ("m3", (1, 5), "cannot give tokens=5 on a 24 x 24 patch grid; possible: 1, 2, 3, 4, 6, 8"),
        ("tokenpacker", (1, 4), r"serve one V \(elastic: resampler, m3, .*mqt"),
        ("mqt", (), "set tokens=V"),
    ],
)
def test_a_list_of_v_that_cannot_be_is_one_line(name, tokens, message):
    with pytest.raises(UserError, match=message) as caught:
        catalog.model_spec(zoo.encoder("clip-l14-336"), name, tokens, zoo.decoder("qwen1.5-1.8b"))
    assert "\n" not in str(caught.value)


def test_at_tokens_names_the_v_of_the_weights():
    with pytest.raises(UserError, match="expected one of them as tokens, got 2"):
        catalog.at_tokens(elastic_model("mqt"), 2)
    assert contract.most_tokens(elastic_model("mqt").compressor) == 9


def test_a_config_holds_what_only_some_methods_have():
    """`elastic`, `queries` and the encoder's `merge` resolve to the spec that they came from."""
    encoder, decoder = zoo.encoder("glyph-64"), zoo.decoder("d48")
    merging = dataclasses.replace(encoder, merge=(8, 8, 0, 4))
    for model in (
        catalog.model_spec(encoder, "mqt", (1, 4, 16), decoder, "linear"),
        catalog.model_spec(merging, "perceiver", 4, decoder, "linear"),
        catalog.model_spec(encoder, "llava_mini", 4, decoder, "linear"),
    ):
        config = load_config(str(Path(__file__).parents[2] / "configs" / "vlm.py"))
        config.model = model_group(model)
        assert resolve(config).model == model
