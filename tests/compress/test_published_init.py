"""Initial values of TokenPacker and QueCC have the spread of the official code's."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest

from vlm_jax.compress import catalog
from vlm_jax.core.specs import CompressorSpec

WIDTH = 128
SPEC = CompressorSpec("quecc", 4, (8, 8), WIDTH, 2, 96, WIDTH, 8, 1, 0)


def drawn(name):
    spec = dataclasses.replace(SPEC, name=name)
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
    ],
)
def test_spread(name, path, spread):
    leaf = drawn(name)
    for part in path.split("/"):
        leaf = leaf[part]
    assert abs(leaf.mean()) <= 5 * spread / leaf.size**0.5
    np.testing.assert_allclose(leaf.std(), spread, rtol=0.25 if leaf.size < 1000 else 0.04)
