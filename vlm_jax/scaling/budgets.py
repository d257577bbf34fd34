"""Budgets of a request (FLOPs, latency, cache or dollars), and conversions between them."""

import math
from dataclasses import dataclass

from vlm_jax.core.errors import UserError, unknown
from vlm_jax.sizing.cost import Number
from vlm_jax.sizing.roofline import Request

BUDGETS = ("tflops", "latency_ms", "cache_mb", "usd_per_million_requests")


@dataclass(frozen=True)
class Budget:
    """One limit: latency of a batch, FLOPs or cache of a request, or dollars for chip-hours."""

    kind: str
    amount: Number
    usd_per_chip_hour: Number | None = None


def secs(budget: Budget, request: Request) -> float | None:
    """Seconds per batch for a budget of latency or dollars, else None."""
    if budget.kind == "latency_ms":
        return budget.amount / 1e3
    if budget.kind == "usd_per_million_requests" and budget.usd_per_chip_hour:
        chip_secs = budget.amount / 1e6 / (budget.usd_per_chip_hour / 3600)
        return chip_secs * request.batch / request.chips
    return None


def flops(budget: Budget, request: Request) -> float | None:
    """FLOPs per request if all time is spent computing, as in the paper's model; None for a cache."""
    if budget.kind == "tflops":
        return budget.amount * 1e12
    time = secs(budget, request)
    if time is None or request.on is None:
        return None
    return time * request.on.peak_flops * request.efficiency.compute * request.chips / request.batch


def check(budget: Budget, request: Request) -> None:
    """Raises `UserError` for an invalid or incomplete budget or request."""
    if budget.kind not in BUDGETS:
        raise unknown("budget", budget.kind, BUDGETS)
    if not budget.amount > 0 or not math.isfinite(budget.amount):
        raise UserError(f"budget: expected {budget.kind} above 0, got {budget.amount:g}")
    if budget.kind in ("latency_ms", "usd_per_million_requests") and request.on is None:
        raise UserError(f"budget {budget.kind}: expected a chip, got none (add --chip)")
    if budget.kind == "usd_per_million_requests" and not (budget.usd_per_chip_hour or 0) > 0:
        raise UserError("budget in dollars: expected a price above 0, got none (add --usd-per-chip-hour)")
    if budget.usd_per_chip_hour is not None and not 0 < budget.usd_per_chip_hour < math.inf:
        raise UserError(f"--usd-per-chip-hour: expected a price above 0, got {budget.usd_per_chip_hour:g}")
    for name, least in (("question_tokens", 0), ("answer_tokens", 0), ("batch", 1), ("chips", 1)):
        if not least <= getattr(request, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')}: expected {least} or more, got {getattr(request, name):g}")
