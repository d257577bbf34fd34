"""Numbers as values of flags, within a range: `parser.add_argument("--pairs", type=whole(1))`."""

import argparse
import math
from collections.abc import Callable
from typing import TypeVar

_Value = TypeVar("_Value", int, float)


def whole(low: int, high: float = math.inf) -> Callable[[str], int]:
    """Reads whole numbers from `low` to `high`."""
    return lambda text: _number(text, int, "a whole number", low, high)


def real(low: float, high: float = math.inf) -> Callable[[str], float]:
    """Reads finite numbers from `low` to `high`."""
    return lambda text: _number(text, float, "a number", low, high)


def _number(text: str, kind: Callable[[str], _Value], what: str, low: float, high: float) -> _Value:
    bounds = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
    wrong = argparse.ArgumentTypeError(f"expected {what} {bounds}, got {text[:40]!r}")
    try:
        value = kind(text)
    except ValueError:
        raise wrong from None
    if not low <= value <= high or value == math.inf:
        raise wrong
    return value
