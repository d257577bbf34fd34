"""Loss sums against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from tests import builders
from vlm_jax.training import loss


def test_sums_against_numpy() -> None:
    """Token by token; large logits do not overflow, and tokens without weight do not count."""
    batch = builders.batch(rows=3)
    logits = 30 * np.random.default_rng(1).standard_normal((*batch.text.shape, 32)).astype(np.float32)
    nll = hits = count = 0.0
    for row in range(3):
        for place in range(batch.text.shape[1]):
            if batch.weight[row, place]:
                scores = logits[row, place].astype(np.float64)
                nll += np.log(np.sum(np.exp(scores - scores.max()))) + scores.max() - scores[batch.target[row, place]]
                hits += scores.argmax() == batch.target[row, place]
                count += 1
    sums = jax.jit(loss.sums)(logits, batch)
    np.testing.assert_allclose(sums, (nll, hits, count), rtol=1e-6)
    assert count == 3 * 2 * 3


def test_sums_of_16_bit_logits_are_taken_in_32() -> None:
    batch = jax.tree.map(jnp.asarray, builders.batch(rows=3))
    logits = jax.random.normal(jax.random.key(0), (*batch.text.shape, 32)).astype(jnp.bfloat16)
    sums = jax.jit(loss.sums)
    np.testing.assert_array_equal(sums(logits, batch), sums(logits.astype(jnp.float32), batch))
