"""Rows weighted by their inverse variance: estimates, intervals, and what rows must have."""

import numpy as np
import pytest

from vlm_jax.core.errors import UserError
from vlm_jax.scaling import fit, scores

SIZES, TOKENS = (0.5, 1.0, 2.0, 4.0), (1, 4, 16, 64)


def cells(stderr, noise):
    """Errors .5 N^-.1 V^-.05 with given noise."""
    found = []
    for i, (n, v) in enumerate((n, v) for n in SIZES for v in TOKENS):
        error = 0.5 * n**-0.1 * v**-0.05 + noise[i]
        found.append(scores.Measurement("qa", n, v, error, stderr[i], i, f"row {i}", {}))
    return scores.Scores(tuple(found), "nominal")


def basic(rows, **options):
    return fit.fit(rows, "multiplicative-fixed", bootstraps=200, **options).families["qa"].forms["multiplicative-fixed"]


def test_equal_errors_give_the_unweighted_fit() -> None:
    noise = np.random.default_rng(0).normal(0, 0.003, 16)
    rows = cells(np.full(16, 0.02), noise)
    plain, weighted = basic(rows), basic(rows, weights="stderr")
    for name, value in plain.params.items():
        assert weighted.params[name] == pytest.approx(value, rel=1e-9)
    assert weighted.interval["alpha"] == pytest.approx(plain.interval["alpha"], rel=1e-6)


def test_a_row_of_no_weight_moves_nothing() -> None:
    """A wrong row with a huge standard error: the estimate is that of the exact rows."""
    noise, stderr = np.zeros(16), np.full(16, 1e-3)
    noise[5], stderr[5] = 0.3, 0.9
    found = basic(cells(stderr, noise), weights="stderr")
    assert found.params["alpha"] == pytest.approx(0.1, abs=1e-3)
    assert found.params["beta"] == pytest.approx(0.05, abs=1e-3)
    assert abs(basic(cells(stderr, noise)).params["alpha"] - 0.1) > 0.01


def test_weights_need_standard_errors() -> None:
    rows = cells(np.full(16, 0.02), np.zeros(16))
    first = rows.cells[0]._replace(stderr=None)
    with pytest.raises(UserError, match=r"^row 0: expected a standard error above 0"):
        fit.fit(rows._replace(cells=(first, *rows.cells[1:])), bootstraps=20, weights="stderr")
    with pytest.raises(UserError, match="did you mean 'stderr'"):
        fit.fit(rows, bootstraps=20, weights="stder")


def test_the_law_records_its_weights() -> None:
    rows = cells(np.full(16, 0.02), np.random.default_rng(1).normal(0, 0.003, 16))
    assert fit.fit(rows, "semilog", bootstraps=20, weights="stderr").weights == "stderr"
