"""What may be spent on a request: FLOPs, time, cache or money, and how one follows from another."""

import math
from dataclasses import dataclass

from vlm_jax.core.errors import UserError, unknown
from vlm_jax.sizing.cost import Number
from vlm_jax.sizing.roofline import Request

BUDGETS = ("tflops", "latency_ms", "cache_mb", "usd_per_million_requests")


@dataclass(frozen=True)
class Budget:
    """One limit. Latency is that of a whole batch; a cache is one request's; dollars are spent on chip-hours."""

    kind: str
    amount: Number
    usd_per_chip_hour: Number | None = None


def secs(budget: Budget, request: Request) -> float | None:
    """Seconds a batch may take, for a budget of time or money."""
    if budget.kind == "latency_ms":
        return budget.amount / 1e3
    if budget.kind == "usd_per_million_requests" and budget.usd_per_chip_hour:
        chip_secs = budget.amount / 1e6 / (budget.usd_per_chip_hour / 3600)
        return chip_secs * request.batch / request.chips
    return None


def flops(budget: Budget, request: Request) -> float | None:
    """FLOPs a request may take in the paper's model: all of the time is spent computing. None for a cache."""
    if budget.kind == "tflops":
        return budget.amount * 1e12
    time = secs(budget, request)
    if time is None or request.on is None:
        return None
    return time * request.on.peak_flops * request.efficiency.compute * request.chips / request.batch


def check(budget: Budget, request: Request) -> None:
    """Raises `UserError` where the budget lacks what it needs."""
    if budget.kind not in BUDGETS:
        raise unknown("budget", budget.kind, BUDGETS)
    if not budget.amount > 0 or not math.isfinite(budget.amount):
        raise UserError(f"the budget {budget.kind}={budget.amount:g} must be above 0")
    if budget.kind in ("latency_ms", "usd_per_million_requests") and request.on is None:
        raise UserError(f"a budget in {budget.kind} needs a chip: add --chip")
    if budget.kind == "usd_per_million_requests" and not (budget.usd_per_chip_hour or 0) > 0:
        raise UserError("a budget in dollars needs a price: add --usd-per-chip-hour")
    for name, least in (("question_tokens", 0), ("answer_tokens", 0), ("batch", 1), ("chips", 1)):
        if not least <= getattr(request, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {getattr(request, name):g} must be {least} or more")
