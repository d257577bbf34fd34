"""What stands beside the study's cells: longer training of three corners, and elastic models (DESIGN.md)."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vlm_jax.core.rows import ResultRow
from vlm_jax.scaling import fit, plots
from vlm_jax.scaling.fitted import BASIC

Lines = list[list[str]]


class CellError(NamedTuple):
    """The error of a cell over its seeds."""

    error: float
    seed_variance: float
    image_variance: float
    seeds: int


def mean(rows: Sequence[ResultRow]) -> CellError:
    """Of the rows of one cell."""
    errors = [row.error for row in rows]
    spread = float(np.var(errors, ddof=1)) if len(errors) > 1 else 0.0
    return CellError(float(np.mean(errors)), spread, float(np.mean([row.stderr**2 for row in rows])), len(errors))


def _cell(rows: Sequence[ResultRow], family: str, llm: str, tokens: int) -> list[ResultRow]:
    return [row for row in rows if (row.family, row.llm, row.visual_tokens) == (family, llm, tokens)]


def convergence(rows: Sequence[ResultRow], longer: Sequence[ResultRow]) -> Lines:
    """Header and lines: the error of each corner after its steps and after those of `longer`, and whether they differ
    by less than one standard error of the difference. Its variance is that of seeds, pooled over the corners of a
    family, and that of images, which all seeds share; both sides share them too, so that it is an upper bound.
    """
    lines = [["family", "LLM", "V", "error", "after 1.5 times the steps", "difference", "converged"]]
    for family in _families(longer):
        corners = list(dict.fromkeys((row.llm, row.visual_tokens) for row in longer if row.family == family))
        pairs = [[mean(_cell(some, family, *corner)) for some in (rows, longer)] for corner in corners]
        pooled = float(np.mean([one.seed_variance for one in itertools.chain(*pairs)]))
        for (llm, tokens), (short, long) in zip(corners, pairs, strict=True):
            stderr = math.sqrt(sum(pooled / one.seeds + one.image_variance for one in (short, long)))
            gap = long.error - short.error
            lines.append([
                family, llm, str(tokens), f"{short.error:.3f}", f"{long.error:.3f}", f"{gap:+.3f} ± {stderr:.3f}",
                "yes" if abs(gap) < stderr else "no",
            ])  # fmt: skip
    return lines


def corner_contrast(rows: Sequence[ResultRow], longer: Sequence[ResultRow]) -> Lines:
    """Header and lines: the slopes of the logarithm of the error between corners, at both numbers of steps."""
    lines = [["family", "steps", "alpha at V = 1", "beta of the largest LLM", "difference"]]
    for family in _families(longer):
        mine = [row for row in longer if row.family == family]
        sizes = {row.llm: row.llm_params for row in mine}
        small, large = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
        most = max(row.visual_tokens for row in mine)
        for some in (rows, longer):
            corners = (small, 1), (large, 1), (large, most)
            cells = [_cell(some, family, *corner) for corner in corners]
            first, second, third = (math.log(mean(cell).error) for cell in cells)
            alpha = (first - second) / math.log(sizes[large] / sizes[small])
            beta = (second - third) / math.log(most)
            steps = f"{cells[0][0].train_steps:,}"
            lines.append([family, steps, f"{alpha:.2f}", f"{beta:.2f}", f"{alpha - beta:+.2f}"])
    return lines


def elastic(rows: Sequence[ResultRow], elastic_rows: Sequence[ResultRow]) -> Lines:
    """Header and lines: the error at each V of the elastic model and, after a slash, of the separate ones."""
    tokens = sorted({row.visual_tokens for row in elastic_rows})
    lines = [["family", "N", *(f"V = {v}" for v in tokens)]]
    for family in _families(elastic_rows):
        for llm, params in sorted({(row.llm, row.llm_params) for row in elastic_rows}, key=lambda pair: pair[1]):
            cells = [[_cell(some, family, llm, v) for some in (elastic_rows, rows)] for v in tokens]
            errors = [" / ".join(f"{mean(cell).error:.3f}" for cell in pair) for pair in cells]
            lines.append([family, plots.params_label(params / 1e9), *errors])
    return lines


def elastic_cost(rows: Sequence[ResultRow], elastic_rows: Sequence[ResultRow]) -> Lines:
    """Header and lines: minutes and FLOPs of one elastic model a size and of the separate ones of one seed, and the
    exponents of both. Every row of an elastic model has the cost of its whole training."""
    lines = [["family", "", "training, min", "training, TFLOPs", "alpha", "beta", "alpha - beta"]]
    for family in _families(elastic_rows):
        seed = min(row.seed for row in elastic_rows)
        separate = [row for row in rows if row.family == family and row.visual_tokens and row.seed == seed]
        shared = [row for row in elastic_rows if row.family == family]
        models = {row.llm: row for row in shared}.values()
        for name, mine, trained in (("elastic", shared, models), ("separate", separate, separate)):
            found = fit.fit(mine, BASIC).family(family)
            params, gap = found.forms[BASIC].params, found.difference
            lines.append([
                family, name, f"{sum(row.train_secs for row in trained) / 60:.1f}",
                f"{sum(row.train_flops for row in trained) / 1e12:.1f}",
                f"{params['alpha']:.2f}", f"{params['beta']:.2f}",
                f"{gap['value']:.2f} [{gap['low']:.2f}, {gap['high']:.2f}]",
            ])  # fmt: skip
    return lines


def _families(rows: Sequence[ResultRow]) -> list[str]:
    return list(dict.fromkeys(row.family for row in rows))
