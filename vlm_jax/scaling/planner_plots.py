"""Figures of plans: where the cost goes, and how the best choice depends on the chip; `planner_figures` draws all."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from vlm_jax.core.errors import UserError
from vlm_jax.scaling import budgets, catalogue, frontier
from vlm_jax.scaling.fitted import LawFit
from vlm_jax.scaling.latency import PARTS, Request
from vlm_jax.scaling.plots import (
    CONTRAST,
    FAINT,
    TOKEN_TICKS,
    cost_frontier,
    flops_unit,
    log_axis,
    optimal_tokens,
    save,
    styled,
)  # fmt: skip
from vlm_jax.scaling.table import Table
from vlm_jax.sizing import chips, zoo
from vlm_jax.sizing.cost import Number


@styled
def cost_shares(
    law: LawFit, family: str | None, request: Request, path: str | Path, encoder: str = "clip-l14-336",
    compressor: str = "tokenpacker", llms: Sequence[str] = ("qwen1.5-0.5b", "qwen1.5-1.8b", "qwen1.5-4b", "qwen1.5-7b"),
    tokens: Sequence[int] = (1, 16, 144, 576),
) -> Path:  # fmt: skip
    """Share of a request's FLOPs by part, for several LLMs and V, with one encoder and compressor."""
    sides = catalogue.sides((encoder,), (compressor,), tuple(tokens), ())
    grid = catalogue.build(sides, tuple(llms), request, law.unit["params_are"])
    figure = Figure(figsize=(9.4, 3.9), layout="constrained")
    panels = figure.subplots(1, len(llms), sharey=True)
    total = grid.total_flops
    unit, word = flops_unit(np.median(total))
    for n, (axes, llm) in enumerate(zip(panels, llms, strict=True)):
        bottom = np.zeros(len(sides))
        for part, colour in zip(PARTS, CONTRAST, strict=True):
            share = 100 * grid.flops[part][:, n] / total[:, n]
            if grid.flops[part].any():
                axes.bar(range(len(sides)), share, 0.72, bottom=bottom, color=colour, label=part)
            bottom += share
        for m in range(len(sides)):
            axes.text(m, 101, _short(total[m, n] / unit), ha="center", va="bottom", fontsize=8, color=FAINT)
        axes.set_xticks(range(len(sides)), [str(side.tokens) for side in sides])
        axes.set_title(llm)
        axes.set_xlabel("V")
        axes.set_ylim(0, 108)
        axes.grid(visible=False)
    panels[0].set_ylabel(f"share of FLOPs, %  ({word} above)")
    panels[-1].legend(bbox_to_anchor=(1.0, 1.0), loc="upper left")
    figure.suptitle(
        f"{encoder} + {compressor}, Q = {request.question_tokens:g}, {request.answer_tokens:g} answer tokens",
        x=0.01, ha="left", fontsize=9, color=FAINT,
    )  # fmt: skip
    return save(figure, path)


@styled
def flops_or_latency(
    law: LawFit, family: str | None, request: Request, path: str | Path, limits: Mapping[str, Any],
    latency_ms: Number = 500, batches: Sequence[int] = (1, 8, 32), names: Sequence[str] = tuple(chips.CHIPS),
) -> Path:  # fmt: skip
    """The best N and V within a time, per chip and batch: by FLOPs alone (time times peak), and by every part's
    roofline."""
    figure = Figure(figsize=(9.4, 5.4), layout="constrained")
    panels = figure.subplots(2, len(batches), sharex=True, sharey="row")
    seen: tuple[list[Number], list[Number]] = ([], [])
    for column, batch in enumerate(batches):
        for x, name in enumerate(names):
            asked = dataclasses.replace(request, batch=batch, on=chips.chip(name), chips=1)
            budget = budgets.Budget("latency_ms", latency_ms)
            flops = budgets.Budget("tflops", budgets.flops(budget, asked) / 1e12)
            found = [_best(law, each, asked, family, limits) for each in (flops, budget)]
            for row, field in enumerate(("llm_params_billion", "visual_tokens")):
                values = [getattr(choice, field) for choice in found if choice]
                seen[row].extend(values)
                panels[row, column].plot([x] * len(values), values, color="#cccccc", linewidth=2, zorder=1)
                for value, colour, marker, size in zip(values, CONTRAST, "os", (8, 5), strict=False):
                    panels[row, column].plot(x, value, marker, color=colour, markersize=size, zorder=2)
        panels[0, column].set_title(f"batch {batch}")
        panels[1, column].set_xticks(range(len(names)), names, rotation=60)
    for row, label, ticks in ((0, "LLM, billions", (0.5, 1, 2, 4, 8, 16, 32, 72)), (1, "visual tokens", TOKEN_TICKS)):
        panels[row, 0].set_yscale("log")
        panels[row, 0].set_ylabel(label)
        panels[row, 0].set_ylim(min(seen[row]) / 1.4, max(seen[row]) * 1.4)
        log_axis(panels[row, 0].yaxis, [t for t in ticks if min(seen[row]) / 1.4 <= t <= max(seen[row]) * 1.4])
    marks = [Line2D([], [], color=c, marker=m, linestyle="") for c, m in zip(CONTRAST, "os", strict=False)]
    figure.legend(marks, ["best by FLOPs", "best by latency"], loc="outside upper right", ncols=2)
    figure.suptitle(
        f"within {latency_ms:g} ms a batch, Q = {request.question_tokens:g}, {request.answer_tokens:g} answer tokens",
        x=0.01, ha="left", fontsize=9, color=FAINT,
    )  # fmt: skip
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
    rows: Table | None = None, progress: Callable[[str], None] | None = None,
) -> list[Path]:  # fmt: skip
    """All figures of a plan, into a folder: `cost_frontier-<family>.png`, `optimal_tokens.png`, `cost_shares.png`,
    `flops_or_latency.png`."""
    folder, progress = Path(folder), progress or (lambda stage: None)
    measured = law.family(family).rows
    llms = sorted((name for name in measured["llms"] if name in zoo.DECODERS), key=zoo.nominal_params)
    out = []
    for name in law.families:
        progress(f"cost_frontier, {name}")
        out.append(cost_frontier(law, rows, name, folder / f"cost_frontier-{name}.png"))
    progress("optimal_tokens")
    out.append(optimal_tokens(law, folder / "optimal_tokens.png"))
    progress("cost_shares")
    own: dict[str, Any] = {}
    if llms:
        encoders, _, compressors = catalogue.names(measured, (), (), ())
        own = {"encoder": encoders[0], "compressor": compressors[0], "llms": llms[-4:], "tokens": measured["tokens"]}
    out.append(cost_shares(law, family, request, folder / "cost_shares.png", **own))
    progress("flops_or_latency")
    if not llms or set(llms) - set(catalogue.STUDY):  # the study's own ladder is too small for any chip to matter
        out.append(flops_or_latency(law, family, request, folder / "flops_or_latency.png", limits))
    return out
