"""Figures of plans: FLOPs by part, and the best choice by chip; `planner_figures` draws all."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from vlm_jax.core.errors import UserError
from vlm_jax.core.text import slug, to_label
from vlm_jax.scaling import budgets, candidates, frontier, plots
from vlm_jax.scaling.candidates import names_of
from vlm_jax.scaling.fitted import LawFit, visual_side
from vlm_jax.scaling.plots import CONTRAST, FAINT, TOKEN_TICKS, flops_unit, label_ends, log_axis, save, styled
from vlm_jax.scaling.scores import Scores
from vlm_jax.sizing import chips
from vlm_jax.sizing.cost import PARTS, Number
from vlm_jax.sizing.roofline import Request


@styled
def cost_shares(law: LawFit, family: str | None, request: Request, path: str | Path, limits: Mapping[str, Any]) -> Path:
    """Plots the FLOPs of a request by part, for up to four LLMs and a few V with the plan's first encoder and
    compressor; measured LLMs and V if the plan has any."""
    fitted = law.family(family)
    found = candidates.candidates(fitted, law.unit["params_are"], **names_of(limits))
    first = found[0].model
    found = [one for one in found if visual_side(one.model) == visual_side(first)]
    sizes = _measured({one.params: one.model.decoder.name for one in found}, fitted.rows["sizes"])[-4:]
    tokens = _measured({one.tokens: one.tokens for one in found}, fitted.rows["tokens"])
    tokens = tokens[:: -(-len(tokens) // 5)]
    cells = {(one.model.decoder.name, one.tokens): one.model for one in found}
    figure = Figure(figsize=(9.4, 3.9), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(sizes), sharey=True))
    flops = {key: candidates.price(cells[key], request).flops for key in cells if key[0] in sizes and key[1] in tokens}
    unit, unit_name = flops_unit(np.median([sum(parts.values()) for parts in flops.values()]))
    for axes, llm in zip(panels, sizes, strict=True):
        total = np.array([sum(flops[llm, v].values()) for v in tokens])
        bottom, ends = np.zeros(len(tokens)), []
        for part, colour in zip(PARTS, CONTRAST, strict=True):
            share = 100 * np.array([flops[llm, v][part] for v in tokens]) / total
            if share.any():
                axes.bar(range(len(tokens)), share, 0.72, bottom=bottom, color=colour)
                ends.append((bottom[-1] + share[-1] / 2, part, colour))
            bottom += share
        for x, value in enumerate(total):
            axes.text(x, 101, _short(value / unit), ha="center", va="bottom", fontsize=8, color=FAINT)
        axes.set_xticks(range(len(tokens)), map(str, tokens))
        axes.set(title=to_label(llm), xlabel="V", ylim=(0, 108))
        axes.grid(visible=False)
    panels[0].set_ylabel(f"share of FLOPs, %  ({unit_name} above)")
    label_ends(panels[-1], ends)
    _subtitle(figure, to_label(f"{first.encoder.name} + {first.compressor.name}"), request)
    return save(figure, path)


def _subtitle(figure: Figure, text: str, request: Request) -> None:
    text = f"{text}, Q = {request.question_tokens:g}, {request.answer_tokens:g} answer tokens"
    figure.suptitle(text, x=0.01, ha="left", fontsize=9, color=FAINT)


def _measured(found: Mapping[Number, Any], measured: Sequence[Number]) -> list[Any]:
    """Values of `found` at the measured keys, or all if there are none; ascending."""
    return [found[value] for value in sorted(set(found) & set(measured) or found)]


@styled
def flops_or_latency(
    law: LawFit, family: str | None, request: Request, path: str | Path, limits: Mapping[str, Any],
    latency_ms: Number = 500, batches: Sequence[int] = (1, 8, 32), names: Sequence[str] = tuple(chips.CHIPS),
) -> Path:  # fmt: skip
    """Plots the best N and V within a latency by chip and batch, by FLOPs (time times peak) and by roofline."""
    figure = Figure(figsize=(9.4, 5.4), layout="constrained")
    panels = figure.subplots(2, len(batches), sharex=True, sharey="row")
    drawn: tuple[list[Number], list[Number]] = ([], [])
    for column, batch in enumerate(batches):
        for x, name in enumerate(names):
            one = dataclasses.replace(request, batch=batch, on=chips.chip(name), chips=1)
            budget = budgets.Budget("latency_ms", latency_ms)
            flops = budgets.Budget("tflops", budgets.flops(budget, one) / 1e12)
            found = [_best(law, each, one, family, limits) for each in (flops, budget)]
            for row, field in enumerate(("llm_params_billion", "visual_tokens")):
                values = [getattr(choice, field) for choice in found if choice]
                drawn[row].extend(values)
                panels[row, column].plot([x] * len(values), values, color="#cccccc", linewidth=2, zorder=1)
                for value, colour, marker, size in zip(values, CONTRAST, "os", (8, 5), strict=False):
                    panels[row, column].plot(x, value, marker, color=colour, markersize=size, zorder=2)
        panels[0, column].set_title(f"batch {batch}")
        panels[1, column].set_xticks(range(len(names)), names, rotation=60)
    for row, label, ticks in ((0, "LLM, billions", (0.5, 1, 2, 4, 8, 16, 32, 72)), (1, "visual tokens", TOKEN_TICKS)):
        low, high = min(drawn[row]) / 1.4, max(drawn[row]) * 1.4
        panels[row, 0].set(yscale="log", ylabel=label, ylim=(low, high))
        log_axis(panels[row, 0].yaxis, [t for t in ticks if low <= t <= high])
    marks = [Line2D([], [], color=c, marker=m, linestyle="") for c, m in zip(CONTRAST, "os", strict=False)]
    figure.legend(marks, ["best by FLOPs", "best by latency"], loc="outside upper right", ncols=2)
    _subtitle(figure, f"within {latency_ms:g} ms a batch", request)
    return save(figure, path)


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _best(law: LawFit, budget: Any, request: Request, family: str | None, limits: Mapping[str, Any]) -> Any:
    try:
        return frontier.plan(law, budget, request, family=family, top=1, **limits).choices[0]
    except UserError:  # nothing fits on this chip
        return None


def planner_figures(
    folder: str | Path, law: LawFit, family: str | None, request: Request, limits: Mapping[str, Any],
    rows: Scores | None = None, progress: Callable[[str], None] | None = None,
) -> list[Path]:  # fmt: skip
    """Writes `cost_frontier-<family>.png`, `optimal_tokens.png`, `cost_shares.png` and `flops_or_latency.png`."""
    folder, progress = Path(folder), progress or (lambda stage: None)
    out = []
    for name in law.families:
        progress(f"cost_frontier, {name}")
        out.append(plots.cost_frontier(law, rows, name, folder / f"cost_frontier-{slug(name)}.png"))
    progress("optimal_tokens")
    if any(fitted.fits for fitted in law.families.values()):
        out.append(plots.optimal_tokens(law, folder / "optimal_tokens.png"))
    progress("cost_shares")
    out.append(cost_shares(law, family, request, folder / "cost_shares.png", limits))
    progress("flops_or_latency")
    if law.family(family).rows["sizes"][-1] > 0.01:  # billions: a smaller LLM is too small for any chip to matter
        out.append(flops_or_latency(law, family, request, folder / "flops_or_latency.png", limits))
    return out
