"""Whether a fitted form misses its rows by more than their noise.

    d = error - prediction, or log error - log prediction with the log loss; w the row's weight
    sum w d^2  =  pure (around the means of cells)  +  lack (of the cells' means around the law)

With replicates (rows of one cell with several seeds) the noise is theirs, and

    F = (lack / (cells - parameters)) / (pure / (rows - cells))             doi:10.1002/9781118625590, chapter 2

Without, it is that of each row's standard error s over evaluated images: chi^2 = sum (d / s)^2 of the same form fitted
again with weights 1 / s^2. Training noise is no part of s, so that a small p then means the law or the seeds. All cells
are evaluated on the same images, whose common part shifts all errors alike and makes the test milder. With fewer than
five degrees of freedom among replicates s^2 is the larger of both. Rows with neither cannot be tested.
"""

import numpy as np

from vlm_jax.scaling import intervals, solve
from vlm_jax.scaling.fitted import LackOfFit
from vlm_jax.scaling.laws import Floats

_FEW = 5  # degrees of freedom


def test(of: solve.Problem, found: solve.Solution, cell: Floats, stderr: Floats, seed: int) -> LackOfFit:
    """The test of one fit to rows of standard error `stderr` [n], nan where unknown. Rows of one index `cell` [n] are
    replicates."""
    from scipy.special import chdtrc, fdtrc

    cells, index = np.unique(cell, return_inverse=True)
    weight, miss = of.weight[0], _miss(of, found)
    total = np.bincount(index, weight)
    mean = np.bincount(index, weight * miss) / total
    pure, pure_dof = float(np.sum(weight * (miss - mean[index]) ** 2)), len(miss) - len(cells)
    if pure <= 1e-20 * float(np.sum(weight * of.error[0] ** 2)):
        pure_dof = 0  # copies of rows say nothing about noise
    dof = len(cells) - of.form.free_params
    known = bool((stderr > 0).all())
    by_seeds = pure_dof >= _FEW or (pure_dof > 0 and not known)
    if dof < 1 or not (pure_dof or known):
        return LackOfFit("seeds" if by_seeds else "images" if known else "nothing")
    variance = pure / pure_dof if pure_dof else 0.0
    lack = float(np.sum(total * mean**2))
    if by_seeds:
        return LackOfFit(
            "seeds", float(fdtrc(dof, pure_dof, lack / dof / variance)), _beyond(lack, dof, variance, total)
        )
    scale = stderr / of.error[0] if of.loss == "log" else stderr
    squared = np.maximum(scale**2, variance / weight)
    again = of._replace(weight=np.broadcast_to(squared.mean() / squared, of.error.shape))
    miss = _miss(again, solve.solve(again, seed, found.theta))
    inverse = np.bincount(index, 1 / squared)
    mean = np.bincount(index, miss / squared) / inverse
    lack = float(np.sum(inverse * mean**2))
    return LackOfFit("images", float(chdtrc(dof, lack)), _beyond(lack, dof, 1.0, inverse))


def _miss(of: solve.Problem, found: solve.Solution) -> Floats:
    predicted = solve.predicted(of, found)[0]
    if of.loss == "log":
        return np.log(of.error[0]) - np.log(np.maximum(predicted, 1e-6))
    return of.error[0] - predicted


def _beyond(lack: float, dof: int, variance: float, total: Floats) -> float:
    """Standard deviation of cells around the law that noise does not explain, by the method of moments."""
    return float(np.sqrt(max(lack - dof * variance, 0.0) / total.sum()))


def covered(of: solve.Problem, groups: Floats, seed: int, draws: int) -> tuple[int, int, bool] | None:
    """How many cells of the last group lie in the 95 % prediction interval of a fit without it, of how many, and
    whether chance gives so few (5 %). None if too few rows are left.

    The interval of a cell's mean has the bootstrap interval of the law and the scatter of the other rows around it,
    added in squares. groups: [n], such as the N of the rows.
    """
    from scipy.special import bdtr, stdtrit

    last = groups == groups.max()
    others, held = of.rows(~last), of.rows(last)
    dof = int((~last).sum()) - of.form.free_params
    if dof < 1:
        return None
    found = solve.solve(others, seed)
    predicted = solve.predicted(others, found)[0]
    drawn = intervals.residual_draws(others, found, predicted, draws, np.random.default_rng(seed))
    scatter = np.sum(others.weight[0] * _miss(others, found) ** 2) / dof * stdtrit(dof, intervals.ENDS[1]) ** 2
    cells, index = np.unique(np.stack([held.log_params, held.log_tokens]), axis=1, return_inverse=True)
    total = np.bincount(index, held.weight[0])
    params, tokens = np.exp(cells)
    scale = (lambda x: np.log(np.maximum(x, 1e-6))) if of.loss == "log" else np.asarray
    mean = np.bincount(index, held.weight[0] * scale(held.error[0])) / total
    at = {name: value[:, None] for name, value in drawn.items()}
    low, high = np.quantile(scale(of.form.function(params, tokens, **at)), intervals.ENDS, axis=0)
    best = {name: value[0] for name, value in solve.named(others, found).items()}
    middle = scale(of.form.function(params, tokens, **best))
    reach = np.where(mean < middle, middle - low, high - middle)
    inside = np.abs(mean - middle) <= np.sqrt(reach**2 + scatter / total) + 1e-6 * np.abs(middle)
    count = int(inside.sum())
    return count, len(inside), bool(bdtr(count, len(inside), intervals.LEVEL) > 1 - intervals.LEVEL)
