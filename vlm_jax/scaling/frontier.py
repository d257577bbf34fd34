"""Ranks the models that fit a budget by predicted error.

Two cost modes. "paper" charges 2 N (Q + V) as arXiv 2411.03312 does, whatever encoder and compressor cost. "full"
charges the cost of every part. Where no law fits, the cells that were
measured are ranked by their errors. The law predicts from N and V only, so candidates whose encoder, compressor or LLM
family its rows were not measured with rank behind all measured ones. Of candidates with the same N and V, which the law
cannot distinguish, the cheapest is listed.

Closed form of the paper's problem: minimise the law at fixed N (Q + V). Along the budget d ln N = -dV / (Q + V), and
for both the multiplicative and the semi-log law the error falls with alpha ln N + beta ln V, whose derivative vanishes
at

    V* = Q beta / (alpha - beta)      where alpha > beta > 0

independent of the budget, of A, of D, and of any fixed cost per image that leaves N (Q + V) alone. Where beta >= alpha
more tokens always pay; where beta <= 0 they never do.
"""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vlm_jax.core.errors import UserError, unknown
from vlm_jax.core.specs import ModelSpec
from vlm_jax.scaling import budgets, candidates
from vlm_jax.scaling.budgets import Budget
from vlm_jax.scaling.candidates import Candidate, NameFilter, Price
from vlm_jax.scaling.fitted import BASIC, FamilyFit, LawFit
from vlm_jax.scaling.laws import Floats
from vlm_jax.scaling.scores import params_label
from vlm_jax.sizing.cost import Number
from vlm_jax.sizing.roofline import Request

Bools = NDArray[np.bool_]
Offsets = Mapping[tuple[str, int], float]  # (compressor, V) -> difference in error
MODES = ("paper", "full")
NO_OFFSETS: Offsets = MappingProxyType({})


class Choice(NamedTuple):
    """One ranked model with its cost and predicted error."""

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
    beats_next: float | None  # share of bootstraps in which its error is below that of the next choice
    extrapolates: tuple[str, ...]  # of "encoder", "compressor", "family", "params", "tokens"
    warnings: list[str]
    model: ModelSpec


class ClosedForm(NamedTuple):
    """The paper's continuous optimum."""

    visual_tokens: float  # clipped to the allowed V
    llm_params_billion: float | None  # None if the budget does not limit FLOPs
    unclipped_tokens: float | None  # None if more tokens always pay
    nearest_tokens: int  # the closest allowed V


class Ranking(NamedTuple):
    """Result of `plan`."""

    closed_form: ClosedForm | None  # None: no law fits
    choices: list[Choice]
    by_mode: dict[str, Choice | None]  # the best of each mode
    extrapolated: Choice | None  # the best whose encoder, compressor or family was not measured
    candidates: int
    feasible: int
    notes: list[str]


class Priced(NamedTuple):
    """Candidates with their cost and predicted error."""

    of: list[Candidate]
    prices: list[Price]
    shift: Floats  # [n] measured offsets of the compressors
    error: Floats  # [n] predicted, offsets included

    def each(self, field: str) -> Floats:
        """A field of all prices, [n]."""
        return np.array([getattr(price, field) for price in self.prices], float)


def optimal_tokens(question_tokens: Number, alpha: Number, beta: Number) -> float:
    """V* = Q beta / (alpha - beta); infinite where beta >= alpha, 0 where beta <= 0 < alpha."""
    if beta >= alpha:
        return math.inf
    return max(float(question_tokens * beta / (alpha - beta)), 0.0)


def closed_form(family: FamilyFit, budget: Budget, request: Request, allowed: Sequence[int]) -> ClosedForm:
    """The continuous optimum of the multiplicative law, clipped to the allowed V; a cached question counts as Q = 0."""
    params, question = family.forms[BASIC].params, _charged_question(request)
    free = optimal_tokens(question, params["alpha"], params["beta"])
    tokens = min(max(free, allowed[0]), allowed[-1])
    flops = budgets.flops(budget, request)
    billions = None if flops is None else flops / (2 * (question + tokens)) / 1e9
    nearest = min(allowed, key=lambda v: abs(math.log(v / tokens)))
    return ClosedForm(tokens, billions, None if math.isinf(free) else free, nearest)


def _charged_question(request: Request) -> Number:
    return 0.0 if request.question == "cached" else request.question_tokens


def price_all(family: FamilyFit, of: list[Candidate], request: Request, offsets: Offsets = NO_OFFSETS) -> Priced:
    """Prices, and errors in [0, 1] by the chosen form plus the compressor's offset if there is one."""
    if request.question not in ("fresh", "cached"):
        raise unknown("question", request.question, ("fresh", "cached"))
    shift = np.array([offsets.get((one.model.compressor.name, one.tokens), 0.0) for one in of])
    error = family.predict(*law_arguments(of)) + shift
    return Priced(of, [candidates.price(one.model, request) for one in of], shift, np.clip(error, 0, 1))


def with_offsets(found: Sequence[Candidate], offsets: Offsets) -> list[Candidate]:
    """The candidates, where a compressor with a measured offset at this V is no extrapolation."""
    return [
        one._replace(extrapolates=tuple(kind for kind in one.extrapolates if kind != "compressor"))
        if (one.model.compressor.name, one.tokens) in offsets
        else one
        for one in found
    ]


def law_arguments(of: Sequence[Candidate]) -> tuple[Floats, Floats]:
    """N and V, [n]."""
    return np.array([one.params for one in of], float), np.array([one.tokens for one in of], float)


def paper_flops(priced: Priced, request: Request) -> Floats:
    """2 N (Q + V), [n]; a cached question is not charged."""
    question = _charged_question(request)
    return np.array([2e9 * one.params * (question + one.tokens) for one in priced.of])


def _charge(priced: Priced, budget: Budget, request: Request, mode: str) -> tuple[Floats, Number]:
    """What each candidate takes of the budget, [n], and the budget, in one unit."""
    if budget.kind == "cache_mb":
        return priced.each("cache_bytes"), budget.amount * 1e6
    if mode == "paper":
        return paper_flops(priced, request), budgets.flops(budget, request) or 0.0
    if budget.kind == "tflops":
        return priced.each("total_flops"), budget.amount * 1e12
    return priced.each("secs"), budgets.secs(budget, request) or 0.0


def _fits(priced: Priced, request: Request, mode: str = "full") -> Bools:
    """Whether each candidate fits into the chips' memory, [n]; the paper's cost ignores memory."""
    limit = math.inf if request.on is None or mode == "paper" else request.on.memory_bytes * request.chips
    return priced.each("memory_bytes") <= limit


def ranked(priced: Priced, cost: Floats, allowed: Bools) -> list[int]:
    """Indices of the allowed candidates: measured before extrapolated ones, then by error, then by cost. One of each
    (LLM, V, error)."""
    beyond = np.array([bool(one.extrapolates) for one in priced.of])
    best: dict[tuple[Any, ...], int] = {}
    for i in np.lexsort((cost, priced.error, beyond)):
        if allowed[i]:
            one = priced.of[i]
            best.setdefault((one.model.decoder.name, one.tokens, float(priced.error[i]), beyond[i]), int(i))
    return list(best.values())


def pareto(error: Floats, cost: Floats) -> NDArray[np.intp]:
    """Indices of the Pareto-optimal points in ascending cost. Arrays are [n]."""
    order = np.lexsort((error, cost))
    lowest = np.minimum.accumulate(error[order])
    return order[np.concatenate([[True], error[order][1:] < lowest[:-1]])]


def plan(
    law: LawFit, budget: Budget, request: Request, *, family: str | None = None, mode: str = "full",
    encoders: NameFilter = (), llms: NameFilter = (), compressors: NameFilter = (), tokens: Sequence[int] = (),
    offsets: Offsets = NO_OFFSETS, top: int = 12,
) -> Ranking:  # fmt: skip
    """Ranks the models that the law was measured with, or that the arguments name (`candidates.candidates`).

    Raises `UserError` for unknown names and for a budget that no candidate meets.
    """
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    budgets.check(budget, request)
    fitted = law.family(family)
    found = candidates.candidates(fitted, law.unit["params_are"], encoders, llms, compressors, tokens)
    found = with_offsets(found, offsets)
    priced = price_all(fitted, found, request, offsets)
    order, allowed = {}, {}
    for each in MODES:
        charge, limit = _charge(priced, budget, request, each)
        allowed[each] = _fits(priced, request, each) & (charge <= limit)
        order[each] = ranked(priced, _tie_breaker(priced, request, each), allowed[each])
    if not order[mode]:
        raise UserError(_infeasible(priced, budget, request, mode))

    def listed(of: list[int]) -> list[Choice]:
        return choices(fitted, priced, of, request, offsets, "memory" if budget.kind == "cache_mb" else "")

    notes = [f"the law ({fitted.chosen}) predicts from N and V only; it was measured with {fitted.measured_with}"]
    if fitted.predicts == "cells":
        notes = [f"errors are those measured, with {fitted.measured_with}; nothing between the cells is known"]
    notes += [text for text in (fitted.verdict, fitted.extrapolation) if text]
    if offsets:
        notes.append("compressor offsets are benchmark differences of one published LLM, applied to all sizes")
    return Ranking(
        closed_form(fitted, budget, request, sorted({one.tokens for one in found})) if fitted.fits else None,
        listed(order[mode][: top + 1])[:top],
        {each: next(iter(listed(order[each][:2])), None) for each in MODES},
        next(iter(listed([i for i in order[mode] if priced.of[i].extrapolates][:2])), None),
        len(found),
        int(allowed[mode].sum()),
        notes,
    )


def best(law: LawFit, budget: Budget, question_tokens: Number, answer_tokens: Number = 20, **how: Any) -> list[Choice]:
    """The choices of `plan` for single requests without a chip. `how` are keywords of `plan`."""
    return plan(law, budget, Request(question_tokens, answer_tokens), **how).choices


def _tie_breaker(priced: Priced, request: Request, mode: str) -> Floats:
    """Cost by which equal errors are ordered: the paper's FLOPs, then full FLOPs; or seconds; or FLOPs."""
    flops = priced.each("total_flops")
    if mode == "paper":
        return paper_flops(priced, request) * (1 + 1e-9 * flops / flops.max())
    return flops if request.on is None else priced.each("secs")


def _infeasible(priced: Priced, budget: Budget, request: Request, mode: str) -> str:
    """The message for a budget that no candidate meets, with the least that one would."""
    fits = _fits(priced, request, mode)
    if request.on is not None and not fits.any():
        need, chips = priced.each("memory_bytes").min() / 1e9, f"{request.chips} {request.on.name} chip(s)"
        return f"nothing fits into {chips}: the smallest model needs {need:.3g} GB (add --chips)"
    charge, limit = _charge(priced, budget, request, mode)
    least = np.where(fits, charge, np.inf).min() * budget.amount / limit
    return f"nothing meets {budget.kind}={budget.amount:g}; the least is {least:.3g} (raise the budget)"


def choices(
    family: FamilyFit, priced: Priced, order: Sequence[int], request: Request, offsets: Offsets, binds: str = ""
) -> list[Choice]:
    """The candidates of these indices as choices; `binds` names the limit unless it is compute or memory time."""
    if not order:
        return []
    draws = family.predict_draws(*law_arguments([priced.of[i] for i in order])) + priced.shift[list(order)]
    low, high = np.clip(np.quantile(draws, (0.025, 0.975), axis=0), 0, 1)
    wins = 0.5 + np.sign(draws[:, 1:] - draws[:, :-1]).mean(axis=0) / 2  # a tie is half a win
    out = []
    for rank, i in enumerate(order):
        one, price = priced.of[i], priced.prices[i]
        model, beyond, timed = one.model, _extrapolations(family, one), bool(price.times)
        out.append(Choice(
            model.encoder.name, model.decoder.name, one.params, model.compressor.name, one.tokens,
            predicted_error=float(priced.error[i]), low=float(low[rank]), high=float(high[rank]),
            flops=price.total_flops, flops_by_part=price.flops,
            latency_ms=price.secs * 1e3 if timed else None,
            latency_ms_by_part={part: time.secs * 1e3 for part, time in price.times.items()} if timed else None,
            cache_bytes=float(price.cache_bytes), memory_bytes=float(price.memory_bytes),
            binds=binds or (bound(price) if timed else "budget"),
            beats_next=float(wins[rank]) if rank < len(wins) else None,
            extrapolates=tuple(beyond), warnings=_warnings(model, price, beyond, request, offsets), model=model,
        ))  # fmt: skip
    return out


def bound(price: Price) -> str:
    """The resource, compute or memory, that limits most of the time."""
    by_compute = sum(time.secs for time in price.times.values() if time.binds == "compute")
    return "compute" if 2 * by_compute >= price.secs else "memory"


def _extrapolations(family: FamilyFit, one: Candidate) -> dict[str, str]:
    """Descriptions of what the law's rows do not cover of a candidate, by kind."""
    sizes, tokens, models = family.rows["sizes"], family.rows["tokens"], family.models
    kinds = {  # name, and names of what was measured
        "encoder": (one.model.encoder.name, {m.encoder.name for m in models}),
        "compressor": (one.model.compressor.name, {f"{m.compressor.name} behind {m.encoder.name}" for m in models}),
        "family": (one.model.decoder.name, {m.decoder.name for m in models}),
    }
    found = {}
    for kind in one.extrapolates:
        name, measured = kinds[kind]
        found[kind] = f"{name}, measured with {', '.join(sorted(measured)) or 'models that its rows do not name'}"
    if not sizes[0] <= one.params <= sizes[-1]:
        span = f"{params_label(sizes[0])} to {params_label(sizes[-1])}"
        found["params"] = f"N={params_label(one.params)}, fitted from {span}"
    if not tokens[0] <= one.tokens <= tokens[-1]:
        found["tokens"] = f"V={one.tokens}, fitted from {tokens[0]} to {tokens[-1]}"
    return found


def _warnings(
    model: ModelSpec, price: Price, beyond: Mapping[str, str], request: Request, offsets: Offsets
) -> list[str]:
    found = [f"extrapolates_{kind}: {text}" for kind, text in beyond.items()]
    if request.on is not None and price.memory_bytes > request.on.memory_bytes * request.chips:  # paper mode
        need = price.memory_bytes / 1e9
        found.append(f"does_not_fit: needs {need:.3g} GB, more than {request.chips} x {request.on.name} has")
    if offsets and (name := model.compressor.name) not in {key for key, _ in offsets}:
        found.append(f"compressor_without_offset: no measured offset of {name}")
    return found
