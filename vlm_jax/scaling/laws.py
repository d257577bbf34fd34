"""Forms of the error law: functions of N (LLM parameters, in billions) and V (visual tokens).

All are linear in the coefficients A, B, C, D for given exponents alpha and beta, which `scaling.solve` relies on. Every
power law has three variants of its floor D: `multiplicative` has D >= 0, `multiplicative-free` any D, and
`multiplicative-fixed` a given D. The semi-log form has no floor, as its constant absorbs D.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vlm_jax.core.errors import unknown

Floats = NDArray[np.float64]
Numbers = Floats | int | float


def multiplicative(
    params: Numbers, tokens: Numbers, *, A: Numbers, alpha: Numbers, beta: Numbers, D: Numbers
) -> Numbers:
    """A N^-alpha V^-beta + D. Source: arXiv 2411.03312, its scaling law of inference-optimal VLMs."""
    return A * params**-alpha * tokens**-beta + D


def additive(
    params: Numbers, tokens: Numbers, *, A: Numbers, B: Numbers, alpha: Numbers, beta: Numbers, D: Numbers
) -> Numbers:
    """A N^-alpha + B V^-beta + D. Source: arXiv 2203.15556 (section 3.3), with visual tokens instead of data."""
    return A * params**-alpha + B * tokens**-beta + D


def interaction(
    params: Numbers, tokens: Numbers, *, A: Numbers, B: Numbers, C: Numbers, alpha: Numbers, beta: Numbers, D: Numbers
) -> Numbers:
    """A N^-alpha + B V^-beta + C N^-alpha V^-beta + D. Source: arXiv 2505.18855 (video), the additive law with a
    product term."""
    left, right = params**-alpha, tokens**-beta
    return A * left + B * right + C * left * right + D


def semilog(params: Numbers, tokens: Numbers, *, A: Numbers, alpha: Numbers, beta: Numbers) -> Numbers:
    """A - alpha ln N - beta ln V: the limit of the multiplicative form for D to -inf and vanishing exponents."""
    return A - alpha * np.log(params) - beta * np.log(tokens)


class Form(NamedTuple):
    """A form and its structure for the solver."""

    name: str
    function: Callable[..., Numbers]
    linear: tuple[str, ...]  # coefficients, in the order of `terms`, without D
    terms: tuple[tuple[int, int], ...]  # for each coefficient: whether it multiplies N^-alpha and V^-beta
    floor: str  # of D: "nonnegative", "free", "fixed", or "none" (semi-log)

    @property
    def params(self) -> tuple[str, ...]:
        """All parameters, fixed ones included."""
        return (*self.linear, "alpha", "beta") + (() if self.floor == "none" else ("D",))

    @property
    def free_params(self) -> int:
        """Number of fitted parameters."""
        return len(self.params) - (self.floor == "fixed")


_SHAPES = (
    ("multiplicative", multiplicative, ("A",), ((1, 1),)),
    ("additive", additive, ("A", "B"), ((1, 0), (0, 1))),
    ("interaction", interaction, ("A", "B", "C"), ((1, 0), (0, 1), (1, 1))),
)
_SUFFIX = {"nonnegative": "", "free": "-free", "fixed": "-fixed"}

FORMS: dict[str, Form] = {
    name + suffix: Form(name + suffix, function, linear, terms, floor)
    for name, function, linear, terms in _SHAPES
    for floor, suffix in _SUFFIX.items()
}
FORMS["semilog"] = Form("semilog", semilog, ("A",), (), "none")


def form(name: str) -> Form:
    """The form of that key. Raises `UserError` with a suggestion."""
    if name not in FORMS:
        raise unknown("form", name, FORMS)
    return FORMS[name]


def predict(name: str, values: Mapping[str, Numbers], params: Numbers, tokens: Numbers) -> Numbers:
    """Error at N = `params` (billions) and V = `tokens`, broadcast with `values`, such as bootstrap draws."""
    return form(name).function(np.asarray(params, float), np.asarray(tokens, float), **values)
