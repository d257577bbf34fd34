"""Means and their standard errors where questions come in clusters. numpy only.

Questions about one image are not independent, so the standard error is that of a ratio of sums over images
(Cochran, Sampling Techniques, eq. 2.39):

    r = sum_i e_i / sum_i n_i,    se(r)^2 = m/(m-1) * sum_i (e_i - r n_i)^2 / (sum_i n_i)^2

The score of a benchmark is the mean of such ratios over its strata (MME's subtasks, POPE's subsets). Its standard error
adds the deviations (e_i - r n_i) / sum_i n_i of all strata before squaring, as an image may occur in several.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np


class Share(NamedTuple):
    """What one unit (a question, a pair, a group of rotations) adds to a ratio."""

    value: float  # e
    count: float = 1.0  # n
    cluster: Hashable = ""  # its image
    stratum: Hashable = ""


def ratio(errors: np.ndarray, counts: np.ndarray, cluster: np.ndarray) -> tuple[float, float]:
    """(ratio of sums, its standard error over clusters), without rows of a negative cluster."""
    kept = cluster >= 0
    _, index = np.unique(cluster[kept], return_inverse=True)
    e = np.bincount(index, errors[kept].astype(np.float64))
    n = np.bincount(index, counts[kept].astype(np.float64))
    value, m = e.sum() / n.sum(), len(e)
    if m < 2:
        return float(value), float("nan")
    return float(value), float(np.sqrt(m / (m - 1) * np.sum((e - value * n) ** 2)) / n.sum())


def mean_of_ratios(parts: Sequence[Share]) -> tuple[float, float]:
    """(mean over strata of the ratio of sums, its standard error over clusters); nan with fewer than two clusters."""
    values, counts = (np.array(column, np.float64) for column in zip(*(part[:2] for part in parts), strict=True))
    clusters, strata = (_index([part[i] for part in parts]) for i in (2, 3))
    e, n = (np.bincount(strata, column) for column in (values, counts))
    safe = np.where(n > 0, n, 1.0)  # a stratum without counts is 0, as F1 without a positive
    ratios = e / safe
    deviations = (values - ratios[strata] * counts) / safe[strata] / len(e)
    by_cluster = np.bincount(clusters, deviations)
    m = len(by_cluster)
    stderr = float(np.sqrt(m / (m - 1) * np.sum(by_cluster**2))) if m > 1 else float("nan")
    return float(ratios.mean()), stderr


def _index(names: Sequence[Hashable]) -> np.ndarray:
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int64)
