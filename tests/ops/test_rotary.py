"""Rotary angles against formulas written out in float64."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.core.specs import RopeBands
from vlm_jax.ops import rotary


def test_angles_are_positions_times_frequencies() -> None:
    position = np.array([[0, 1, 5, 1000]])
    found = rotary.angles(jnp.asarray(position), 6, 100.0, 4.0)
    wanted = position[..., None] / 4 * np.array([1, 100 ** (-1 / 3), 100 ** (-2 / 3)])
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_llama_3_stretches_long_wavelengths_and_leaves_short_ones(head_dim: int) -> None:
    """The three cases of arXiv 2407.21783's code, one frequency at a time: keep, divide, and a line between them."""
    found = np.asarray(rotary.angles(jnp.ones((1, 1), int), head_dim, 5e5, 8.0, RopeBands(1.0, 4.0, 8192)))[0, 0]
    cases = set()
    for c, frequency in enumerate(5e5 ** (-np.arange(0, head_dim, 2) / head_dim)):
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            case, wanted = "kept", frequency
        elif wavelength > 8192 / 1:
            case, wanted = "stretched", frequency / 8
        else:
            share = (8192 / wavelength - 1) / (4 - 1)
            case, wanted = "between", (1 - share) * frequency / 8 + share * frequency
        cases.add(case)
        assert found[c] == pytest.approx(wanted, rel=2e-5)
    assert cases == {"kept", "stretched", "between"}


@pytest.mark.parametrize(
    ("head_dim", "theta", "bands", "ends"),
    [
        (128, 1e6, RopeBands(1.0, 32.0, 32768, "whole channels"), (23, 40)),  # Qwen2.5's
        (128, 1e6, RopeBands(1.0, 32.0, 32768, "channels"), (23.59595, 39.65088)),
        (16, 1e2, RopeBands(0.2, 32.0, 10_000, "whole channels"), (6, 15)),  # the second would be 16
        (16, 1e2, RopeBands(1.0, 64.0, 128, "whole channels"), (0, 6)),  # the first would be -2
    ],
)
def test_yarn_stretches_slow_channels_and_leaves_fast_ones(head_dim, theta, bands, ends) -> None:
    """Section 3.2 of arXiv 2309.00071, as its authors' code has it; `ends` are the channels
    C ln(L / (2 pi r)) / (2 ln theta) that turn r = high and r = low times in the L original positions, by hand.
    """
    found = np.asarray(rotary.angles(jnp.ones((1, 1), int), head_dim, theta, 4.0, bands))[0, 0]
    for c in range(head_dim // 2):
        frequency = theta ** (-2 * c / head_dim)
        stretched = min(max((c - ends[0]) / (ends[1] - ends[0]), 0), 1)
        assert found[c] == pytest.approx(frequency * (1 - stretched) + frequency / 4 * stretched, rel=5e-5)


def test_rotation_keeps_lengths_and_depends_on_differences() -> None:
    """q turned to i times k turned to j is a function of i - j alone."""
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 1, 8)), jnp.float32) for _ in "qk")

    def score(i: int, j: int) -> float:
        turned = [rotary.rotate(x, rotary.angles(jnp.array([[at]]), 8, 100.0)) for x, at in ((q, i), (k, j))]
        assert np.linalg.norm(turned[0]) == pytest.approx(np.linalg.norm(q), rel=1e-5)
        return float((turned[0] * turned[1]).sum())

    assert score(7, 3) == pytest.approx(score(24, 20), abs=1e-4)
    assert score(0, 0) == pytest.approx(float((q * k).sum()), abs=1e-4)
