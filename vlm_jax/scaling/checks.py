"""Checks of rows and fits. A warning is `code: sentence`; codes are stable, sentences may change."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from vlm_jax.core.errors import UserError
from vlm_jax.scaling import laws, scores, solve
from vlm_jax.scaling.fitted import FormFit, LackOfFit, p_value
from vlm_jax.scaling.laws import Floats
from vlm_jax.scaling.scores import Measurement, Scores, params_label

_LONG = 6  # decimals of a number that does not occur twice by chance


def require_fit(cells: tuple[Measurement, ...], family: str, loss: str, fixed_floor: int | float) -> None:
    """Raises `UserError` if no law in N and V can be fitted to the cells."""
    if not cells:
        raise UserError(f"family {family!r}: expected rows with visual_tokens above 0, got none")
    first = cells[0].where.rpartition(":")[0] or cells[0].where
    for field, values in (
        ("LLM sizes", {c.params for c in cells}),
        ("numbers of visual tokens", {c.tokens for c in cells}),
    ):
        if len(values) < 2:
            raise UserError(f"{first}: family {family!r}: expected two or more {field}, got {values.pop():g} only")
    for cell in cells:
        if loss == "log" and cell.error <= 0:
            raise UserError(f"{cell.where}: expected an error above 0, got {cell.error:g} (use --loss squared)")
        if fixed_floor > cell.error:
            raise UserError(
                f"{cell.where}: expected an error of at least {fixed_floor:g}, got {cell.error:g} (lower --fixed-d)"
            )


def noise(error: Floats, cell: Floats, lack_of_fit: LackOfFit) -> dict[str, Any]:
    """Pooled standard deviation within cells, None without replicates, and the p-value of the chosen form's test."""
    cells, index = np.unique(cell, return_inverse=True)
    means = np.bincount(index, error) / np.bincount(index)
    dof = len(error) - len(cells)
    stdev = float(np.sqrt(np.sum((error - means[index]) ** 2) / dof)) if dof else None
    return {"replicates": dof, "stdev": stdev, "lack_of_fit_p": lack_of_fit.p}


def warnings(
    original: Scores, seen: tuple[Measurement, ...], basic: FormFit, forms: Mapping[str, FormFit], chosen: str,
    ratio: Mapping[str, Any],
) -> list[str]:  # fmt: skip
    """Warnings of one family, sorted by code. `original` holds its rows before the floor was subtracted."""
    about_fit = _about_fit(seen, basic, forms, chosen, ratio)
    return sorted([*_about_rows(original), *_about_order(seen), *about_fit])


def _about_fit(
    seen: tuple[Measurement, ...], basic: FormFit, forms: Mapping[str, FormFit], chosen: str, ratio: Mapping[str, Any]
) -> Iterable[str]:
    count = len({(c.params, c.tokens) for c in seen})
    for key in forms:
        if count < laws.form(key).free_params + 2:
            yield f"few_cells: {count} cells for the {laws.form(key).free_params} parameters of {key}"
    low, high = basic.interval.get("D", (None, None))
    if low is None or high is None or high - low > min(c.error for c in seen) / 10:
        ends = f"from {low:.3g} to {high:.3g}" if low is not None and high is not None else "without bound"
        trust = "trust the ratio alpha / beta rather than any of them"
        yield f"d_not_identified: D may lie anywhere {ends}, and A, alpha and beta move with it; {trust}"
    for key in {chosen: 0, "multiplicative": 0}:
        for name in ("alpha", "beta"):
            if key in forms and not solve.LOWEST < forms[key].params[name] < solve.HIGHEST:
                yield f"exponent_at_bound: {name} of {key} ran into the bound of the search"
    test = forms[chosen].lack_of_fit
    tokens = sorted({c.tokens for c in seen})
    edge, text = (tokens[0], "fewest") if basic.params["alpha"] > basic.params["beta"] else (tokens[-1], "most")
    best = f"without text (Q = 0) the best V is {edge}, the {text} measured"
    if not test.rejects:
        yield f"optimum_on_edge: {best}; beyond it nothing is known"
    if ratio["low"] is None:
        yield "ratio_unbounded: beta may be 0, so alpha / beta has no bound; look at the difference alpha - beta"
    if test.p is None:
        yield f"fit_not_tested: {test.untested}, so nobody knows whether {chosen} fits"
    elif test.rejects:
        missed = f"{chosen} misses the cells' means by more than the noise of {test.noise} (p {p_value(test.p)})"
        yield f"lack_of_fit: {missed}; plans rank measured cells, not the law"
    out = forms[chosen].largest_out or {}
    if not out.get("extrapolates", True):
        where = f"fitted without N={params_label(out['llm_params_billion'])}"
        yield (
            f"does_not_extrapolate: {where}, the 95 % interval of {chosen} covers {out['covered']} of its "
            f"{out['cells']} cells"
        )


def _about_rows(original: Scores) -> Iterable[str]:
    seen, blind = scores.seen(original.cells), scores.blind_errors(original.cells)
    pairs: dict[tuple[float, int, int | None], int] = {}
    values: dict[float, set[tuple[float, int]]] = {}
    for cell in seen:
        key = (cell.params, cell.tokens, cell.seed)
        pairs[key] = pairs.get(key, 0) + 1
        if round(cell.error, _LONG - 1) != cell.error and cell.seed is None:
            values.setdefault(round(cell.error, 10), set()).add(key[:2])
    if twice := [f"N={params_label(n)} V={v}" for (n, v, _), times in pairs.items() if times > 1]:
        yield f"duplicated_cells: more than one row for {_some(twice)}"
    for error, cells in values.items():
        if len(cells) > 1:
            where = " and ".join(f"N={params_label(n)} V={v}" for n, v in sorted(cells))
            yield f"repeated_values: {where} have the same error to ten digits, {error:.10g}; one may be a copy"
    if missing := [params_label(n) for n in sorted({c.params for c in seen}) if n not in blind]:
        yield f"blind_missing: no row with visual_tokens=0 at N={_some(missing)}; nobody knows what the image adds"
    worse = [f"N={params_label(c.params)} V={c.tokens}" for c in seen if c.error > blind.get(c.params, 1.0)]
    if worse := list(dict.fromkeys(worse)):
        yield f"above_blind: the error is above that without an image at {_some(worse)}"


def _about_order(cells: tuple[Measurement, ...]) -> Iterable[str]:
    """Cells whose mean error exceeds that of a smaller LLM, or of fewer tokens, by more than two standard errors."""
    means = {(n, v): (mean, stderr) for n, v, mean, stderr in scores.cell_means(cells)}
    for axis, name in ((0, "a larger LLM"), (1, "more tokens")):
        worse = []
        for key, (mean, stderr) in means.items():
            later = [other for other in means if other[1 - axis] == key[1 - axis] and other[axis] > key[axis]]
            after = min(later, key=lambda other: other[axis], default=None)
            if after and means[after][0] - mean > 2 * np.hypot(means[after][1], stderr):
                worse.append(f"N={params_label(after[0])} V={after[1]}")
        if worse:
            yield f"non_monotone: the error rises with {name} at {_some(worse)}"


def _some(items: list[str], most: int = 6) -> str:
    rest = len(items) - most
    return ", ".join(items[:most]) + (f" and {rest} more" if rest > 0 else "")
