"""From a law and a budget to a ranked list: this LLM, this many tokens, this compressor.

Two modes. "paper" charges what arXiv 2411.03312 charges, 2 N (Q + V), whatever encoder and compressor do. "full"
charges every part with its real cost. The law speaks of N and V only: two encoders or compressors at one V get the
same predicted error (unless measured offsets are given), so within one (LLM, V) only the cheapest visual side is
listed.

Closed form of the paper's problem: minimise the law at fixed N (Q + V). Along the budget d ln N = -dV / (Q + V), and
for the multiplicative and the semi-log law alike the error falls with alpha ln N + beta ln V, whose derivative
vanishes at

    V* = Q beta / (alpha - beta)      where alpha > beta > 0

free of the budget, of A, of D, and of any fixed cost per image that leaves N (Q + V) alone. Where beta >= alpha more
tokens always pay; where beta <= 0 they never do.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vlm_jax.core.errors import UserError, unknown
from vlm_jax.scaling import budgets, catalogue
from vlm_jax.scaling.budgets import Budget
from vlm_jax.scaling.catalogue import Grid
from vlm_jax.scaling.fitted import BASIC, FamilyFit, LawFit
from vlm_jax.scaling.latency import Request
from vlm_jax.scaling.table import params_label
from vlm_jax.sizing.cost import Number

Floats = NDArray[np.float64]
MODES = ("paper", "full")


class Choice(NamedTuple):
    """One planned model, with what it costs and how sure its error is."""

    encoder: str
    llm: str
    llm_params_billion: float
    compressor: str
    visual_tokens: int
    predicted_error: float
    low: float
    high: float
    flops: float
    flops_by_part: dict[str, float]
    latency_ms: float | None
    latency_ms_by_part: dict[str, float] | None
    cache_bytes: float
    memory_bytes: float
    binds: str  # compute, memory, or budget
    beats_next: float | None  # share of bootstraps in which this choice errs less than the one below it
    warnings: list[str]


class ClosedForm(NamedTuple):
    """The paper's continuous optimum."""

    visual_tokens: float  # clipped to the allowed V
    llm_params_billion: float | None  # None where the budget does not say how many FLOPs may be spent
    unclipped_tokens: float | None  # None where more tokens always pay
    nearest_tokens: int  # the allowed V next to it


class Plan(NamedTuple):
    closed_form: ClosedForm
    choices: list[Choice]
    by_mode: dict[str, Choice | None]  # the best of each mode, side by side
    combinations: int
    feasible: int
    notes: list[str]


def optimal_tokens(question_tokens: Number, alpha: Number, beta: Number) -> float:
    """V* = Q beta / (alpha - beta); infinite where beta >= alpha, 0 where beta <= 0 < alpha."""
    if beta >= alpha:
        return math.inf
    return max(float(question_tokens * beta / (alpha - beta)), 0.0)


def closed_form(family: FamilyFit, budget: Budget, request: Request, allowed: tuple[int, ...]) -> ClosedForm:
    """The continuous optimum of the multiplicative law, clipped to the allowed V; a cached question counts as Q = 0."""
    params = family.forms[BASIC].params
    question = 0.0 if request.question == "cached" else request.question_tokens
    free = optimal_tokens(question, params["alpha"], params["beta"])
    tokens = min(max(free, allowed[0]), allowed[-1])
    flops = budgets.flops(budget, request)
    billions = None if flops is None else flops / (2 * (question + tokens)) / 1e9
    nearest = min(allowed, key=lambda v: abs(math.log(v / tokens)))
    return ClosedForm(tokens, billions, None if math.isinf(free) else free, nearest)


def paper_flops(grid: Grid, request: Request) -> Floats:
    """2 N (Q + V), [M, L], with the law's N; a cached question is not charged."""
    question = 0.0 if request.question == "cached" else request.question_tokens
    return 2e9 * grid.params[None, :] * (question + grid.tokens[:, None])


def affordable(grid: Grid, budget: Budget, request: Request, mode: str) -> NDArray[np.bool_]:
    """Which combinations the budget and, in full mode, the chips' memory allow, [M, L]."""
    if mode == "paper":
        limit = budgets.flops(budget, request)
        return grid.cache_bytes <= budget.amount * 1e6 if limit is None else paper_flops(grid, request) <= limit
    fits = np.ones(grid.cache_bytes.shape, bool)
    if request.on is not None:
        fits = _fits(grid, request)
    if budget.kind == "tflops":
        return fits & (grid.total_flops <= budget.amount * 1e12)
    if budget.kind == "cache_mb":
        return fits & (grid.cache_bytes <= budget.amount * 1e6)
    return fits & (grid.total_secs <= budgets.secs(budget, request))


def predicted(family: FamilyFit, grid: Grid, offsets: Mapping[tuple[str, int], float] = {}) -> Floats:
    """Errors [M, L] by the chosen form, between 0 and 1, with a measured offset of the compressor where there is
    one."""
    error = family.predict(grid.params[None, :], grid.tokens[:, None])
    shift = np.array([offsets.get((side.compressor, side.tokens), 0.0) for side in grid.sides])
    return np.clip(error + shift[:, None], 0, 1)


def ranked(error: Floats, cost: Floats, allowed: NDArray[np.bool_], grid: Grid) -> list[tuple[int, int]]:
    """(m, l) of all affordable combinations, least error first and then least cost; one of each (LLM, V, error)."""
    m, n = np.nonzero(allowed)
    order = np.lexsort((m, n, cost[m, n], error[m, n]))
    best: dict[tuple[int, float, float], tuple[int, int]] = {}
    for i in order:
        key = (int(n[i]), float(grid.tokens[m[i]]), float(error[m[i], n[i]]))
        best.setdefault(key, (int(m[i]), int(n[i])))
    return list(best.values())


def pareto(error: Floats, cost: Floats) -> NDArray[np.intp]:
    """Indices of the points that no other point beats in both, in ascending cost. Arrays are [n]."""
    order = np.lexsort((error, cost))
    lowest = np.minimum.accumulate(error[order])
    better = np.concatenate([[True], error[order][1:] < lowest[:-1]])
    return order[better]


def plan(
    law: LawFit,
    budget: Budget,
    request: Request,
    *,
    family: str | None = None,
    mode: str = "full",
    encoders: tuple[str, ...] = (),
    llms: tuple[str, ...] = (),
    compressors: tuple[str, ...] = (),
    tokens: tuple[int, ...] | None = None,
    offsets: Mapping[tuple[str, int], float] = {},
    top: int = 12,
) -> Plan:
    """Searches the whole catalogue, or what the law was measured with, or what the arguments name (`catalogue.names`).

    Raises `UserError` for unknown names and for a budget that nothing meets.
    """
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    budgets.check(budget, request)
    fitted = law.family(family)
    encoders, llms, compressors = catalogue.names(fitted.rows, encoders, llms, compressors)
    sides = catalogue.sides(encoders, compressors, tokens, tuple(fitted.rows["tokens"]))
    grid = catalogue.build(sides, llms, request, law.unit["params_are"])
    error = predicted(fitted, grid, offsets)
    order = {}
    for each in MODES:
        allowed = affordable(grid, budget, request, each)
        order[each] = ranked(error, _charge(grid, request, each), allowed, grid)
        if each == mode and not order[each]:
            raise UserError(_nothing(grid, budget, request, mode))
        if each == mode:
            feasible = int(allowed.sum())
    choices = _choices(fitted, grid, error, order[mode][: top + 1], budget, request, offsets)[:top]
    best = {
        each: next(iter(_choices(fitted, grid, error, order[each][:2], budget, request, offsets)), None)
        for each in MODES
    }
    allowed_tokens = tuple(sorted({side.tokens for side in sides}))
    return Plan(
        closed_form(fitted, budget, request, allowed_tokens), choices, best, grid.cache_bytes.size, feasible,
        _notes(fitted, offsets),
    )  # fmt: skip


def best(law: LawFit, budget: Budget, question_tokens: Number, answer_tokens: Number = 20, **how: Any) -> list[Choice]:
    """The ranked choices alone: `plan` for one request at a time, without a chip. `how` are keywords of `plan`."""
    return plan(law, budget, Request(question_tokens, answer_tokens), **how).choices


def _charge(grid: Grid, request: Request, mode: str) -> Floats:
    """What a combination costs: the paper's FLOPs, then real ones to break ties; or seconds, or FLOPs."""
    if mode == "paper":
        return paper_flops(grid, request) * (1 + 1e-9 * grid.total_flops / grid.total_flops.max())
    return grid.total_secs if grid.secs else grid.total_flops


def _nothing(grid: Grid, budget: Budget, request: Request, mode: str) -> str:
    """The message for a budget that nothing meets, with the least that would do."""
    if mode == "full" and request.on is not None and not (fits := _fits(grid, request)).any():
        need = grid.memory_bytes.min() / 1e9
        have = f"{request.chips} {request.on.name} chip(s)"
        return f"nothing fits into {have}: the smallest needs {need:.3g} GB; add --chips"
    if budget.kind == "cache_mb":
        return f"nothing meets cache_mb={budget.amount:g}; the least is {grid.cache_bytes.min() / 1e6:.3g}"
    if mode == "paper" or budget.kind == "tflops":
        flops = paper_flops(grid, request) if mode == "paper" else grid.total_flops
        return f"nothing meets {budget.kind}={budget.amount:g}; the least is {flops.min() / 1e12:.3g} TFLOPs"
    least = np.where(fits, grid.total_secs, np.inf).min()
    scale = budget.amount / budgets.secs(budget, request)
    return f"nothing meets {budget.kind}={budget.amount:g}; the least is {least * scale:.3g}"


def _fits(grid: Grid, request: Request) -> NDArray[np.bool_]:
    return grid.memory_bytes <= request.on.memory_bytes * request.chips


def _choices(
    family: FamilyFit,
    grid: Grid,
    error: Floats,
    order: list[tuple[int, int]],
    budget: Budget,
    request: Request,
    offsets: Mapping[tuple[str, int], float],
) -> list[Choice]:
    if not order:
        return []
    m, n = np.array(order).T
    shift = error[m, n] - family.predict(grid.params[n], grid.tokens[m])
    draws = family.predict_draws(grid.params[n], grid.tokens[m]) + shift
    low, high = np.clip(np.quantile(draws, (0.025, 0.975), axis=0), 0, 1)
    wins = 0.5 + np.sign(draws[:, 1:] - draws[:, :-1]).mean(axis=0) / 2  # a tie is half a win
    out = []
    for i, (side, llm) in enumerate(order):
        flops = {part: float(values[side, llm]) for part, values in grid.flops.items()}
        secs = {part: float(values[side, llm]) for part, values in grid.secs.items()}
        visual = grid.sides[side]
        out.append(
            Choice(
                visual.encoder,
                grid.llms[llm],
                float(grid.params[llm]),
                visual.compressor,
                visual.tokens,
                float(error[side, llm]),
                float(low[i]),
                float(high[i]),
                sum(flops.values()),
                flops,
                sum(secs.values()) * 1e3 if secs else None,
                {part: value * 1e3 for part, value in secs.items()} if secs else None,
                float(grid.cache_bytes[side, llm]),
                float(grid.memory_bytes[side, llm]),
                _binds(grid, side, llm, budget),
                float(wins[i]) if i < len(wins) else None,
                _warnings(family, grid, side, llm, request, offsets),
            )
        )
    return out


def _binds(grid: Grid, side: int, llm: int, budget: Budget) -> str:
    """What limits the time: compute or memory traffic, by where most of it goes; without a chip, the budget."""
    if budget.kind == "cache_mb":
        return "memory"
    if not grid.secs:
        return "budget"
    by_compute = sum(values[side, llm] for part, values in grid.secs.items() if grid.by_compute[part][side, llm])
    return "compute" if 2 * by_compute >= grid.total_secs[side, llm] else "memory"


def _warnings(
    family: FamilyFit, grid: Grid, side: int, llm: int, request: Request, offsets: Mapping[tuple[str, int], float]
) -> list[str]:
    sizes, tokens = family.rows["sizes"], family.rows["tokens"]
    params, visual = grid.params[llm], grid.sides[side]
    found = []
    # The paper's cost knows no memory; the full one has left these out already.
    if request.on is not None and not _fits(grid, request)[side, llm]:
        need = grid.memory_bytes[side, llm] / 1e9
        found.append(f"does_not_fit: needs {need:.3g} GB, more than {request.chips} x {request.on.name} has")
    if not sizes[0] <= params <= sizes[-1]:
        span = f"{params_label(sizes[0])} to {params_label(sizes[-1])}"
        found.append(f"extrapolates_params: N={params_label(params)}, fitted from {span}")
    if not tokens[0] <= visual.tokens <= tokens[-1]:
        found.append(f"extrapolates_tokens: V={visual.tokens}, fitted from {tokens[0]} to {tokens[-1]}")
    for kind, name in (("encoder", visual.encoder), ("compressor", visual.compressor)):
        measured = family.rows[f"{kind}s"]
        if measured and name not in measured and not (kind == "compressor" and (name, visual.tokens) in offsets):
            found.append(f"{kind}_not_measured: the law's rows are of {', '.join(measured)}")
    if offsets and (name := visual.compressor) not in {key for key, _ in offsets}:
        found.append(f"compressor_without_offset: no measured offset of {name}")
    return found


def _notes(family: FamilyFit, offsets: Mapping[tuple[str, int], float]) -> list[str]:
    """What holds for every line of the plan."""
    notes = [
        f"the law ({family.chosen}) knows N and V only: encoders and compressors at one V differ in cost, not in error"
    ]
    if not family.rows["encoders"]:
        notes.append("its rows do not say which encoder and compressor they were measured with")
    if offsets:
        notes.append("compressor offsets are benchmark differences of one published LLM, carried over to all sizes")
    return notes
