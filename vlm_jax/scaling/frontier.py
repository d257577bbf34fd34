"""From a law and a budget to a ranked list: this LLM, this many tokens, this compressor.

Two modes. "paper" charges what arXiv 2411.03312 charges, 2 N (Q + V), whatever encoder and compressor do. "full"
charges every part with its real cost. The law speaks of N and V only, so it says nothing of an encoder, a compressor or
a family of language models that its rows were not measured with: such candidates, there only where they are asked for,
stand behind every measured one. Of those that the law cannot tell apart, at one N and V, the cheapest is listed.

Closed form of the paper's problem: minimise the law at fixed N (Q + V). Along the budget d ln N = -dV / (Q + V), and
for the multiplicative and the semi-log law alike the error falls with alpha ln N + beta ln V, whose derivative
vanishes at

    V* = Q beta / (alpha - beta)      where alpha > beta > 0

free of the budget, of A, of D, and of any fixed cost per image that leaves N (Q + V) alone. Where beta >= alpha more
tokens always pay; where beta <= 0 they never do.
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
from vlm_jax.scaling.candidates import Candidate, Price
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
    extrapolates: tuple[str, ...]  # of "encoder", "compressor", "family", "params", "tokens"
    warnings: list[str]
    model: ModelSpec


class ClosedForm(NamedTuple):
    """The paper's continuous optimum."""

    visual_tokens: float  # clipped to the allowed V
    llm_params_billion: float | None  # None where the budget does not say how many FLOPs may be spent
    unclipped_tokens: float | None  # None where more tokens always pay
    nearest_tokens: int  # the allowed V next to it


class Ranking(NamedTuple):
    """What a plan found."""

    closed_form: ClosedForm
    choices: list[Choice]
    by_mode: dict[str, Choice | None]  # the best of each mode, side by side
    extrapolated: Choice | None  # the best of those whose encoder, compressor or family was not measured
    candidates: int
    feasible: int
    notes: list[str]


class Priced(NamedTuple):
    """Candidates, with what each costs and errs."""

    of: list[Candidate]
    prices: list[Price]
    shift: Floats  # [n] measured offsets of the compressors
    error: Floats  # [n] predicted, offsets included

    def each(self, field: str) -> Floats:
        """[n] of that field of the prices."""
        return np.array([getattr(price, field) for price in self.prices], float)


def optimal_tokens(question_tokens: Number, alpha: Number, beta: Number) -> float:
    """V* = Q beta / (alpha - beta); infinite where beta >= alpha, 0 where beta <= 0 < alpha."""
    if beta >= alpha:
        return math.inf
    return max(float(question_tokens * beta / (alpha - beta)), 0.0)


def closed_form(family: FamilyFit, budget: Budget, request: Request, allowed: Sequence[int]) -> ClosedForm:
    """The continuous optimum of the multiplicative law, clipped to the allowed V; a cached question counts as Q = 0."""
    params = family.forms[BASIC].params
    question = _charged_question(request)
    free = optimal_tokens(question, params["alpha"], params["beta"])
    tokens = min(max(free, allowed[0]), allowed[-1])
    flops = budgets.flops(budget, request)
    billions = None if flops is None else flops / (2 * (question + tokens)) / 1e9
    nearest = min(allowed, key=lambda v: abs(math.log(v / tokens)))
    return ClosedForm(tokens, billions, None if math.isinf(free) else free, nearest)


def _charged_question(request: Request) -> Number:
    return 0.0 if request.question == "cached" else request.question_tokens


def price_all(family: FamilyFit, of: list[Candidate], request: Request, offsets: Offsets = NO_OFFSETS) -> Priced:
    """Prices, and errors between 0 and 1 by the chosen form, with the measured offset of the compressor where there is
    one."""
    if request.question not in ("fresh", "cached"):
        raise unknown("question", request.question, ("fresh", "cached"))
    shift = np.array([offsets.get((one.model.compressor.name, one.tokens), 0.0) for one in of])
    error = family.predict(*_law_arguments(of)) + shift
    return Priced(of, [candidates.price(one.model, request) for one in of], shift, np.clip(error, 0, 1))


def _law_arguments(of: Sequence[Candidate]) -> tuple[Floats, Floats]:
    """N and V, [n]."""
    params, tokens = (np.array([getattr(one, name) for one in of], float) for name in ("params", "tokens"))
    return params, tokens


def interval(family: FamilyFit, priced: Priced, order: Sequence[int]) -> tuple[Floats, Floats, Floats]:
    """Of the candidates in that order: the low and the high end of the error at 95 %, and of each but the last the
    share of bootstraps in which it errs less than the next."""
    draws = family.predict_draws(*_law_arguments([priced.of[i] for i in order])) + priced.shift[order]
    low, high = np.clip(np.quantile(draws, (0.025, 0.975), axis=0), 0, 1)
    return low, high, 0.5 + np.sign(draws[:, 1:] - draws[:, :-1]).mean(axis=0) / 2  # a tie is half a win


def paper_flops(priced: Priced, request: Request) -> Floats:
    """2 N (Q + V), [n], with the law's N; a cached question is not charged."""
    question = _charged_question(request)
    return np.array([2e9 * one.params * (question + one.tokens) for one in priced.of])


def affordable(priced: Priced, budget: Budget, request: Request, mode: str) -> Bools:
    """Which candidates the budget and, in full mode, the chips' memory allow, [n]."""
    if mode == "paper":
        limit = budgets.flops(budget, request)
        if limit is None:
            return priced.each("cache_bytes") <= budget.amount * 1e6
        return paper_flops(priced, request) <= limit
    fits = _fits(priced, request)
    if budget.kind == "tflops":
        return fits & (priced.each("total_flops") <= budget.amount * 1e12)
    if budget.kind == "cache_mb":
        return fits & (priced.each("cache_bytes") <= budget.amount * 1e6)
    return fits & (priced.each("secs") <= budgets.secs(budget, request))


def _fits(priced: Priced, request: Request) -> Bools:
    limit = math.inf if request.on is None else request.on.memory_bytes * request.chips
    return priced.each("memory_bytes") <= limit


def ranked(priced: Priced, charge: Floats, allowed: Bools) -> list[int]:
    """Indices of the allowed candidates: measured ones first, then those that extrapolate encoder, compressor or
    family; among them the least error first, and then the least charge. One of each (LLM, V, error)."""
    beyond = np.array([bool(one.extrapolates) for one in priced.of])
    best: dict[tuple[Any, ...], int] = {}
    for i in np.lexsort((charge, priced.error, beyond)):
        if allowed[i]:
            one = priced.of[i]
            best.setdefault((one.model.decoder.name, one.tokens, float(priced.error[i]), beyond[i]), int(i))
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
    encoders: candidates.NameFilter = (),
    llms: candidates.NameFilter = (),
    compressors: candidates.NameFilter = (),
    tokens: Sequence[int] = (),
    offsets: Offsets = NO_OFFSETS,
    top: int = 12,
) -> Ranking:
    """Ranks what the law was measured with, or what the arguments name (`candidates.candidates`).

    Raises `UserError` for unknown names and for a budget that nothing meets.
    """
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    budgets.check(budget, request)
    fitted = law.family(family)
    found = candidates.candidates(fitted, law.unit["params_are"], encoders, llms, compressors, tokens)
    priced = price_all(fitted, [_vouched(one, offsets) for one in found], request, offsets)
    order, allowed = {}, {}
    for each in MODES:
        allowed[each] = affordable(priced, budget, request, each)
        order[each] = ranked(priced, _charge(priced, request, each), allowed[each])
    if not order[mode]:
        raise UserError(_nothing(priced, budget, request, mode))

    def choices(of: list[int]) -> list[Choice]:
        return _choices(fitted, priced, of, budget, request, offsets)

    beyond = [i for i in order[mode] if priced.of[i].extrapolates]
    return Ranking(
        closed_form(fitted, budget, request, sorted({one.tokens for one in found})),
        choices(order[mode][: top + 1])[:top],
        {each: next(iter(choices(order[each][:2])), None) for each in MODES},
        next(iter(choices(beyond[:2])), None),
        len(found),
        int(allowed[mode].sum()),
        _notes(fitted, offsets),
    )


def best(law: LawFit, budget: Budget, question_tokens: Number, answer_tokens: Number = 20, **how: Any) -> list[Choice]:
    """The ranked choices alone: `plan` for one request at a time, without a chip. `how` are keywords of `plan`."""
    return plan(law, budget, Request(question_tokens, answer_tokens), **how).choices


def _vouched(one: Candidate, offsets: Offsets) -> Candidate:
    """A compressor with a measured offset at this V is no extrapolation."""
    if (one.model.compressor.name, one.tokens) not in offsets:
        return one
    return one._replace(extrapolates=tuple(kind for kind in one.extrapolates if kind != "compressor"))


def _charge(priced: Priced, request: Request, mode: str) -> Floats:
    """What a candidate costs: the paper's FLOPs, then real ones to break ties; or seconds, or FLOPs."""
    flops = priced.each("total_flops")
    if mode == "paper":
        return paper_flops(priced, request) * (1 + 1e-9 * flops / flops.max())
    return flops if request.on is None else priced.each("secs")


def _nothing(priced: Priced, budget: Budget, request: Request, mode: str) -> str:
    """The message for a budget that nothing meets, with the least that would do."""
    fits = _fits(priced, request)
    if mode == "full" and not fits.any():
        need = priced.each("memory_bytes").min() / 1e9
        have = f"{request.chips} {request.on.name} chip(s)"
        return f"nothing fits into {have}: the smallest needs {need:.3g} GB; add --chips"
    if budget.kind == "cache_mb":
        return f"nothing meets cache_mb={budget.amount:g}; the least is {priced.each('cache_bytes').min() / 1e6:.3g}"
    if mode == "paper" or budget.kind == "tflops":
        flops = paper_flops(priced, request) if mode == "paper" else priced.each("total_flops")
        return f"nothing meets {budget.kind}={budget.amount:g}; the least is {flops.min() / 1e12:.3g} TFLOPs"
    least = np.where(fits, priced.each("secs"), np.inf).min()
    scale = budget.amount / budgets.secs(budget, request)
    return f"nothing meets {budget.kind}={budget.amount:g}; the least is {least * scale:.3g}"


def _choices(
    family: FamilyFit, priced: Priced, order: list[int], budget: Budget, request: Request, offsets: Offsets
) -> list[Choice]:
    if not order:
        return []
    low, high, wins = interval(family, priced, order)
    out = []
    for rank, i in enumerate(order):
        one, price = priced.of[i], priced.prices[i]
        model, beyond = one.model, extrapolations(family, one)
        out.append(
            Choice(
                encoder=model.encoder.name,
                llm=model.decoder.name,
                llm_params_billion=one.params,
                compressor=model.compressor.name,
                visual_tokens=one.tokens,
                predicted_error=float(priced.error[i]),
                low=float(low[rank]),
                high=float(high[rank]),
                flops=price.total_flops,
                flops_by_part=price.flops,
                latency_ms=price.secs * 1e3 if price.times else None,
                latency_ms_by_part={part: t.secs * 1e3 for part, t in price.times.items()} if price.times else None,
                cache_bytes=float(price.cache_bytes),
                memory_bytes=float(price.memory_bytes),
                binds="memory" if budget.kind == "cache_mb" else limit_of(price) if price.times else "budget",
                beats_next=float(wins[rank]) if rank < len(wins) else None,
                extrapolates=tuple(beyond),
                warnings=_warnings(model, price, beyond, request, offsets),
                model=model,
            )
        )
    return out


def limit_of(price: Price) -> str:
    """What limits the time, compute or memory traffic, by where most of it goes."""
    by_compute = sum(time.secs for time in price.times.values() if time.binds == "compute")
    return "compute" if 2 * by_compute >= price.secs else "memory"


def extrapolations(family: FamilyFit, one: Candidate) -> dict[str, str]:
    """What of a candidate lies outside the law's rows, each with a sentence."""
    sizes, tokens, models = family.rows["sizes"], family.rows["tokens"], family.models
    names = {"encoder": one.model.encoder.name, "compressor": one.model.compressor.name}
    names["family"] = one.model.decoder.name
    measured = {
        "encoder": {model.encoder.name for model in models},
        "compressor": {f"{model.compressor.name} behind {model.encoder.name}" for model in models},
        "family": {model.decoder.name for model in models},
    }
    found = {
        kind: f"{names[kind]}, measured with {', '.join(sorted(measured[kind])) or 'what its rows do not say'}"
        for kind in one.extrapolates
    }
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
    # The paper's cost knows no memory; the full one has left these out already.
    if request.on is not None and price.memory_bytes > request.on.memory_bytes * request.chips:
        need = price.memory_bytes / 1e9
        found.append(f"does_not_fit: needs {need:.3g} GB, more than {request.chips} x {request.on.name} has")
    if offsets and (name := model.compressor.name) not in {key for key, _ in offsets}:
        found.append(f"compressor_without_offset: no measured offset of {name}")
    return found


def _notes(family: FamilyFit, offsets: Offsets) -> list[str]:
    """What holds for every line of the ranking."""
    sides = sorted({f"{model.encoder.name} + {model.compressor.name}" for model in family.models})
    notes = [
        f"the law ({family.chosen}) knows N and V only; it was measured with "
        f"{', '.join(sides) or 'models that its rows do not name'}"
    ]
    if offsets:
        notes.append("compressor offsets are benchmark differences of one published LLM, carried over to all sizes")
    return notes
