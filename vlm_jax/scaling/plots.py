"""Figures of laws. Each function writes one PNG and returns its path."""

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, hsv_to_rgb, rgb_to_hsv, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from vlm_jax.core.errors import UserError
from vlm_jax.core.files import atomic_write
from vlm_jax.core.reading import reason
from vlm_jax.core.rows import ResultRow
from vlm_jax.core.text import to_label
from vlm_jax.scaling import frontier, scores
from vlm_jax.scaling.fitted import BASIC, FamilyFit, LawFit
from vlm_jax.scaling.scores import Measurement, Scores, params_label
from vlm_jax.sizing.cost import Number

INK, FAINT = "#222222", "#8a8a8a"
RAMP = ("#a9cfe8", "#5ba3d0", "#2468a2", "#0b2a4f")  # light to dark with N or V
_RAMP = LinearSegmentedColormap.from_list("ramp", RAMP)
TOKEN_TICKS = (1, 4, 16, 64, 256, 576)
CONTRAST = ("#2468a2", "#d1603d", "#5b8c5a", "#8a5fa8", "#c29a2b")
STYLE = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": FAINT,
    "axes.labelcolor": INK, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "text.color": INK, "xtick.color": INK, "ytick.color": INK, "xtick.minor.size": 0, "ytick.minor.size": 0,
    "axes.grid": True, "grid.color": "#e9e9e9", "grid.linewidth": 0.8, "axes.axisbelow": True,
    "legend.frameon": False, "legend.fontsize": 9, "lines.linewidth": 1.8, "figure.dpi": 160,
}  # fmt: skip


def styled(draw: Callable[..., Path]) -> Callable[..., Path]:
    @functools.wraps(draw)
    def run(*args: Any, **kwargs: Any) -> Path:
        with matplotlib.rc_context(STYLE), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from font")  # of a name in another script
            return draw(*args, **kwargs)

    return run


def save(figure: Figure, path: str | Path) -> Path:
    """Writes the PNG, or nothing. Raises `UserError` where it cannot be written."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as new:
            figure.savefig(new, dpi=160, bbox_inches="tight", metadata={"Software": None})
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {reason(error)}") from error
    return path


def _shades(count: int) -> list[Any]:
    """`count` shades of the ramp, the darkest for the last."""
    return [_RAMP(x) for x in np.linspace(0, 1, count)]


def log_axis(axis: Any, ticks: Sequence[Number] | None = None, text: Callable[[float], str] = "{:g}".format) -> None:
    """Formats a logarithmic axis with plain numbers at the given ticks, or at decades."""
    if ticks is None:
        axis.set_major_locator(LogLocator(numticks=8))
    else:
        axis.set_ticks(list(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def label_ends(axes: Axes, ends: Sequence[tuple[float, str, Any]]) -> None:
    """Writes labels right of the axes at their heights, in the colours of their curves, apart from each other. The
    limits and scale of the axis must be final. `ends`: (value on the y axis, text, colour)."""
    height = axes.get_window_extent().height / axes.figure.dpi * 72  # points
    at = axes.transAxes.inverted().transform(axes.transData.transform([(axes.get_xlim()[1], y) for y, _, _ in ends]))
    order, gap = np.argsort(at[:, 1]), 12.0 / height
    y = np.clip(at[order, 1], 0, 1)
    for _ in range(len(y)):  # neighbours that are too near move apart by equal amounts
        for k in range(len(y) - 1):
            lack = gap - (y[k + 1] - y[k])
            if lack > 1e-9:
                y[k], y[k + 1] = y[k] - lack / 2, y[k + 1] + lack / 2
    for height_of_label, i in zip(y, order, strict=True):
        _, text, colour = ends[i]
        hue, saturation, value = rgb_to_hsv(to_rgb(colour))
        dark = hsv_to_rgb((hue, max(saturation, 0.4), min(value, 0.75)))  # a pale curve's label stays legible
        where = {"xycoords": "axes fraction", "xytext": (6, 0), "textcoords": "offset points"}
        axes.annotate(text, (1.0, height_of_label), **where, color=dark, fontsize=9, va="center", annotation_clip=False)


def claim(figure: Figure, families: Mapping[str, FamilyFit]) -> None:
    """Writes below a figure whether the laws that it shows, by label, fit and extrapolate."""
    lines = [
        f"{name}: {text}" if name else text
        for name, fitted in families.items()
        for text in (fitted.verdict, fitted.extrapolation)
        if text
    ]
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=8, color=FAINT)


def flops_unit(largest: Number) -> tuple[float, str]:
    """Scale and name of the unit for FLOPs of that size."""
    units = ((1e12, "TFLOPs"), (1e9, "GFLOPs"), (1e6, "MFLOPs"), (1e3, "kFLOPs"))
    return next((unit for unit in units if largest >= unit[0] / 2), units[-1])


@styled
def error_curves(
    rows: Iterable[ResultRow] | Scores, law: LawFit, family: str, path: str | Path, across: str = "tokens"
) -> Path:
    """Plots error against V for each N ("tokens") or against N for each V ("params"): means with 95 % bars, the law
    with its bands, the blind baseline."""
    cells, fitted = scores.of_rows(rows).of(family).cells, law.family(family)
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    _draw_errors(axes, cells, fitted, across)
    axes.set_title(to_label(family))
    claim(figure, {"": fitted})
    return save(figure, path)


error_by_params = functools.partial(error_curves, across="params")


def _draw_errors(axes: Axes, cells: Iterable[Measurement], fitted: FamilyFit, across: str) -> None:
    means = scores.cell_means(cells)
    x_of, line_of = (1, 0) if across == "tokens" else (0, 1)
    lines, xs = sorted({m[line_of] for m in means}), sorted({m[x_of] for m in means})
    fine = np.geomspace(xs[0], xs[-1], 120)
    ends = []
    for i, (value, colour) in enumerate(zip(lines, _shades(len(lines)), strict=True)):
        points = [m for m in means if m[line_of] == value]
        shift = 1.0
        if any(p[3] for p in points):  # error bars would cover each other
            shift = (xs[-1] / xs[0]) ** (0.006 * (i - (len(lines) - 1) / 2))
        cell = (value, fine) if across == "tokens" else (fine, value)
        last = float(fitted.predict(*(at[-1] if np.ndim(at) else at for at in cell)))
        label = f"N = {params_label(value)}" if across == "tokens" else f"V = {value}"
        ends.append((last if fitted.predicts == "law" else points[-1][2], label, colour))
        if fitted.predicts == "law":
            axes.fill_between(fine, *fitted.predict_interval(*cell), color=colour, alpha=0.18, linewidth=0)
            axes.plot(fine, fitted.predict(*cell), color=colour, linewidth=1.5)
        axes.errorbar(
            [p[x_of] * shift for p in points], [p[2] for p in points], yerr=[1.96 * p[3] for p in points],
            fmt="o", color=colour, markersize=4.5, elinewidth=1.2, capsize=0,
            linestyle="none" if fitted.predicts == "law" else ":", linewidth=1.0,
        )  # fmt: skip
    blind = scores.blind_errors(cells)
    if blind:
        level = float(np.mean(list(blind.values())))
        axes.axhline(level, color=FAINT, linewidth=1.2, linestyle=(0, (4, 3)))
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
        axes.text(xs[-1], level, "without the image", color=FAINT, fontsize=9, va="center", ha="right", bbox=box)
    axes.set_xscale("log")
    errors = [m[2] for m in means] + list(blind.values())
    if max(errors) > 4 * max(min(errors), 1e-9):
        axes.set_yscale("log")
        axes.set_ylim(bottom=max(min(errors), 1e-4) * 0.6)
        log_axis(
            axes.yaxis,
            [t for t in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1) if min(errors) * 0.7 <= t <= 1],
        )
    log_axis(axes.xaxis, xs, (lambda v: f"{v:g}") if across == "tokens" else params_label)
    axes.set_xlabel("visual tokens V" if across == "tokens" else "LLM parameters N")
    axes.set_ylabel("error")
    label_ends(axes, ends)


@styled
def cost_frontier(
    law: LawFit, rows: Scores | None, family: str, path: str | Path, questions: Sequence[Number] = (0, 50)
) -> Path:
    """Plots error against 2 N (Q + V) for each V, a panel per Q, with 95 % bands (arXiv 2411.03312, Figure 1).

    The red line is the least error at each cost within the measured sizes; dotted curves extrapolate. Where no form
    fits, only measured cells are drawn.
    """
    fitted = law.family(family)
    tokens, sizes = fitted.rows["tokens"], fitted.rows["sizes"]
    params = np.geomspace(sizes[0], 2 * sizes[-1], 160)
    unit, word = flops_unit(2e9 * sizes[-1] * (max(questions) + tokens[-1]))
    figure = Figure(figsize=(9.4, 4.1), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(questions), sharey=True))
    for axes, question in zip(panels, questions, strict=True):
        ends = []
        for value, colour in zip(tokens, _shades(len(tokens)), strict=True):
            scale = 2e9 * (question + value) / unit  # N is in billions
            dots = {"markersize": 4, "markeredgecolor": "white", "markeredgewidth": 0.5, "color": colour}
            if fitted.predicts == "cells":
                at = np.array(fitted.measured.tokens) == value
                cost, error = np.array(fitted.measured.params)[at] * scale, np.array(fitted.measured.error)[at]
                axes.plot(cost, error, "o", **dots, label=f"{value}")
                ends += list(zip(cost, error, strict=True))
                continue
            cost, inside, error = params * scale, params <= sizes[-1], fitted.predict(params, value)
            axes.fill_between(cost, *fitted.predict_interval(params, value), color=colour, alpha=0.2, linewidth=0)
            axes.plot(cost[inside], error[inside], color=colour, label=f"{value}")
            axes.plot(cost[~inside], error[~inside], color=colour, linestyle=(0, (1, 1.2)))
            ends += list(zip(cost[inside], error[inside], strict=True))
            if rows is not None:
                measured = [c for c in rows.of(family).cells if c.tokens == value]
                axes.plot([c.params * scale for c in measured], [c.error for c in measured], "o", **dots)
        cost, error = np.array(ends).T
        best = frontier.pareto(error, cost)
        line = {"color": CONTRAST[1], "linewidth": 1.2, "zorder": 5, "drawstyle": "steps-post"}
        axes.plot(cost[best], error[best], **line, label="least")
        axes.set_xscale("log")
        log_axis(axes.xaxis)
        axes.set_xlabel(f"{word} of the paper's cost, 2 N (Q + V)")
        axes.set_title(f"{to_label(family)}, Q = {question:g}")
    panels[0].set_ylabel("predicted error" if fitted.predicts == "law" else "measured error")
    panels[-1].legend(title="V", bbox_to_anchor=(1.0, 1.0), loc="upper left")
    claim(figure, {"": fitted})
    return save(figure, path)


@styled
def optimal_tokens(law: LawFit, path: str | Path, highest: Number = 1000) -> Path:
    """Plots V* = Q beta / (alpha - beta) against Q for every family that a law fits, with 95 % bands, clipped to the
    measured V."""
    question = np.geomspace(1, highest, 200)
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for (name, fitted), colour in zip(law.families.items(), CONTRAST, strict=False):
        if not fitted.fits:
            continue
        tokens, form = fitted.rows["tokens"], fitted.forms[BASIC]
        draws = zip(form.draws["alpha"], form.draws["beta"], strict=True)
        drawn = np.array([[frontier.optimal_tokens(1.0, alpha, beta)] for alpha, beta in draws]) * question
        value = frontier.optimal_tokens(1.0, form.params["alpha"], form.params["beta"]) * question
        clip = functools.partial(np.clip, a_min=tokens[0], a_max=tokens[-1])
        ends = clip(np.quantile(drawn, (0.025, 0.975), axis=0, method="nearest"))
        axes.fill_between(question, *ends, color=colour, alpha=0.2, linewidth=0)
        axes.plot(question, clip(value), color=colour, label=to_label(name))
        axes.text(question[-1] * 1.08, clip(value)[-1], to_label(name), color=colour, va="center", fontsize=10)
    axes.set_xscale("log")
    axes.set_yscale("log")
    log_axis(axes.xaxis, (1, 3, 10, 30, 100, 300, 1000))
    log_axis(axes.yaxis, TOKEN_TICKS)
    axes.set_xlabel("question tokens Q")
    axes.set_ylabel("best number of visual tokens V*")
    claim(figure, {to_label(name): one for name, one in law.families.items()})
    return save(figure, path)
