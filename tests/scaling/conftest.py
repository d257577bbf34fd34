"""One fit of the published scores for all tests that only read it."""

import pytest
from tables import PUBLISHED

from vlm_jax.scaling import fit, scores


@pytest.fixture(scope="session")
def law():
    return fit.fit(scores.read(PUBLISHED), bootstraps=60, seed=0)
