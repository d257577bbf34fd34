"""Results of a fit. `LawFit` holds the values of `law.json`:

    version     of this format
    unit        of N: "llm_params" parameters per unit; "params_are" non_embedding or nominal (`scaling.scores`)
    loss, seed, bootstraps, floor, source, weights
    families.<name>
        rows            cells, sizes, tokens (the fitted range), blind (error without an image, by N), noise, harness
        models          a `ModelSpec` for each measured encoder, compressor, projector, mask and language model, at the
                        least V of its rows; empty if the rows name none
        forms.<form>    params, sse, cost, aicc, loo_error, cv_error, largest_out, interval, draws, tokens_error,
                        lack_of_fit
        chosen, selection, ratio, difference, d_profile, warnings
        measured        params, tokens, error, stderr of every cell: its mean over rows; stderr 0 is unknown

`loo_error` is the root mean square error on held-out sizes, `tokens_error` on held-out V, `cv_error` on held-out cells;
`largest_out` describes the fit without the largest size: `covered` of its `cells` lie in the 95 % interval. An interval
is [low, high] at 95 %; null is unbounded. Intervals and `draws`, bootstrap parameters, are those of the chosen and of
the multiplicative form. `ratio` alpha / beta and `difference` alpha - beta are the multiplicative form's (D >= 0); they
determine the optimal V, and are identified where the exponents are not. `lack_of_fit` is a form's test against `noise`
(`scaling.lack_of_fit`). Where the chosen form fails it, the law predicts nothing but its measured cells.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple, NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray

from vlm_jax.core.errors import UserError, unknown
from vlm_jax.core.specs import ModelSpec
from vlm_jax.scaling import laws
from vlm_jax.scaling.scores import params_label

VERSION = 2
NOISES = ("nothing", "seeds", "images")
REJECTS = 0.01  # the level of a test of lack of fit
_DRAWS = 1000  # of measured cells
BASIC = "multiplicative"

Interval = tuple[float | None, float | None]


def p_value(p: float) -> str:
    """Behind a "p": "= 0.31", or "< 1e-06" for smaller ones."""
    return f"= {p:.2g}" if p >= 1e-6 else "< 1e-06"


def visual_side(model: ModelSpec) -> ModelSpec:
    """The model without V and the language model, in which the cells of a grid differ, and without what a compressor
    takes from the language model. Weights that serve several V are described as those of one."""
    compressor = dataclasses.replace(model.compressor, tokens=0, text_width=0, elastic=())
    if compressor.fusion_heads:
        compressor = dataclasses.replace(compressor, fusion_heads=0, mlp_width=0)
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


class LargestOut(TypedDict):
    """The fit without the largest size, and how well it predicts that size."""

    llm_params_billion: float
    mean_relative_error: float
    max_relative_error: float
    relative_error_of_mean: float
    params: dict[str, float]
    covered: NotRequired[int]  # cells of that size in the 95 % interval; of forms with intervals
    cells: NotRequired[int]  # all cells of that size
    extrapolates: NotRequired[bool]  # False: chance does not leave so many out


class LackOfFit(NamedTuple):
    """The test of one form against the noise of the rows (`scaling.lack_of_fit`)."""

    noise: str = "nothing"  # of NOISES: what it was compared with
    p: float | None = None  # None: not tested
    misfit: float | None = None  # standard deviation of cells around the law beyond noise

    @property
    def untested(self) -> str:
        """Why there is no p."""
        return (
            "rows have no replicates and no standard errors" if self.noise == "nothing" else "there are too few cells"
        )

    @property
    def rejects(self) -> bool:
        """Whether the form misses the rows by more than their noise."""
        return self.p is not None and self.p < REJECTS


class Measured(NamedTuple):
    """Cells as columns, ascending in N and V."""

    params: list[float]  # N in billions
    tokens: list[int]
    error: list[float]  # mean over rows
    stderr: list[float]  # of the mean; 0: unknown

    def index(self, params: laws.Numbers, tokens: laws.Numbers) -> NDArray[np.intp]:
        """The cell of each N and V; -1 where none was measured."""
        n, v = np.broadcast_arrays(np.asarray(params, float)[..., None], np.asarray(tokens, float)[..., None])
        same = np.isclose(n, self.params, rtol=1e-6, atol=0) & (v == self.tokens)
        return np.where(same.any(-1), same.argmax(-1), -1)


class FormFit(NamedTuple):
    """Fit of one form to one family."""

    params: dict[str, float]
    sse: float
    cost: float  # minimised by the solver; equals `sse` unless the loss is "log"
    aicc: float | None
    loo_error: float | None
    cv_error: float | None
    largest_out: LargestOut | None
    interval: dict[str, Interval]
    draws: dict[str, list[float]]
    tokens_error: float | None = None
    lack_of_fit: LackOfFit = LackOfFit()


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
    measured: Measured = Measured([], [], [], [])

    @property
    def lack_of_fit(self) -> LackOfFit:
        """The test of the chosen form. Older files have its p among `rows`."""
        test, older = self.forms[self.chosen].lack_of_fit, self.rows["noise"]["lack_of_fit_p"]
        return test if test.p is not None or older is None else LackOfFit("seeds", older)

    @property
    def fits(self) -> bool:
        """Whether the chosen form passes its test, or cannot be tested."""
        return not self.lack_of_fit.rejects

    @property
    def predicts(self) -> str:
        """What `predict` gives: "law", or "cells" where the chosen form does not fit: the measured ones alone."""
        return "law" if self.fits or not self.measured.error else "cells"

    def predict(self, params: laws.Numbers, tokens: laws.Numbers) -> laws.Numbers:
        """Error at N (billions) and V by the chosen form; where it does not fit, as measured there, or nan."""
        if self.predicts == "law":
            return laws.predict(self.chosen, self.forms[self.chosen].params, params, tokens)
        index = self.measured.index(params, tokens)
        return np.where(index < 0, np.nan, np.array(self.measured.error)[index])

    def predict_draws(self, params: laws.Numbers, tokens: laws.Numbers) -> laws.Numbers:
        """Errors under every bootstrap, with a leading axis of draws; of measured cells, drawn with their standard
        errors."""
        if self.predicts == "cells":
            index, noise = self.measured.index(params, tokens), np.random.default_rng(0)
            error, stderr = np.array(self.measured.error), np.array(self.measured.stderr)
            drawn = error + stderr * noise.standard_normal((_DRAWS, len(error)))
            return np.where(index < 0, np.nan, drawn[:, index])
        params, tokens = np.broadcast_arrays(np.asarray(params, float), np.asarray(tokens, float))
        shape = (-1,) + (1,) * params.ndim
        draws = {name: np.reshape(values, shape) for name, values in self.forms[self.chosen].draws.items()}
        return laws.predict(self.chosen, draws, params, tokens)

    def predict_interval(self, params: laws.Numbers, tokens: laws.Numbers) -> laws.Floats:
        """Low and high end of the error at 95 %, on the leading axis."""
        return np.quantile(self.predict_draws(params, tokens), (0.025, 0.975), axis=0)

    @property
    def verdict(self) -> str:
        """Whether the law fits, as a sentence."""
        one = self.lack_of_fit
        if one.p is None:
            return f"whether {self.chosen} fits cannot be tested: {one.untested}"
        against = f"p {p_value(one.p)} against the noise of {one.noise}"
        if not one.rejects:
            return f"{self.chosen} fits ({against})"
        tried = [key for key, form in self.forms.items() if laws.form(key).floor != "free"]
        which = "no form fits" if all(self.forms[key].lack_of_fit.rejects for key in tried) else "the form does not fit"
        return f"{which}: {self.chosen} misses cells by {one.misfit or 0:.2g} beyond noise ({against})"

    @property
    def extrapolation(self) -> str:
        """Whether the law predicts its largest size from the others, as a sentence; "" if it was not tried."""
        out = self.forms[self.chosen].largest_out or {}
        if not {"covered", "cells", "extrapolates"} <= set(out) or (out["extrapolates"] and not self.fits):
            return ""
        size = params_label(out["llm_params_billion"])
        text = (
            f"fitted without N = {size}, the 95 % interval of {self.chosen} covers {out['covered']} of {out['cells']}"
        )
        return f"{text} cells of that size" + ("" if out["extrapolates"] else ": it does not extrapolate")

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
