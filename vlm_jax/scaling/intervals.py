"""How sure a fit is: bootstraps, profile likelihood, and prediction of rows it has not seen.

Exponents and D get profile-likelihood intervals: all values whose best fit is not significantly worse by the F test
(doi:10.2307/2347496). They hold their level also where D sits on its bound, which percentiles of a bootstrap do not;
a test measures it. Everything else (coefficients, ratios, predictions) takes percentiles of a residual bootstrap,
whose residuals are widened by sqrt(n / (n - p)). The case bootstrap redraws whole cells, replicates together.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from vlm_jax.scaling import solve
from vlm_jax.scaling.solve import Floats, Problem, Solution

LEVEL = 0.95
_BOOTSTRAP_TOLERANCE = 1e-6


class Draws(NamedTuple):
    """Parameters [R] by name, one entry a bootstrap."""

    residual: dict[str, Floats]
    case: dict[str, Floats]


def bootstrap(of: Problem, fit: Solution, predicted: Floats, cell: Floats, draws: int, seed: int) -> Draws:
    """Residual and case bootstrap of a single problem. `predicted` [n] are its fitted errors, `cell` [n] numbers its
    cells."""
    rng = np.random.default_rng(seed)
    count = len(predicted)
    widen = np.sqrt(count / max(count - of.form.free_params, 1))
    if of.loss == "log":
        residual = np.log(of.error[0] / np.maximum(predicted, 1e-6))
        error = np.maximum(predicted, 1e-6) * np.exp(_drawn(residual * widen, draws, rng))
    else:
        error = np.maximum(predicted + _drawn((of.error[0] - predicted) * widen, draws, rng), 1e-6)
    names, index = np.unique(cell, return_inverse=True)
    chosen = rng.integers(0, len(names), (draws, len(names)))
    weight = np.stack([np.bincount(row, minlength=len(names)) for row in chosen])[:, index].astype(float)
    same = np.broadcast_to(of.floor, (draws,))
    problems = (
        of._replace(error=error, weight=np.ones_like(error), floor=same),
        of._replace(error=np.broadcast_to(of.error, weight.shape), weight=weight, floor=same),
    )
    return Draws(
        *(solve.named(each, solve.solve(each, seed, fit.theta, _BOOTSTRAP_TOLERANCE, 40)) for each in problems)
    )


def _drawn(residual: Floats, draws: int, rng: np.random.Generator) -> Floats:
    residual = residual - residual.mean()
    return residual[rng.integers(0, len(residual), (draws, len(residual)))]


def percentiles(values: Floats) -> tuple[float, float]:
    """The central interval."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def profile(of: Problem, fit: Solution, name: str, dof: int) -> Floats:
    """Profile-likelihood interval [R, 2] of "alpha", "beta" or "D" for every problem; an end at a bound of the search
    is that bound.

    `dof` are the residual degrees of freedom.
    """
    from scipy.special import fdtri

    count = len(fit.cost)
    both = np.tile(np.arange(count), 2)  # the way down and the way up are walked together
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
        other[:, 1 - axis] = found.theta[:, 1 - axis]  # the next value is near, so start there
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
    """Where the cost crosses the limit on the way from `value` to `bound`: steps that double, then bisection."""
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


def left_out(
    of: Problem, group: Floats, seed: int, hints: Floats | None = None
) -> tuple[Floats, list[dict[str, float]]]:
    """Predictions [n] of every row from a fit without its group, and the parameters of those fits, by group in
    ascending order."""
    groups = np.unique(group)
    weight = np.where(group[None] == groups[:, None], 0.0, of.weight)
    problems = of._replace(
        error=np.broadcast_to(of.error, weight.shape), weight=weight, floor=np.broadcast_to(of.floor, len(groups))
    )
    found = solve.solve(problems, seed, hints, _BOOTSTRAP_TOLERANCE)
    values = solve.named(problems, found)
    every = [{name: float(value[i]) for name, value in values.items()} for i in range(len(groups))]
    predicted = np.empty(len(group))
    for one, params in zip(groups, every, strict=True):
        rows = group == one
        predicted[rows] = of.form.function(np.exp(of.log_params[rows]), np.exp(of.log_tokens[rows]), **params)
    return predicted, every
