"""Products of one row, and those left alone, against numpy's in float64."""

import jax
import numpy as np
import pytest

from vlm_jax.ops import one_row

SHAPES = {
    "in groups": ((1, 1, 1056), (1056, 1025), 1),
    "two axes of inputs and of outputs": ((1, 1, 66, 16), (66, 16, 53, 21), 2),
    "no divisor": ((1, 1, 1031), (1031, 1024), 1),
    "small": ((1, 1, 128), (128, 8), 1),
    "several rows": ((3, 2, 1056), (1056, 1025), 1),
    "no rows": ((0, 4, 128), (128, 8), 1),
}


@pytest.mark.parametrize("name", SHAPES)
def test_against_numpy(name: str) -> None:
    left, right, count = SHAPES[name]
    rng = np.random.default_rng(0)
    x, kernel = (rng.standard_normal(shape).astype(np.float32) for shape in (left, right))
    found = jax.jit(one_row.contract, static_argnums=2)(x, kernel, count)
    wanted = np.tensordot(x.astype(float), kernel.astype(float), count)
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.sqrt(np.prod(right[:count])))


def test_only_a_cpu_gets_groups() -> None:
    """Elsewhere the product is one dot."""
    x, kernel = np.ones((1, 1024), np.float32), np.ones((1024, 1024), np.float32)
    program = jax.jit(one_row.contract, static_argnums=2)
    counts = {
        platform: program.trace(x, kernel, 1).lower(lowering_platforms=(platform,)).as_text().count("stablehlo.reduce")
        for platform in ("cpu", "tpu")
    }
    assert counts["cpu"] > 0
    assert counts["tpu"] == 0
