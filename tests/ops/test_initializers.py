"""Initialisers: variance by fan-in, boxes with names, always float32."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.core.axes import EMBED, HEAD_DIM, NORM, POSITION, VISION, VISION_HEADS, VOCAB
from vlm_jax.ops import initializers


@pytest.mark.parametrize(
    ("shape", "names", "inputs", "fan_in"),
    [
        ((300, 200), (EMBED, VISION), 1, 300),
        ((300, 10, 20), (VISION, VISION_HEADS, HEAD_DIM), 1, 300),
        ((10, 20, 300), (VISION_HEADS, HEAD_DIM, VISION), 2, 200),
    ],
)
def test_dense_keeps_the_variance_of_unit_inputs(shape, names, inputs, fan_in):
    box = initializers.dense(jax.random.key(0), shape, names, inputs)
    assert box.names == names
    assert box.value.dtype == jnp.float32
    sample_error = 3 / np.sqrt(box.value.size)
    np.testing.assert_allclose(box.value.std() * np.sqrt(fan_in), 1.0, rtol=sample_error)
    np.testing.assert_allclose(box.value.mean() * np.sqrt(fan_in), 0.0, atol=sample_error)


def test_table_zeros_and_ones():
    box = initializers.table(jax.random.key(0), (200, 300), (VOCAB, EMBED), stddev=0.5)
    np.testing.assert_allclose(box.value.std(), 0.5, rtol=0.02)
    assert (initializers.zeros((3, 2), (POSITION, VISION)).value == 0).all()
    assert (initializers.ones((3,), (NORM,)).value == 1).all()


@pytest.mark.parametrize("names", [(VISION,), (VISION, VISION), (VISION, "visoin"), (VISION, EMBED, NORM)])
def test_names_that_do_not_fit_are_refused(names):
    with pytest.raises(ValueError, match="axis names"):
        initializers.zeros((3, 4), names)


def test_a_tree_of_boxes_is_a_linen_parameter():
    class Holder(nn.Module):
        @nn.compact
        def __call__(self) -> jax.Array:
            tree = self.param("part", lambda key: {"kernel": initializers.dense(key, (3, 4), (EMBED, VISION))})
            return tree["kernel"].sum()

    variables = Holder().init(jax.random.key(0))
    specs = nn.get_partition_spec(variables)["params"]["part"]["kernel"]
    assert tuple(specs) == (EMBED, VISION)
    assert jnp.isfinite(Holder().apply(variables))
