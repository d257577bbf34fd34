"""Uncertainty of a fit: bootstraps, profile likelihood and held-out predictions.

Exponents and D get profile-likelihood intervals: all values whose best fit is not significantly worse by the F test
(doi:10.2307/2347496). Unlike bootstrap percentiles they keep their level when D is on its bound; a test measures it.
Coefficients, ratios and predictions take percentiles of a residual bootstrap whose residuals are scaled by
sqrt(n / (n - p)). The case bootstrap resamples whole cells with their replicates.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from vlm_jax.scaling import solve
from vlm_jax.scaling.solve import Floats, Problem, Solution

LEVEL = 0.95
ENDS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)  # of a central interval, as shares
_BOOTSTRAP_TOLERANCE = 1e-6


class Draws(NamedTuple):
    """Parameters [R] by name, one entry per bootstrap."""

    residual: dict[str, Floats]
    case: dict[str, Floats]


def bootstrap(of: Problem, fit: Solution, predicted: Floats, cell: Floats, draws: int, seed: int) -> Draws:
    """Residual and case bootstrap of one problem with fitted errors `predicted` [n] and cell indices `cell` [n]."""
    rng = np.random.default_rng(seed)
    residual = residual_draws(of, fit, predicted, draws, rng)
    names, index = np.unique(cell, return_inverse=True)
    chosen = rng.integers(0, len(names), (draws, len(names)))
    weight = np.stack([np.bincount(row, minlength=len(names)) for row in chosen])[:, index].astype(float)
    return Draws(residual, _refitted(of, fit, np.broadcast_to(of.error, weight.shape), weight * of.weight))


def residual_draws(
    of: Problem, fit: Solution, predicted: Floats, draws: int, rng: np.random.Generator
) -> dict[str, Floats]:
    """Parameters [draws] by name of a residual bootstrap of one problem with fitted errors `predicted` [n]."""
    count = len(predicted)
    precision = np.sqrt(of.weight[0])  # residuals times this have one variance
    widen = precision * np.sqrt(count / max(count - of.form.free_params, 1))
    if of.loss == "log":
        residual = np.log(of.error[0] / np.maximum(predicted, 1e-6))
        error = np.maximum(predicted, 1e-6) * np.exp(_drawn(residual * widen, draws, rng) / precision)
    else:
        error = np.maximum(predicted + _drawn((of.error[0] - predicted) * widen, draws, rng) / precision, 1e-6)
    return _refitted(of, fit, error, np.broadcast_to(of.weight, error.shape))


def _refitted(of: Problem, fit: Solution, error: Floats, weight: Floats) -> dict[str, Floats]:
    """Parameters by name of fits to errors and weights [R, n], from the fit of the one problem."""
    each = of._replace(error=error, weight=weight, floor=np.broadcast_to(of.floor, len(error)))
    return solve.named(each, solve.solve(each, 0, fit.theta, _BOOTSTRAP_TOLERANCE, 40))


def _drawn(residual: Floats, draws: int, rng: np.random.Generator) -> Floats:
    residual = residual - residual.mean()
    return residual[rng.integers(0, len(residual), (draws, len(residual)))]


def percentiles(values: Floats) -> tuple[float, float]:
    """The central 95 % interval."""
    low, high = np.quantile(values, ENDS)
    return float(low), float(high)


def profile(of: Problem, fit: Solution, name: str, dof: int) -> Floats:
    """Profile-likelihood interval [R, 2] of "alpha", "beta" or "D" for every problem, cut at the bounds of the search.

    `dof` are the residual degrees of freedom.
    """
    from scipy.special import fdtri

    count = len(fit.cost)
    both = np.tile(np.arange(count), 2)  # lower and upper end in one batch
    of, fit = of.take(both), Solution(*(part[both] for part in fit))
    limit = fit.cost * (1 + fdtri(1, dof, LEVEL) / dof) + 1e-300
    if name == "D":
        value, at = solve.named(of, fit)["D"], _cost_at_floor(of, fit)
        lowest, highest = (0.0 if of.form.floor == "nonnegative" else solve.FREE_FLOOR), of.error.min(axis=1)
    else:
        axis = ("alpha", "beta").index(name)
        value, at = fit.theta[:, axis], _cost_at_exponent(of, fit, axis)
        lowest, highest = solve.LOWEST, np.full(2 * count, solve.HIGHEST)
    bound = np.where(np.arange(2 * count) < count, lowest, highest)
    return _edge(at, value, bound, limit).reshape(2, count).T


def _cost_at_exponent(of: Problem, fit: Solution, axis: int) -> Callable[[Floats], Floats]:
    other = fit.theta.copy()

    def cost(value: Floats) -> Floats:
        theta = other.copy()
        theta[:, axis] = value
        found = solve.descend(of, theta, (axis != 0, axis != 1), 1e-9)
        other[:, 1 - axis] = found.theta[:, 1 - axis]  # start of the next search
        return found.cost

    return cost


def _cost_at_floor(of: Problem, fit: Solution) -> Callable[[Floats], Floats]:
    from vlm_jax.scaling import laws

    held = laws.form(of.form.name.removesuffix("-free") + "-fixed")
    theta = fit.theta.copy()

    def cost(value: Floats) -> Floats:
        found = solve.descend(of._replace(form=held, floor=value), theta, tolerance=1e-9)
        theta[:] = found.theta
        return found.cost

    return cost


def _edge(cost: Callable[[Floats], Floats], value: Floats, bound: Floats, limit: Floats, halvings: int = 14) -> Floats:
    """Where the cost crosses the limit between `value` and `bound`, by doubling steps and bisection."""
    inside, step = value.copy(), np.sign(bound - value) * (0.1 * np.abs(value) + 1e-3)
    outside, found = bound.copy(), np.zeros(len(value), bool)
    for _ in range(40):
        tried = np.where(found, inside, value + step)
        tried = np.where(np.abs(tried - value) > np.abs(bound - value), bound, tried)
        beyond = (cost(tried) > limit) & ~found
        outside = np.where(beyond, tried, outside)
        inside = np.where(found | beyond, inside, tried)
        found |= beyond | (inside == bound)
        if found.all():
            break
        step *= 2
    for _ in range(halvings):
        middle = (inside + outside) / 2
        within = cost(middle) <= limit
        inside, outside = np.where(within, middle, inside), np.where(within, outside, middle)
    return np.where(inside == bound, bound, (inside + outside) / 2)


class LeftOut(NamedTuple):
    """Fits without one group of rows each, by ascending group."""

    predicted: Floats  # [n] of every row by the fit without its group
    params: list[dict[str, float]]  # of each fit


def left_out(of: Problem, groupings: Sequence[Floats], hints: Sequence[Floats | None], seed: int) -> list[LeftOut]:
    """The held-out predictions of one problem for each grouping [n] of its rows, all fits in one batch. `hints` [S, 2]
    are the starts of a grouping's fits; None: they are searched for."""
    names = [np.unique(group) for group in groupings]
    kept = np.concatenate(
        [group[None] != values[:, None] for group, values in zip(groupings, names, strict=True)]
    )  # [R, n]
    weight = np.where(kept, of.weight, 0.0)
    problems = of._replace(
        error=np.broadcast_to(of.error, weight.shape), weight=weight, floor=np.broadcast_to(of.floor, len(weight))
    )
    ends = np.cumsum([len(values) for values in names])
    parts = [np.arange(end - len(values), end) for end, values in zip(ends, names, strict=True)]
    if of.form.floor == "none":
        found = solve.solve(problems, seed)
    else:
        starts = [
            solve.global_starts(problems.take(part), seed) if hint is None else np.tile(hint, (len(part), 1, 1))
            for part, hint in zip(parts, hints, strict=True)
        ]
        index = np.concatenate([np.repeat(part, each.shape[1]) for part, each in zip(parts, starts, strict=True)])
        flat = np.concatenate([each.reshape(-1, 2) for each in starts])
        found = solve.solve_from(problems, index, flat, _BOOTSTRAP_TOLERANCE)
    values = solve.named(problems, found)
    predicted = solve.predicted(problems, found)
    return [
        LeftOut(
            predicted[part[np.searchsorted(ofs, group)], np.arange(len(group))],
            [{name: float(value[i]) for name, value in values.items()} for i in part],
        )
        for part, ofs, group in zip(parts, names, groupings, strict=True)
    ]
