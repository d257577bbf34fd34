"""One fit of the published scores for all tests that only read it."""

import pytest
from tables import PUBLISHED

from vlm_jax.scaling import fit, table


@pytest.fixture(scope="session")
def law():
    return fit.fit(table.read(PUBLISHED), bootstraps=60, seed=0)
