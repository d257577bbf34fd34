"""Initial values have the spread of those of the official code."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest

from vlm_jax.compress import catalog
from vlm_jax.core.specs import CompressorSpec

WIDTH = 128
SPEC = CompressorSpec("quecc", 4, (8, 8), WIDTH, 2, 96, WIDTH, 8, 1, 0)
OWN = {  # fields that a method needs
    "perceiver": {"mlp_width": 4 * WIDTH},
    "qformer": {"mlp_width": 4 * WIDTH},
    "qformer_question": {"mlp_width": 4 * WIDTH},
    "mqt": {"queries": 16},
    "token_learner": {"width": 64},
}


def drawn(name):
    spec = dataclasses.replace(SPEC, name=name, **OWN.get(name, {}))
    return jax.tree.map(np.asarray, nn.meta.unbox(catalog.row(name).init_weights(jax.random.key(0), spec)))


def uniform(bound):
    return bound / 3**0.5


@pytest.mark.parametrize(
    ("name", "path", "spread"),
    [
        ("tokenpacker", "query/kernel", 0.02),
        ("tokenpacker", "keys/up/kernel", 0.02),
        ("tokenpacker", "keys/up/bias", 0),
        ("tokenpacker", "attention/query/kernel", uniform((6 / (4 * WIDTH)) ** 0.5)),
        ("tokenpacker", "attention/out/kernel", 0.02),
        ("quecc", "text/kernel", uniform(96**-0.5)),
        ("quecc", "text/bias", uniform(96**-0.5)),
        ("quecc", "keys/up/kernel", uniform((2 * WIDTH) ** -0.5)),
        ("quecc", "values/down/bias", uniform(WIDTH**-0.5)),
        ("quecc", "down/kernel", uniform(1 / 4)),
        ("quecc", "attention/value/kernel", uniform((6 / (4 * WIDTH)) ** 0.5)),
        ("quecc", "attention/value/bias", 0),
        ("quecc", "attention/out/kernel", uniform(WIDTH**-0.5)),
        ("quecc", "attention/out/bias", 0),
        ("quecc", "keys_norm/bias", 0),
        ("ldpv2", "conv/kernel", uniform(1 / 3)),
        ("ldpv2", "conv/bias", uniform(1 / 3)),
        ("c_abstractor", "positions", 0.02),
        ("c_abstractor", "fine/block0/first/linear/kernel", 0.02),
        ("c_abstractor", "coarse/block0/conv/kernel", 0.02),
        ("c_abstractor", "fine/block0/squeeze/bias", 0),
        ("perceiver", "latents", 1),
        ("perceiver", "layer0/attention/key/kernel", uniform(WIDTH**-0.5)),
        ("perceiver", "layer0/attention/out/kernel", uniform(WIDTH**-0.5)),
        ("perceiver", "layer0/mlp/down/kernel", uniform((4 * WIDTH) ** -0.5)),
        ("qformer", "queries", 0.02),
        ("qformer", "layer0/cross/value/kernel", 0.02),
        ("qformer", "layer0/mlp/up/kernel", 0.02),
        ("qformer", "layer0/attention/out/bias", 0),
        ("qformer_question", "layer0/text_mlp/up/kernel", 0.02),
        ("qformer_question", "text/kernel", 0.02),
        ("mqt", "queries", 0.02),
        ("mqt", "attention/query/kernel", uniform((6 / (4 * WIDTH)) ** 0.5)),
        ("mqt", "attention/out/kernel", 0.02),
        ("token_learner", "mlp/up/kernel", uniform((6 / (WIDTH + 64)) ** 0.5)),
        ("token_learner", "mlp/down/kernel", uniform((6 / (64 + 4)) ** 0.5)),
        ("token_learner", "mlp/down/bias", 0),
    ],
)
def test_spread(name, path, spread):
    leaf = drawn(name)
    for part in path.split("/"):
        leaf = leaf[part]
    assert abs(leaf.mean()) <= 5 * spread / leaf.size**0.5
    np.testing.assert_allclose(leaf.std(), spread, rtol=0.25 if leaf.size < 1000 else 0.04)
