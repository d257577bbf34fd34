"""Fits the forms of the law to families of rows. The same rows and seed give the same values."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from vlm_jax.core.errors import UserError, unknown
from vlm_jax.core.rows import ResultRow
from vlm_jax.scaling import checks, intervals, lack_of_fit, laws, scores, solve
from vlm_jax.scaling.fitted import BASIC, VERSION, FamilyFit, FormFit, Interval, LargestOut, LawFit, Measured, distinct
from vlm_jax.scaling.laws import Floats
from vlm_jax.scaling.scores import Measurement, Scores

LOSSES = ("squared", "log")
FLOORS = ("none", "blind")
WEIGHTS = ("equal", "stderr")
INTERVALS = ("chosen", "all")  # the forms that get intervals


def fit(
    rows: Iterable[ResultRow] | Scores, form: str = "auto", *, family: str | None = None, loss: str = "squared",
    floor: str = "none", fixed_floor: int | float = 0.0, bootstraps: int = 1000, seed: int = 0, source: str = "",
    weights: str = "equal", progress: Callable[[str], None] = lambda stage: None, interval: str = "chosen",
) -> LawFit:  # fmt: skip
    """Fits all forms ("auto") and chooses one, or fits one form and the multiplicative, which gives `ratio`.

    `floor="blind"` takes scores relative to the blind baseline of the same size; `fixed_floor` is D of the "-fixed"
    forms; `weights="stderr"` weights rows by their inverse variance; `interval="all"` gives intervals to every form and
    not only to the chosen and the multiplicative one. `progress` is called with the name of each stage.
    Raises `UserError` for rows that no law can be fitted to, or that have no standard errors to weight by.
    """
    if weights not in WEIGHTS:
        raise unknown("weights", weights, WEIGHTS)
    if loss not in LOSSES:
        raise unknown("loss", loss, LOSSES)
    if floor not in FLOORS:
        raise unknown("floor", floor, FLOORS)
    if interval not in INTERVALS:
        raise unknown("interval", interval, INTERVALS)
    _names(form)  # raises for an unknown form
    data = scores.of_rows(rows)
    if not data.cells:
        raise UserError("rows: expected at least one, got none")
    if family is not None:
        data = data.of(family)
    shifted = scores.above_blind(data) if floor == "blind" else data
    families = {}
    for name in data.families():
        report = lambda stage, name=name: progress(f"{name}: {stage}")  # noqa: E731
        families[name] = _fit_family(
            shifted.of(name).cells,
            data.of(name),
            name,
            form,
            loss,
            fixed_floor,
            bootstraps,
            seed,
            weights,
            report,
            interval,
        )
    unit = {"llm_params": scores.BILLION, "params_are": data.params_are}
    return LawFit(VERSION, unit, loss, seed, bootstraps, floor, source, families, weights)


def _names(form: str) -> tuple[str, ...]:
    return tuple(laws.FORMS) if form == "auto" else tuple(dict.fromkeys((laws.form(form).name, BASIC)))


def stages(rows: Scores, form: str = "auto", family: str | None = None) -> int:
    """Number of calls of `progress` by `fit`."""
    return (len(_names(form)) + 2) * (len(rows.families()) if family is None else 1)


class _Data(NamedTuple):
    """A family's cells as arrays [n]."""

    params: Floats
    tokens: Floats
    error: Floats
    cell: Floats  # index of the (N, V) pair
    weight: Floats  # of mean 1
    stderr: Floats  # nan where unknown
    replicate: Floats  # index of the pair, of rows with a seed; a row without one is no replicate of another

    @classmethod
    def of(cls, cells: Iterable[Measurement], weights: str) -> "_Data":
        cells = list(cells)
        params, tokens, error = np.array([(c.params, c.tokens, c.error) for c in cells], float).T
        _, cell = np.unique(np.stack([params, tokens]), axis=1, return_inverse=True)
        stderr = np.array([np.nan if c.stderr is None else c.stderr for c in cells])
        alone = np.array([c.seed is None for c in cells])
        replicate = np.where(alone, len(cells) + np.arange(len(cells)), cell)
        weight = _weights(cells, weights)
        return cls(params, tokens, error, cell.astype(float), weight, stderr, replicate.astype(float))


def _weights(cells: list[Measurement], weights: str) -> Floats:
    """Ones, or inverse variances of mean 1."""
    if weights == "equal":
        return np.ones(len(cells))
    if without := [cell.where for cell in cells if not cell.stderr]:
        raise UserError(f"{without[0]}: expected a standard error above 0 to weight by, got none (use equal weights)")
    inverse = np.array([cell.stderr for cell in cells], float) ** -2
    return inverse / inverse.mean()


def _fit_family(
    cells: tuple[Measurement, ...], original: Scores, name: str, form: str, loss: str, fixed_floor: int | float,
    bootstraps: int, seed: int, weights: str, progress: Callable[[str], None], interval: str,
) -> FamilyFit:  # fmt: skip
    seen = scores.seen(cells)
    checks.require_fit(seen, name, loss, fixed_floor)
    data = _Data.of(seen, weights)
    solved, forms = {}, {}
    for key in _names(form):
        progress(key)
        of = solve.problem(laws.form(key), data.params, data.tokens, data.error, data.weight, loss, fixed_floor)
        solved[key] = of, solve.solve(of, seed)
        forms[key] = _fit_form(*solved[key], data, seed)
    chosen, selection = (_choose(forms, data), _SELECTION) if form == "auto" else (form, "asked for")
    progress("intervals")
    for key in forms if interval == "all" else dict.fromkeys((chosen, BASIC)):
        forms[key], draws = _with_intervals(forms[key], *solved[key], data, bootstraps, seed)
        if key == BASIC:
            ratio, difference = _contrast(forms[key], draws)
    progress("profile of D")
    d_profile = _profile_of_floor(data, loss)
    noise = checks.noise(data.error, data.replicate, forms[chosen].lack_of_fit)
    rows = {
        "cells": len(data.error),
        "sizes": sorted(set(data.params.tolist())),
        "tokens": sorted(set(data.tokens.astype(int).tolist())),
        "lowest_error": float(data.error.min()),
        "blind": {f"{size:g}": error for size, error in scores.blind_errors(cells).items()},
        "noise": noise,
        "harness": sorted({c.extra["harness"] for c in seen if c.extra.get("harness")}),
    }
    models = distinct(c.model for c in sorted(seen, key=lambda c: (c.params, c.tokens)) if c.model is not None)
    warnings = checks.warnings(original, seen, forms[BASIC], forms, chosen, ratio)
    # Draws are long, and only these are used.
    forms = {key: one if key in (chosen, BASIC) else one._replace(draws={}) for key, one in forms.items()}
    return FamilyFit(
        rows, models, forms, chosen, selection, ratio, difference, d_profile, warnings, _measured(seen, data, noise)
    )


def _measured(cells: tuple[Measurement, ...], data: _Data, noise: Mapping[str, Any]) -> Measured:
    """The means of cells; their standard error is that of images, or that of replicates pooled over cells if larger."""
    params, tokens, error, _ = zip(*scores.cell_means(cells), strict=True)  # in the order of `_Data.cell`
    index = data.cell.astype(int)
    count = np.bincount(index)
    images = np.sqrt(np.bincount(index, np.nan_to_num(data.stderr) ** 2)) / count
    stderr = np.maximum(images, (noise["stdev"] or 0.0) / np.sqrt(count))
    return Measured(list(params), list(tokens), list(error), stderr.tolist())


def _fit_form(of: solve.Problem, found: solve.Solution, data: _Data, seed: int) -> FormFit:
    """The fit with its held-out errors and its test, without intervals."""
    params = {name: float(values[0]) for name, values in solve.named(of, found).items()}
    sse = float(np.sum((solve.predicted(of, found)[0] - data.error) ** 2))
    cost, free = float(found.cost[0]), of.form.free_params
    aicc = _aicc(cost, len(data.error), free)
    groups = {"cell": data.cell, "size": data.params, "tokens": data.tokens}
    least = {"cell": free, "size": 2, "tokens": 2}  # groups that a held-out fit needs more of
    groups = {name: group for name, group in groups.items() if len(np.unique(group)) > least[name]}
    hints = [None if name == "size" else found.theta for name in groups]  # without a size the fit may be another
    held = dict(zip(groups, intervals.left_out(of, list(groups.values()), hints, seed), strict=True)) if groups else {}
    errors = {name: float(np.sqrt(np.mean((one.predicted - data.error) ** 2))) for name, one in held.items()}
    largest = _largest_out(held["size"], data) if "size" in held else None
    test = lack_of_fit.test(of, found, data.replicate, data.stderr, seed)
    out = errors.get("size"), errors.get("cell"), largest
    return FormFit(params, sse, cost, aicc, *out, {}, {}, errors.get("tokens"), test)


def _with_intervals(
    one: FormFit, of: solve.Problem, found: solve.Solution, data: _Data, bootstraps: int, seed: int
) -> tuple[FormFit, intervals.Draws]:
    """The fit with intervals, draws, and how many cells of the largest size the others' interval covers."""
    draws = intervals.bootstrap(of, found, solve.predicted(of, found)[0], data.cell, bootstraps, seed)
    interval: dict[str, Interval] = {name: intervals.percentiles(values) for name, values in draws.residual.items()}
    form, dof, largest = of.form, len(data.error) - of.form.free_params, one.largest_out
    if dof > 0 and form.floor != "none":
        for name in ("alpha", "beta", *(("D",) if form.floor != "fixed" else ())):
            interval[name] = _open_ends(intervals.profile(of, found, name, dof)[0], name)
    if largest and (counts := lack_of_fit.covered(of, data.params, seed, bootstraps)):
        largest = largest | {"covered": counts[0], "cells": counts[1], "extrapolates": counts[2]}
    kept = {name: values.tolist() for name, values in draws.residual.items()}
    return one._replace(interval=interval, draws=kept, largest_out=largest), draws


def _open_ends(ends: Floats, name: str) -> Interval:
    """The interval with None for an end at the bound of the search."""
    low, high = map(float, ends)
    if name == "D":
        return (None if low <= solve.FREE_FLOOR else low, high)
    return (None if low <= solve.LOWEST else low, None if high >= solve.HIGHEST else high)


def _aicc(cost: float, count: int, free_params: int) -> float | None:
    """Akaike's criterion for a Gaussian error of unknown size, corrected for few rows (doi:10.1093/biomet/76.2.297)."""
    total = free_params + 1  # and the variance
    if count - total - 1 <= 0:
        return None
    return float(count * np.log(max(cost, 1e-300) / count) + 2 * total + 2 * total * (total + 1) / (count - total - 1))


def _largest_out(held: intervals.LeftOut, data: _Data) -> LargestOut:
    """The fit without the largest size."""
    last = data.params == data.params.max()
    relative = np.abs(held.predicted[last] / data.error[last] - 1)
    return {
        "llm_params_billion": float(data.params.max()),
        "mean_relative_error": float(relative.mean()),
        "max_relative_error": float(relative.max()),
        "relative_error_of_mean": float(abs(held.predicted[last].mean() / data.error[last].mean() - 1)),
        "params": held.params[-1],
    }


_SELECTION = (
    "lowest AICc among the forms whose floor is not negative and whose predictions stay between 0 and 1 up to ten times"
    " the largest size, of those that fit if any do"
)


def _choose(forms: dict[str, FormFit], data: _Data) -> str:
    """The form by `_SELECTION`. Free floors are not chosen, as their error falls without bound."""
    far = np.array([data.params.min(), data.params.max(), 10 * data.params.max()])[:, None]
    ends = np.array([data.tokens.min(), data.tokens.max()])
    best, name = (True, np.inf), f"{BASIC}-fixed"
    for key, one in forms.items():
        predicted = laws.predict(key, one.params, far, ends)
        sane = ((predicted > 0) & (predicted < 1.0 + 1e-9)).all()
        if laws.form(key).floor != "free" and one.aicc is not None and sane:
            best, name = min((best, name), ((one.lack_of_fit.rejects, one.aicc), key), key=lambda each: each[0])
    return name


def _contrast(basic: FormFit, draws: intervals.Draws) -> tuple[dict[str, Any], dict[str, float]]:
    """Ratio and difference of the exponents with intervals; the ratio is unbounded if beta may be 0."""
    alpha, beta = basic.params["alpha"], basic.params["beta"]
    ends = [basic.interval["beta"], *(intervals.percentiles(each["beta"]) for each in draws)]
    zero = any((low is None or low <= 0) and (high is None or high >= 0) for low, high in ends)
    ratio: dict[str, Any] = {"value": alpha / beta if beta else None}
    for suffix, each in (("", draws.residual), ("_cases", draws.case)):
        low, high = (None, None) if zero else intervals.percentiles(each["alpha"] / each["beta"])
        ratio |= {"low" + suffix: low, "high" + suffix: high}
    low, high = intervals.percentiles(draws.residual["alpha"] - draws.residual["beta"])
    return {**ratio, "form": BASIC}, {"value": alpha - beta, "low": low, "high": high}


def _profile_of_floor(data: _Data, loss: solve.Loss, points: int = 21) -> list[dict[str, float]]:
    """The multiplicative fit at several D between 0 and the lowest error."""
    floors = np.linspace(0, 0.98 * data.error.min(), points)
    shape = (points, len(data.error))
    error, weight = (np.broadcast_to(each, shape) for each in (data.error, data.weight))
    of = solve.problem(laws.form(f"{BASIC}-fixed"), data.params, data.tokens, error, weight, loss, floors)
    found = solve.solve(of, seed=0)
    values = solve.named(of, found)
    columns = {"D": floors, "alpha": values["alpha"], "beta": values["beta"], "cost": found.cost}
    return [{name: float(column[i]) for name, column in columns.items()} for i in range(points)]
