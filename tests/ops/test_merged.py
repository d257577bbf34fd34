"""Attention by key head against the transcription of its formula with loops, in float64."""

import jax
import numpy as np
import pytest

from vlm_jax.ops import merged


@pytest.mark.parametrize(("scale", "softcap"), [(None, None), (0.3, 2.0)])
@pytest.mark.parametrize("length", [1, 5])
def test_against_loops(length: int, scale: float | None, softcap: float | None) -> None:
    """Six query heads over two key heads; one row sees nothing and reads zeros."""
    rng = np.random.default_rng(length)
    q, k, v = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((2, length, 6, 4), (2, 2, 7, 4), (2, 2, 7, 4))
    )
    mask = rng.random((2, 1, length, 7)) < 0.6
    mask[0, 0, 0] = False
    wanted = np.zeros(q.shape)
    for b, t, n in np.ndindex(2, length, 6):
        scores = k[b, n // 3].astype(float) @ q[b, t, n] * (4**-0.5 if scale is None else scale)
        scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
        weights = np.where(mask[b, 0, t], np.exp(scores), 0)
        if weights.any():
            wanted[b, t, n] = weights @ v[b, n // 3] / weights.sum()
    found = jax.jit(lambda *args: merged.attend(*args, scale, softcap))(q, k, v, mask)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
