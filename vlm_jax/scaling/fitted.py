"""Results of a fit. `LawFit` holds the values of `law.json`:

    version     of this format
    unit        of N: "llm_params" parameters per unit; "params_are" non_embedding or nominal (`scaling.scores`)
    loss, seed, bootstraps, floor, source, weights
    families.<name>
        rows            cells, sizes, tokens (the fitted range), blind (error without an image, by N), noise, harness
        models          a `ModelSpec` for each measured encoder, compressor, projector, mask and language model, at the
                        least V of its rows; empty if the rows name none
        forms.<form>    params, sse, cost, aicc, loo_error, cv_error, largest_out, interval, draws
        chosen, selection, ratio, difference, d_profile, warnings

`loo_error` is the root mean square error on held-out sizes, `cv_error` on held-out cells; `largest_out` describes the
fit without the largest size. An interval is [low, high] at 95 %; null is unbounded. `draws` are bootstrap parameters of
the chosen and of the multiplicative form. `ratio` alpha / beta and `difference` alpha - beta are the multiplicative
form's (D >= 0); they determine the optimal V, and are identified where the exponents are not.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple, TypedDict

import numpy as np

from vlm_jax.core.errors import UserError, unknown
from vlm_jax.core.specs import ModelSpec
from vlm_jax.scaling import laws

VERSION = 2
BASIC = "multiplicative"

Interval = tuple[float | None, float | None]


def visual_side(model: ModelSpec) -> ModelSpec:
    """The model without V and the language model, in which the cells of a grid differ."""
    compressor = dataclasses.replace(model.compressor, tokens=0, text_width=0)
    return dataclasses.replace(model, compressor=compressor, decoder=None)


def distinct(models: Iterable[ModelSpec]) -> tuple[ModelSpec, ...]:
    """The first model of each visual side and language model."""
    found: dict[Any, ModelSpec] = {}
    for model in models:
        found.setdefault((visual_side(model), model.decoder), model)
    return tuple(found.values())


class Unit(TypedDict):
    """What N counts."""

    llm_params: float
    params_are: str


class Noise(TypedDict):
    """Of replicates; None without any."""

    replicates: int
    stdev: float | None
    lack_of_fit_p: float | None


class RowsSummary(TypedDict):
    """The rows of a family."""

    cells: int
    sizes: list[float]  # N in billions, ascending
    tokens: list[int]  # V, ascending
    lowest_error: float
    blind: dict[str, float]
    noise: Noise
    harness: list[str]


class Ratio(TypedDict):
    """alpha / beta of the multiplicative form; None is unbounded."""

    value: float | None
    low: float | None
    high: float | None
    low_cases: float | None
    high_cases: float | None
    form: str


class Difference(TypedDict):
    """alpha - beta of the multiplicative form."""

    value: float
    low: float
    high: float


class FormFit(NamedTuple):
    """Fit of one form to one family."""

    params: dict[str, float]
    sse: float
    cost: float  # minimised by the solver; equals `sse` unless the loss is "log"
    aicc: float | None
    loo_error: float | None
    cv_error: float | None
    largest_out: dict[str, Any] | None
    interval: dict[str, Interval]
    draws: dict[str, list[float]]


class FamilyFit(NamedTuple):
    """Fits of all forms to one family, and the chosen form."""

    rows: RowsSummary
    models: tuple[ModelSpec, ...]
    forms: dict[str, FormFit]
    chosen: str
    selection: str
    ratio: Ratio
    difference: Difference
    d_profile: list[dict[str, float]]
    warnings: list[str]

    def predict(self, params: laws.Numbers, tokens: laws.Numbers) -> laws.Numbers:
        """Error at N (billions) and V by the chosen form."""
        return laws.predict(self.chosen, self.forms[self.chosen].params, params, tokens)

    def predict_draws(self, params: laws.Numbers, tokens: laws.Numbers) -> laws.Numbers:
        """Errors under every bootstrap, with a leading axis of draws."""
        params, tokens = np.broadcast_arrays(np.asarray(params, float), np.asarray(tokens, float))
        shape = (-1,) + (1,) * params.ndim
        draws = {name: np.reshape(values, shape) for name, values in self.forms[self.chosen].draws.items()}
        return laws.predict(self.chosen, draws, params, tokens)

    def predict_interval(self, params: laws.Numbers, tokens: laws.Numbers) -> laws.Floats:
        """Low and high end of the error at 95 %, on the leading axis."""
        return np.quantile(self.predict_draws(params, tokens), (0.025, 0.975), axis=0)

    @property
    def measured_with(self) -> str:
        """The encoders and compressors of the rows, as text."""
        sides = sorted({f"{model.encoder.name} + {model.compressor.name}" for model in self.models})
        return ", ".join(sides) or "models that its rows do not name"


class LawFit(NamedTuple):
    """Fits of all families."""

    version: int
    unit: Unit
    loss: str
    seed: int
    bootstraps: int
    floor: str
    source: str
    families: dict[str, FamilyFit]
    weights: str = "equal"  # or "stderr": rows by their inverse variance

    def family(self, name: str | None) -> FamilyFit:
        """The family of that name; None gives the only one. Raises `UserError` if unknown or ambiguous."""
        if name is None:
            if len(self.families) == 1:
                return next(iter(self.families.values()))
            raise UserError(f"--family: expected one of {', '.join(self.families)}, got none")
        if name not in self.families:
            raise unknown("family", name, self.families)
        return self.families[name]
