"""Prints laws and plans, and writes a plan as JSON."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from vlm_jax.core.specs import to_dict
from vlm_jax.scaling import frontier
from vlm_jax.scaling.budgets import Budget
from vlm_jax.scaling.fitted import FamilyFit, LawFit, p_value
from vlm_jax.scaling.frontier import Choice, Ranking
from vlm_jax.scaling.scores import params_label
from vlm_jax.sizing.cost import PARTS
from vlm_jax.sizing.roofline import Request


def console() -> Console:
    """A console for stdout, wide enough for the tables if it is a file. Text is printed as it is: names come from files
    and may look like markup.
    """
    plain = {"highlight": False, "markup": False, "emoji": False}
    out = Console(**plain)
    return out if out.is_terminal else Console(width=120, **plain)


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar on stderr for `total` stages; call the result at the start of each."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    screen = Console(stderr=True)
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("", total=total, completed=-1)
        yield lambda stage: bar.update(task, description=stage, advance=1)


def print_law(law: LawFit, console: Console) -> None:
    """Prints forms, their checks, ratio, verdict, prediction and warnings of every family."""
    for name, family in law.families.items():
        console.print(_forms(name, family))
        console.print(_checks(family))
        console.print(f"chosen: {family.selection}", style="dim")
        ratio, gap = family.ratio, family.difference
        console.print(
            f"multiplicative: alpha / beta = {_number(ratio['value'])} {_interval(ratio['low'], ratio['high'])},"
            f" alpha - beta = {_number(gap['value'])} {_interval(gap['low'], gap['high'])}"
        )
        noise, sizes = family.rows["noise"]["stdev"], family.rows["sizes"]
        if noise is not None:
            console.print(f"noise of one row, from replicates: {noise:.3g} (standard deviation)")
        console.print(family.verdict, style="bold" if family.fits else "bold red")
        if family.extrapolation:
            console.print(family.extrapolation)
        if family.predicts == "cells":
            console.print(_measured_frontier(family))
        else:
            far, parts = 2 * sizes[-1], []
            for v in (family.rows["tokens"][0], family.rows["tokens"][-1]):
                parts.append(f"V={v} {float(family.predict(far, v)):.4f} {_interval(*family.predict_interval(far, v))}")
            twice = f"at twice the largest size, N = {params_label(far)}"
            console.print(f"{twice}, {family.chosen} predicts {', '.join(parts)}")
        for warning in family.warnings:
            code, _, text = warning.partition(": ")
            console.print(Text.assemble((code, "yellow"), f": {text}"))
        console.print()


def _forms(name: str, family: FamilyFit) -> Table:
    cells, sizes = family.rows["cells"], len(family.rows["sizes"])
    title = f"{name}: {cells} rows, {sizes} sizes, {len(family.rows['tokens'])} V; chosen: {family.chosen}"
    columns = ("form", "A", "B", "C", "alpha", "beta", "D", "SSE", "AICc")
    table = _table(columns, ("form",), title=title, title_style="bold")
    for key, one in family.forms.items():
        params = [_number(one.params.get(p)) for p in ("A", "B", "C", "alpha", "beta", "D")]
        scores = [f"{one.sse:.2e}", "-" if one.aicc is None else f"{one.aicc:.1f}"]
        table.add_row(key, *params, *scores, style="bold green" if key == family.chosen else None)
    return table


def _checks(family: FamilyFit) -> Table:
    """Held-out errors, and the test of lack of fit."""
    columns = ("form", "error of a size left out", "of a V", "of a cell", "fits")
    table = _table(columns, ("form",))
    for key, one in family.forms.items():
        errors = [_number(each) for each in (one.loo_error, one.tokens_error, one.cv_error)]
        test = "-" if one.lack_of_fit.p is None else f"p {p_value(one.lack_of_fit.p)}"
        table.add_row(key, *errors, test, style="bold green" if key == family.chosen else None)
    return table


def _measured_frontier(family: FamilyFit, question: int = 50) -> Table:
    """The measured cells that no cheaper one beats, in the paper's cost."""
    title = f"frontier of measured cells, Q = {question}"
    table = _table(("N", "V", "error", "stderr", "TFLOPs"), (), title=title)
    cells = family.measured
    cost = 2e9 * np.array(cells.params) * (question + np.array(cells.tokens))
    for i in frontier.pareto(np.array(cells.error), cost):
        stderr = _number(cells.stderr[i] or None)
        table.add_row(
            params_label(cells.params[i]),
            str(cells.tokens[i]),
            f"{cells.error[i]:.4f}",
            stderr,
            f"{cost[i] / 1e12:.3g}",
        )
    return table


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}g}"


def _interval(low: float | None, high: float | None) -> str:
    return "(unbounded)" if low is None or high is None else f"[{low:.3g}, {high:.3g}]"


def plan_json(plan: Ranking, budget: Budget, request: Request, mode: str) -> str:
    """The plan as a JSON object: the fields of `Ranking`, with the whole `model` of each choice, and the request."""
    values = {
        "closed_form": plan.closed_form and plan.closed_form._asdict(),
        "choices": [_choice_values(choice) for choice in plan.choices],
        "by_mode": {name: choice and _choice_values(choice) for name, choice in plan.by_mode.items()},
        "extrapolated": plan.extrapolated and _choice_values(plan.extrapolated),
        "mode": mode,
        "budget": dataclasses.asdict(budget),
        "request": dataclasses.asdict(request) | {"on": request.on.name if request.on else None},
        "candidates": plan.candidates,
        "feasible": plan.feasible,
        "notes": plan.notes,
    }
    return json.dumps(values, indent=2, allow_nan=False) + "\n"


def _choice_values(choice: Choice) -> dict[str, Any]:
    return choice._asdict() | {"model": to_dict(choice.model)}


def print_plan(plan: Ranking, budget: Budget, request: Request, mode: str, console: Console) -> None:
    """Prints the ranking, the cost of each part, the best choice of both modes, warnings and notes."""
    limit = Text(f"{budget.kind} <= {budget.amount:g}", style="bold")
    terms = f", Q = {request.question_tokens:g} ({request.question}), {request.answer_tokens:g} answer tokens"
    terms += f", batch {request.batch}" + (f", {request.chips} x {request.on.name}" if request.on else "")
    counts = f"; {plan.feasible:,} of {plan.candidates:,} candidates are within it ({mode} mode)"
    console.print(limit + Text(terms + counts))
    console.print(_ranking(plan))
    console.print(_parts(plan, "GFLOPs a request", [c.flops_by_part for c in plan.choices], 1e-9))
    if plan.choices[0].latency_ms_by_part is not None:
        console.print(_parts(plan, "milliseconds a batch", [c.latency_ms_by_part or {} for c in plan.choices], 1.0))
    if form := plan.closed_form:
        billions = "" if form.llm_params_billion is None else f", N = {form.llm_params_billion:.3g} billion"
        console.print(f"closed form of the paper's cost 2 N (Q + V): V* = {form.visual_tokens:.3g}{billions}")
    console.print(
        "*: extrapolated; beats: share of bootstraps in which a choice errs less than the next; MB: cache of a request",
        style="dim",
    )
    for name, choice in plan.by_mode.items():
        console.print(f"{name:>5} cost chooses: {_describe(choice) if choice else 'nothing is within the budget'}")
    if plan.extrapolated:
        console.print(f"best extrapolated choice, ranked last: {_describe(plan.extrapolated)}")
    marks = [warning for choice in plan.choices for warning in choice.warnings]
    for warning in dict.fromkeys(marks):
        count = marks.count(warning)
        console.print(Text(warning, "yellow") + Text(f" ({count} choices)" if count > 1 else ""))
    for note in plan.notes:
        console.print(f"note: {note}", style="dim")


def _describe(choice: Choice) -> str:
    where = f"{choice.encoder} + {choice.compressor} V={choice.visual_tokens} -> {choice.llm}"
    return f"{where}, error {choice.predicted_error:.4f}, {choice.flops / 1e12:.3g} TFLOPs at full cost"


def _table(columns: Iterable[str], left: Iterable[str], **how: Any) -> Table:
    """An empty table with the `left` columns left-aligned."""
    table = Table(title_justify="left", box=None, padding=(0, 1), **how)
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", no_wrap=True)
    return table


def _ranking(plan: Ranking) -> Table:
    columns = ("", "llm", "V", "compressor", "encoder", "error", "95 %", "beats", "TFLOPs", "ms", "MB", "binds")
    table = _table(columns, ("llm", "compressor", "encoder", "binds"))
    for rank, c in enumerate(plan.choices, start=1):
        cells = [str(rank), _marked(c.llm, c, "family", "params"), _marked(str(c.visual_tokens), c, "tokens")]
        cells += [_marked(c.compressor, c, "compressor"), _marked(c.encoder, c, "encoder"), f"{c.predicted_error:.4f}"]
        cells += [f"[{c.low:.4f}, {c.high:.4f}]", "-" if c.beats_next is None else f"{c.beats_next:.0%}"]
        cells += [_amount(c.flops / 1e12), _amount(c.latency_ms or 0), _amount(c.cache_bytes / 1e6), c.binds]
        table.add_row(*cells, style="bold green" if rank == 1 else None)
    return table


def _marked(text: str, choice: Choice, *kinds: str) -> str:
    return text + "*" * bool(set(kinds) & set(choice.extrapolates))


def _amount(value: int | float) -> str:
    return "-" if value == 0 else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _parts(plan: Ranking, title: str, values: list[dict[str, float]], scale: float) -> Table:
    table = _table(("", "llm", "V", *PARTS, "total"), ("llm",), title=title)
    for rank, (c, parts) in enumerate(zip(plan.choices, values, strict=True), start=1):
        numbers = [parts[name] * scale for name in PARTS]
        table.add_row(str(rank), c.llm, str(c.visual_tokens), *map(_amount, (*numbers, sum(numbers))))
    return table
