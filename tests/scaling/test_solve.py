"""The solver against SciPy's general ones, and against planted laws."""

import numpy as np
import pytest
from scipy.optimize import differential_evolution, nnls
from tables import grid, published

from vlm_jax.scaling import intervals, laws, solve

N, V = grid()


def problem(form, error, loss="squared", fixed=0.0):
    return solve.problem(laws.form(form), N, V, error, np.ones_like(error), loss, fixed)


def best(form, error, **how):
    of = problem(form, error, **how)
    found = solve.solve(of, seed=0)
    return {name: float(value[0]) for name, value in solve.named(of, found).items()}, float(found.cost[0])


@pytest.mark.parametrize("columns", [1, 2, 3, 4])
def test_nonnegative_least_squares_agrees_with_scipy(columns):
    rng = np.random.default_rng(columns)
    design, target = rng.standard_normal((40, 12, columns)), rng.standard_normal((40, 12))
    weight = rng.uniform(0.1, 2, (40, 12))
    got = solve._nonnegative(design, target, weight)
    for i in range(40):
        root = np.sqrt(weight[i])
        want, _ = nnls(design[i] * root[:, None], target[i] * root)
        np.testing.assert_allclose(got[i], want, atol=1e-9)


@pytest.mark.parametrize("family", ["reasoning", "ocr"])
def test_the_multiplicative_fit_is_the_global_one(family):
    n, v, error = published(family)

    def sse(theta):
        a, alpha, beta, d = theta
        return np.sum((a * n**-alpha * v**-beta + d - error) ** 2)

    bounds = [(0, 2), (0, 0.5), (0, 0.5), (0, 0.5)]
    other = differential_evolution(sse, bounds, seed=1, tol=1e-12, maxiter=400, popsize=12, polish=True)
    of = solve.problem(laws.form("multiplicative"), n, v, error, np.ones_like(error), "squared")
    found = solve.solve(of, seed=0)
    assert found.cost[0] <= other.fun * (1 + 1e-6)
    values = {name: x[0] for name, x in solve.named(of, found).items()}
    assert sse([values[k] for k in ("A", "alpha", "beta", "D")]) == pytest.approx(found.cost[0], rel=1e-9)


PLANTED = {
    "multiplicative": {"A": 0.5, "alpha": 0.4, "beta": 0.2, "D": 0.1},
    "multiplicative-fixed": {"A": 0.5, "alpha": -0.1, "beta": 0.3, "D": 0.0},
    "additive": {"A": 0.2, "B": 0.4, "alpha": 0.5, "beta": 0.3, "D": 0.1},
    "interaction": {"A": 0.2, "B": 0.2, "C": 0.3, "alpha": 0.6, "beta": 0.4, "D": 0.05},
    "semilog": {"A": 0.6, "alpha": 0.04, "beta": 0.01},
}


@pytest.mark.parametrize("loss", ["squared", "log"])
@pytest.mark.parametrize("form", PLANTED)
def test_a_planted_law_is_recovered(form, loss):
    values, cost = best(form, laws.predict(form, PLANTED[form], N, V), loss=loss)
    assert cost < 1e-14
    for name, value in PLANTED[form].items():
        assert values[name] == pytest.approx(value, abs=2e-4)


def test_a_free_floor_may_be_negative_and_a_fixed_one_stays():
    error = laws.predict("multiplicative", {"A": 1.0, "alpha": 0.1, "beta": 0.05, "D": -0.3}, N, V)
    assert best("multiplicative-free", error)[0]["D"] == pytest.approx(-0.3, abs=1e-3)
    assert best("multiplicative", error)[0]["D"] == 0
    assert best("multiplicative-fixed", error, fixed=0.2)[0]["D"] == 0.2


def test_the_log_loss_bears_an_outlier():
    true = {"A": 0.5, "alpha": 0.4, "beta": 0.2, "D": 0.0}
    error = laws.predict("multiplicative", true, N, V)
    error[3] *= 3
    robust, plain = (best("multiplicative-fixed", error, loss=loss)[0] for loss in ("log", "squared"))
    assert abs(robust["alpha"] - 0.4) < 0.02 < abs(plain["alpha"] - 0.4)


def test_many_problems_at_once_are_the_same_as_one_by_one():
    rng = np.random.default_rng(0)
    error = laws.predict("additive", PLANTED["additive"], N, V) + 0.01 * rng.standard_normal((5, len(N)))
    together = solve.solve(problem("additive", error), seed=0)
    for i in range(5):
        alone = solve.solve(problem("additive", error[i]), seed=0)
        assert together.cost[i] == pytest.approx(alone.cost[0], rel=1e-8)


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_intervals_cover_the_planted_exponents(floor):
    """The 95 % interval over 200 tables, with the floor on its bound and inside it; its own error is 1.5 points."""
    true = {"A": 0.59 - floor, "alpha": 0.07 + floor, "beta": 0.015 + 0.3 * floor, "D": floor}
    rng = np.random.default_rng(7)
    error = laws.predict("multiplicative", true, N, V) + 0.004 * rng.standard_normal((200, len(N)))
    of = problem("multiplicative", error)
    found = solve.solve(of, seed=0)
    for name in ("alpha", "beta", "D"):
        low, high = intervals.profile(of, found, name, len(N) - 4).T
        assert 0.90 <= np.mean((low <= true[name]) & (true[name] <= high)) <= 0.99


def test_the_interval_of_the_ratio_covers_too():
    true = {"A": 0.49, "alpha": 0.09, "beta": 0.02, "D": 0.1}
    rng = np.random.default_rng(3)
    error = laws.predict("multiplicative", true, N, V) + 0.004 * rng.standard_normal((100, len(N)))
    of = problem("multiplicative", error)
    found = solve.solve(of, seed=0)
    inside = []
    for i in range(100):
        one = of.take(np.array([i]))
        fitted = solve.Solution(found.theta[[i]], found.coefficients[[i]], found.cost[[i]])
        values = {name: x[0] for name, x in solve.named(one, fitted).items()}
        predicted = laws.predict("multiplicative", values, N, V)
        draws = intervals.bootstrap(one, fitted, predicted, np.arange(28.0), 80, seed=i).residual
        low, high = intervals.percentiles(draws["alpha"] / draws["beta"])
        inside.append(low <= true["alpha"] / true["beta"] <= high)
    assert 0.88 <= np.mean(inside) <= 1.0  # a hundred tables: two points of its own error
