"""What a fit found. `LawFit` is `law.json` as values. The format:

    version     of this format
    unit        what N counts: "llm_params" scalars make one N, and "params_are" non_embedding or nominal
                (`scaling.table`)
    loss, seed, bootstraps, floor, source
    families.<name>
        rows            cells, sizes, tokens (the fitted range), blind (error without an image, by N), noise, harness
        models          what the rows were measured with, where they say so: a `ModelSpec` for each encoder, compressor,
                        projector, mask and language model, at the least V of its rows
        forms.<form>    params, sse, cost, aicc, loo_error, cv_error, largest_out, interval, draws
        chosen, selection, ratio, difference, d_profile, warnings

`loo_error` is the root mean square error on a size left out, `cv_error` on a cell left out, `largest_out` tells of
the largest size. An interval is [low, high] at 95 %; null is unbounded. `draws` are bootstrap parameters, kept for
the chosen form and for the multiplicative one. `ratio` alpha / beta and `difference` alpha - beta are the
multiplicative form's (D >= 0); they decide how a budget is shared, and are identified where the exponents alone are
not.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from vlm_jax.core.errors import UserError, unknown
from vlm_jax.core.specs import ModelSpec
from vlm_jax.scaling import laws

VERSION = 2
BASIC = "multiplicative"

Interval = tuple[float | None, float | None]


def visual_side(model: ModelSpec) -> ModelSpec:
    """The model without what differs between the cells of one grid: V and the language model."""
    compressor = dataclasses.replace(model.compressor, tokens=0, text_width=0)
    return dataclasses.replace(model, compressor=compressor, decoder=None)


def distinct(models: Iterable[ModelSpec]) -> tuple[ModelSpec, ...]:
    """One model of each visual side and language model: the first."""
    found: dict[Any, ModelSpec] = {}
    for model in models:
        found.setdefault((visual_side(model), model.decoder), model)
    return tuple(found.values())


class FormFit(NamedTuple):
    """One form, fitted to one family."""

    params: dict[str, float]
    sse: float
    cost: float  # what the solver minimised: the same as `sse` unless the loss is "log"
    aicc: float | None
    loo_error: float | None
    cv_error: float | None
    largest_out: dict[str, Any] | None
    interval: dict[str, Interval]
    draws: dict[str, list[float]]


class FamilyFit(NamedTuple):
    """All forms for one family, and which to believe."""

    rows: dict[str, Any]
    models: tuple[ModelSpec, ...]
    forms: dict[str, FormFit]
    chosen: str
    selection: str
    ratio: dict[str, Any]
    difference: dict[str, float]
    d_profile: list[dict[str, float]]
    warnings: list[str]

    def predict(self, params: laws.Numbers, tokens: laws.Numbers) -> laws.Numbers:
        """Error at N (billions) and V by the chosen form."""
        return laws.predict(self.chosen, self.forms[self.chosen].params, params, tokens)

    def predict_draws(self, params: laws.Numbers, tokens: laws.Numbers) -> laws.Numbers:
        """The same under every bootstrap: a leading axis of draws."""
        params, tokens = np.broadcast_arrays(np.asarray(params, float), np.asarray(tokens, float))
        shape = (-1,) + (1,) * params.ndim
        draws = {name: np.reshape(values, shape) for name, values in self.forms[self.chosen].draws.items()}
        return laws.predict(self.chosen, draws, params, tokens)


class LawFit(NamedTuple):
    version: int
    unit: dict[str, Any]
    loss: str
    seed: int
    bootstraps: int
    floor: str
    source: str
    families: dict[str, FamilyFit]

    def family(self, name: str | None) -> FamilyFit:
        """That family, or the only one. Raises `UserError` where the name is unknown, or missing and needed."""
        if name is None and len(self.families) == 1:
            return next(iter(self.families.values()))
        if name is None:
            raise UserError(f"the law has several families; name one with --family: {', '.join(self.families)}")
        if name not in self.families:
            raise unknown("family", name, self.families)
        return self.families[name]
