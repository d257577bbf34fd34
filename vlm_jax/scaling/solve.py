"""Batched fits of one form by variable projection (doi:10.1137/0710036).

For given exponents the best coefficients follow from non-negative least squares, so only (alpha, beta) is searched:
Levenberg-Marquardt on the projected residuals, from grid and random starts. All arrays have a leading axis of problems,
so a thousand bootstraps are one call. The same input gives the same bytes.

Losses: "squared" error, or "log": Huber's loss (doi:10.1214/aoms/1177703732) of log prediction - log error, for
errors that span decades.
"""

import functools
from collections.abc import Sequence
from itertools import product
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vlm_jax.scaling.laws import Floats, Form

Loss = Literal["squared", "log"]

LOWEST, HIGHEST = -2.0, 6.0  # of an exponent
FREE_FLOOR = -10.0  # how far a free D may fall; further down the form no longer changes, see `laws.semilog`
HUBER = 0.05  # log residuals beyond this count linearly: about five percent of an error
_RIDGE = 1e-13
_STEP = 1e-6  # of the central differences in an exponent
_GRID = np.array([-0.5, -0.1, -0.02, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.0])


class Solution(NamedTuple):
    """The best fit of each of R problems."""

    theta: Floats  # [R, 2] alpha, beta
    coefficients: Floats  # [R, k] in the centred units of `Problem`
    cost: Floats  # [R]


class Problem(NamedTuple):
    """R fits of one form to the same n cells with different errors and weights."""

    form: Form
    log_params: Floats  # [n]
    log_tokens: Floats  # [n]
    error: Floats  # [R, n]
    weight: Floats  # [R, n]; 0 ignores a row
    floor: Floats  # [R] value of a fixed D, lower bound of another
    loss: Loss
    centre: tuple[float, float]  # means of both logarithms

    def take(self, which: NDArray[np.intp]) -> "Problem":
        """The problems of these indices."""
        return self._replace(error=self.error[which], weight=self.weight[which], floor=self.floor[which])

    def rows(self, which: NDArray[np.bool_]) -> "Problem":
        """The same problems with these of their n rows."""
        return self._replace(
            log_params=self.log_params[which], log_tokens=self.log_tokens[which],
            error=self.error[:, which], weight=self.weight[:, which],
        )  # fmt: skip


def problem(
    form: Form, params: Floats, tokens: Floats, error: Floats, weight: Floats, loss: Loss, fixed: Floats | float = 0.0
) -> Problem:
    """A `Problem` from errors and weights of [R, n] or [n]; `fixed`, scalar or [R], is D of a "fixed" floor."""
    error, weight = np.broadcast_arrays(*np.atleast_2d(error, weight))
    lowest = {"nonnegative": 0.0, "free": FREE_FLOOR, "fixed": fixed, "none": 0.0}[form.floor]
    floor = np.broadcast_to(np.asarray(lowest, float), error.shape[:1])
    log_params, log_tokens = np.log(params), np.log(tokens)
    centre = float(log_params.mean()), float(log_tokens.mean())
    return Problem(form, log_params, log_tokens, error, weight, floor, loss, centre)


def solve(of: Problem, seed: int, hints: Floats | None = None, tolerance: float = 1e-13, steps: int = 100) -> Solution:
    """The best fit of every problem, to a relative `tolerance` in cost or for `steps` steps.

    `hints` [S, 2] are starts that replace the global search (for bootstraps).
    """
    if of.form.floor == "none":
        residual, coefficients, _ = _project(of, np.zeros((len(of.error), 2)))
        return Solution(coefficients[:, 1:], coefficients[:, :1], np.sum(residual**2, axis=1))
    starts = global_starts(of, seed) if hints is None else np.broadcast_to(hints, (len(of.error), *hints.shape))
    index = np.repeat(np.arange(len(starts)), starts.shape[1])
    return solve_from(of, index, starts.reshape(-1, 2), tolerance, steps)


def solve_from(of: Problem, index: NDArray[np.intp], starts: Floats, tolerance: float, steps: int = 100) -> Solution:
    """The best of the fits from starts [S, 2], each for the problem of its index [S]; every problem has one."""
    every = descend(of.take(index), starts, tolerance=tolerance, steps=steps)
    order = np.lexsort((every.cost, index))
    best = order[np.unique(index[order], return_index=True)[1]]
    return Solution(every.theta[best], every.coefficients[best], every.cost[best])


def global_starts(of: Problem, seed: int, best: int = 5, random: int = 5) -> Floats:
    """The best points of a grid, and random ones, [R, best + random, 2]."""
    grid = np.stack(np.meshgrid(_GRID, _GRID, indexing="ij"), axis=-1).reshape(-1, 2)
    problems = len(of.error)
    index = np.repeat(np.arange(problems), len(grid))
    residual, *_ = _project(of.take(index), np.tile(grid, (problems, 1)))
    cost = np.sum(residual**2, axis=1).reshape(problems, len(grid))
    good = grid[np.argsort(cost, axis=1, kind="stable")[:, :best]]
    drawn = np.random.default_rng(seed).uniform(-0.2, 1.5, (random, 2))
    return np.concatenate([good, np.broadcast_to(drawn, (problems, random, 2))], axis=1)


def descend(
    of: Problem, theta: Floats, movable: tuple[bool, bool] = (True, True), tolerance: float = 1e-13, steps: int = 100
) -> Solution:
    """Levenberg-Marquardt from `theta` [R, 2] on the projected residuals; exponents that are not movable are held."""
    theta = np.clip(theta, LOWEST, HIGHEST)
    residual, coefficients, predicted = _project(of, theta)
    cost = np.sum(residual**2, axis=1)
    damping = np.full(len(theta), 1e-3)
    active = np.arange(len(theta))
    free = np.flatnonzero(movable)
    diagonal = np.arange(len(free))
    probes = [sign * _STEP * np.eye(2)[axis] for axis in free for sign in (1, -1)]
    count = len(probes)
    for _ in range(steps):
        if not len(active) or not len(free):
            break
        part, start, r, near = of.take(active), theta[active], residual[active], predicted[active]
        # All probes of all problems in one call.
        probed = np.concatenate([start + probe for probe in probes])
        at = _project(of.take(np.tile(active, count)), probed, np.tile(near, (count, 1)), 3)[0]
        up, down = np.moveaxis(at.reshape(len(free), 2, *r.shape), (1, 0), (0, 3))
        slope = (up - down) / (2 * _STEP)
        transposed = np.swapaxes(slope, 1, 2)
        normal, gradient = transposed @ slope, (transposed @ r[..., None])[..., 0]
        scale = normal[:, diagonal, diagonal] + 1e-300
        normal[:, diagonal, diagonal] += damping[active, None] * scale + _RIDGE * scale
        move = np.zeros_like(start)
        move[:, free] = -eliminate(normal, gradient)
        new = np.clip(start + np.clip(move, -0.5, 0.5), LOWEST, HIGHEST)
        new_residual, new_coefficients, new_predicted = _project(part, new, near, 5)
        new_cost = np.sum(new_residual**2, axis=1)
        better = new_cost < cost[active]
        gain = cost[active] - new_cost
        small = (np.abs(new - start).max(axis=1) < 1e-9) | (better & (gain < tolerance * cost[active]))
        accepted = active[better]
        theta[accepted], residual[accepted], cost[accepted] = new[better], new_residual[better], new_cost[better]
        coefficients[accepted], predicted[accepted] = new_coefficients[better], new_predicted[better]
        damping[active] = np.where(better, damping[active] / 10, damping[active] * 10)
        active = active[~(small | (damping[active] > 1e8))]
    return Solution(theta, coefficients, cost)


def columns(of: Problem, theta: Floats) -> Floats:
    """Design matrix [R, n, k] at exponents [R, 2], in centred logarithms; the last column is D's unless D is fixed."""
    params, tokens = of.log_params - of.centre[0], of.log_tokens - of.centre[1]
    if of.form.floor == "none":
        parts = [1.0, -params, -tokens]
    else:
        left, right = np.exp(-theta[:, :1] * params), np.exp(-theta[:, 1:] * tokens)
        parts = [left * right if has_n and has_v else left if has_n else right for has_n, has_v in of.form.terms]
        parts += [] if of.form.floor == "fixed" else [1.0]
    return _side_by_side(parts, of.error.shape)


def _side_by_side(parts: Sequence[Floats | float], shape: tuple[int, ...]) -> Floats:
    """`np.stack` of k parts on a last axis, each broadcast to the shape; several times as fast for small ones."""
    out = np.empty((*shape, len(parts)))
    for i, part in enumerate(parts):
        out[..., i] = part
    return out


def _project(of: Problem, theta: Floats, near: Floats | None = None, rounds: int = 8) -> tuple[Floats, Floats, Floats]:
    """Residuals [R, n], whose squares sum to the cost, best coefficients [R, k] and predictions [R, n] at `theta`.

    The log loss takes `rounds` Gauss-Newton steps with Huber weights, starting at the predictions `near`.
    """
    design, floor = columns(of, theta), of.floor[:, None]
    fit = _least_squares if of.form.floor == "none" else _nonnegative
    if of.loss == "squared":
        coefficients = fit(design, of.error - floor, of.weight)
        predicted = _apply(design, coefficients) + floor
        return np.sqrt(of.weight) * (predicted - of.error), coefficients, predicted
    predicted = of.error if near is None else near
    for _ in range(rounds):
        miss = np.log(predicted / of.error)
        huber = np.minimum(1, HUBER / np.maximum(np.abs(miss), 1e-12))
        coefficients = fit(design, predicted * (1 - miss) - floor, of.weight * huber / predicted**2)
        predicted = np.maximum(_apply(design, coefficients) + floor, 1e-6)
    miss = np.log(predicted / of.error)
    size = np.abs(miss)
    loss = np.where(size <= HUBER, size**2, HUBER * (2 * size - HUBER))
    return np.sign(miss) * np.sqrt(of.weight * loss), coefficients, predicted


def _apply(design: Floats, coefficients: Floats) -> Floats:
    return (design @ coefficients[..., None])[..., 0]


def _normal(design: Floats, target: Floats, weight: Floats) -> tuple[Floats, Floats]:
    """Gram matrix [R, k, k], with a small ridge, and moment [R, k] of the normal equations."""
    weighted = np.swapaxes(design * weight[..., None], 1, 2)
    gram, index = weighted @ design, np.arange(design.shape[-1])
    gram[:, index, index] = gram[:, index, index] * (1 + _RIDGE) + 1e-280
    return gram, (weighted @ target[..., None])[..., 0]


def _least_squares(design: Floats, target: Floats, weight: Floats) -> Floats:
    return eliminate(*_normal(design, target, weight))


def _nonnegative(design: Floats, target: Floats, weight: Floats) -> Floats:
    """Exact non-negative least squares for up to four columns: the best feasible solution over all subsets."""
    gram, moment = _normal(design, target, weight)
    answer = eliminate(gram, moment)
    poor = np.flatnonzero((answer < 0).any(axis=1))
    if len(poor):
        inside, both, outside = _subsets(design.shape[-1])
        some = eliminate(gram[poor, None] * both + outside, moment[poor, None] * inside)
        gain = np.where((some >= 0).all(axis=-1), np.einsum("rsk,rk->rs", some, moment[poor]), -np.inf)
        answer[poor] = some[np.arange(len(poor)), np.argmax(gain, axis=1)]
    return answer


@functools.cache
def _subsets(size: int) -> tuple[Floats, Floats, Floats]:
    """The proper subsets of k columns, [subsets, k]; the part of a matrix that each keeps, and ones on the rest of its
    diagonal, [subsets, k, k]."""
    inside = np.array(list(product((0.0, 1.0), repeat=size)))[:-1]
    return inside, inside[:, :, None] * inside[:, None, :], np.eye(size) * (1 - inside)[:, None, :]


def eliminate(gram: Floats, moment: Floats) -> Floats:
    """x of gram x = moment for symmetric positive definite matrices [..., k, k] and vectors [..., k]: Gaussian
    elimination, written out over k for all problems at once. For k of one to four this takes a fraction of the time of
    `np.linalg.solve`, which calls LAPACK for each."""
    size = moment.shape[-1]
    a = [[gram[..., i, j] for j in range(size)] for i in range(size)]
    x = [moment[..., i] for i in range(size)]
    for j in range(size):
        for i in range(j + 1, size):
            factor = a[j][i] / a[j][j]  # of the upper half, which is all that is updated
            for k in range(i, size):
                a[i][k] = a[i][k] - factor * a[j][k]
            x[i] = x[i] - factor * x[j]
    for i in reversed(range(size)):
        for k in range(i + 1, size):
            x[i] = x[i] - a[i][k] * x[k]
        x[i] = x[i] / a[i][i]
    return _side_by_side(x, x[0].shape)


def named(of: Problem, solution: Solution) -> dict[str, Floats]:
    """Parameters [R] by name, for N in billions and V in tokens."""
    alpha, beta = solution.theta.T
    centre_n, centre_v = of.centre
    if of.form.floor == "none":
        return {
            "A": solution.coefficients[:, 0] + alpha * centre_n + beta * centre_v, "alpha": alpha, "beta": beta,
        }  # fmt: skip
    values = {
        name: solution.coefficients[:, i] * np.exp(has_n * alpha * centre_n + has_v * beta * centre_v)
        for i, (name, (has_n, has_v)) in enumerate(zip(of.form.linear, of.form.terms, strict=True))
    }
    extra = 0.0 if of.form.floor == "fixed" else solution.coefficients[:, -1]
    return {**values, "alpha": alpha, "beta": beta, "D": of.floor + extra}


def predicted(of: Problem, solution: Solution) -> Floats:
    """Errors [R, n] by each solution at the rows of its problem."""
    values = {name: value[:, None] for name, value in named(of, solution).items()}
    return of.form.function(np.exp(of.log_params), np.exp(of.log_tokens), **values)
