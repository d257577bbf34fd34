"""What stands beside the study's cells, on rows of an exact law."""

import dataclasses

import pytest

from experiments.size_by_tokens import beside
from tests.result_rows import row as result_row

SIZES = {"d8": 1000, "d64": 64000}
ALPHA, BETA = 0.3, 0.1


def rows(factor=1.0, spread=0.0, **fields):
    """Three seeds of every cell, whose errors differ by `spread`; their mean is `factor` times the law."""
    return [
        result_row(
            family="ocr", llm=llm, llm_params=n, visual_tokens=v, seed=seed, stderr=0.0,
            error=factor * 4 * n**-ALPHA * v**-BETA + (seed - 1) * spread, **fields,
        )
        for llm, n in SIZES.items() for v in (1, 2, 16) for seed in (0, 1, 2)
    ]  # fmt: skip


CORNERS = (("d64", 16), ("d64", 1), ("d8", 1))


def corners(*args, **fields):
    return [row for row in rows(*args, **fields) if (row.llm, row.visual_tokens) in CORNERS]


@pytest.mark.parametrize(("gap", "converged"), [(0.009, "no"), (0.007, "yes")])
def test_a_corner_converges_within_one_standard_error_of_the_difference(gap, converged):
    """Of two means of three seeds with variance s^2 each: s sqrt(2 / 3), here .0082."""
    longer = [dataclasses.replace(row, error=row.error - gap) for row in corners(spread=0.01)]
    lines = beside.convergence(rows(spread=0.01), longer)[1:]
    assert {line[-1] for line in lines} == {converged}
    assert {line[-2] for line in lines} == {f"-{gap:.3f} ± 0.008"}


def test_corners_of_a_power_law_give_its_exponents_at_any_level():
    *_, short, long = beside.corner_contrast(rows(), corners(factor=0.5, train_steps=3000))
    assert short[2:] == long[2:] == [f"{ALPHA:.2f}", f"{BETA:.2f}", f"{ALPHA - BETA:+.2f}"]
    assert long[1] == "3,000"


def test_an_elastic_training_is_counted_once():
    """It writes a row for each V, each with the cost of the whole training."""
    separate = rows(train_secs=60.0, train_flops=1e12)
    together = [row for row in rows(train_secs=120.0, train_flops=2e12) if row.seed == 0]
    costs = {line[1]: line[2:4] for line in beside.elastic_cost(separate, together)[1:]}
    assert costs == {"elastic": ["4.0", "4.0"], "separate": ["6.0", "6.0"]}
