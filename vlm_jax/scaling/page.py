"""The interactive page of a plan: one self-contained HTML file that needs no network.

It holds every candidate with its error and interval, and its cost by part for several question lengths, batches and
chips. The page's script (`page.js`, `page_figure.js`) charges them, leaves out what exceeds the budget and ranks the
rest as `frontier.plan` does: measured candidates first, then by error, then by cost.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.core.errors import UserError
from vlm_jax.core.files import write_text
from vlm_jax.core.reading import reason
from vlm_jax.core.text import printable, to_html
from vlm_jax.scaling import candidates, frontier
from vlm_jax.scaling.budgets import Budget
from vlm_jax.scaling.candidates import Candidate
from vlm_jax.scaling.fitted import FamilyFit, LawFit
from vlm_jax.scaling.frontier import Choice, Priced
from vlm_jax.scaling.scores import params_label
from vlm_jax.sizing import chips, roofline
from vlm_jax.sizing.chips import Chip
from vlm_jax.sizing.cost import PARTS
from vlm_jax.sizing.roofline import Request

QUESTIONS = (0, 50, 200, 1000)
BATCHES = (1, 8, 32)
_MANY = 300  # candidates, of which a page has the request's question length and batch only


def write(
    path: str | Path, law: LawFit, family: str | None, budget: Budget, request: Request, limits: Mapping[str, Any],
    top: int = 12,
) -> None:  # fmt: skip
    """Writes the page, which opens with this budget and request. `limits` are keywords of `frontier.plan`; `top` is the
    number of choices that its table lists at first. Raises `UserError` if the file cannot be written."""
    from plotly.offline import get_plotlyjs

    fitted, name = law.family(family), family or next(iter(law.families))
    data = page_data(law, family, budget, request, limits) | {"top": top}
    title = f"{name}: the best model within a budget"
    law_text = f"law: {fitted.chosen}" if fitted.predicts == "law" else "measured cells only"
    about = f"{law_text}; {request.answer_tokens:g} answer tokens, question {request.question}"
    parts = {
        "$TITLE": to_html(title), "$ABOUT": to_html(about), "$DOUBT": "ok" if fitted.fits else "doubt",
        "$NOTES": "".join(f"<li>{to_html(note)}</li>" for note in notes(fitted, limits.get("offsets", {}))),
        "$STYLE": _asset("page.css"), "$SCRIPT": _asset("page.js"), "$FIGURE": _asset("page_figure.js"),
        "$PLOTLY": get_plotlyjs(),
        "$DATA": json.dumps(data, allow_nan=False).replace("<", "\\u003c"),  # no tag ends or starts in a script
    }  # fmt: skip
    # All at once: a name may contain "$DATA".
    text = re.sub(rf"\$({'|'.join(key[1:] for key in parts)})\b", lambda match: parts[match[0]], _asset("page.html"))
    try:
        write_text(Path(path), text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {reason(error)}") from error


def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text()


def notes(fitted: FamilyFit, offsets: frontier.Offsets = frontier.NO_OFFSETS) -> list[str]:
    """What the numbers of the page rest on, as sentences; the first says whether the law fits."""
    sizes, tokens = fitted.rows["sizes"], fitted.rows["tokens"]
    span = f"N = {params_label(sizes[0])} to {params_label(sizes[-1])} and V = {tokens[0]} to {tokens[-1]}"
    found = [text for text in (fitted.verdict, fitted.extrapolation) if text]
    if fitted.predicts == "cells":
        found.append(f"errors are those of measured cells, with {fitted.measured_with}; nothing between is known")
    else:
        found.append(f"{fitted.chosen} predicts from N and V only, fitted from {span}, with {fitted.measured_with}")
    if offsets:
        found.append("compressor offsets are benchmark differences of one published LLM, applied to all sizes")
    return found


def page_data(
    law: LawFit, family: str | None, budget: Budget, request: Request, limits: Mapping[str, Any]
) -> dict[str, Any]:
    """The data of the page's script. Lists over candidates have one order; costs are in FLOPs, seconds and bytes, exact
    where they are compared, and to four digits by part."""
    fitted, offsets = law.family(family), limits.get("offsets", frontier.NO_OFFSETS)
    found = candidates.candidates(fitted, law.unit["params_are"], **candidates.names_of(limits))
    found = frontier.with_offsets(found, offsets)
    few = len(found) <= _MANY
    questions = sorted({*(QUESTIONS if few else ()), request.question_tokens})
    batches = sorted({*(BATCHES if few else ()), request.batch})
    hardware = chips.CHIPS | ({request.on.name: request.on} if request.on else {})
    priced = frontier.price_all(fitted, found, request, offsets)
    every = frontier.choices(fitted, priced, range(len(found)), request, offsets)
    at: dict[str, Any] = {}
    for question in questions:
        one = dataclasses.replace(request, question_tokens=question)
        at[f"{question:g}"] = _flops(frontier.price_all(fitted, found, dataclasses.replace(one, on=None)), one)
        for batch in batches:
            served = dataclasses.replace(one, batch=batch)
            at[f"{question:g}"][str(batch)] = _on_chips(found, served, hardware)
    return {
        "law": fitted.predicts == "law",
        "start": {
            "kind": budget.kind, "amount": budget.amount, "question": f"{request.question_tokens:g}",
            "batch": str(request.batch), "chip": request.on.name if request.on else "",
            "price": budget.usd_per_chip_hour,
        },
        "questions": [f"{q:g}" for q in questions], "batches": [str(b) for b in batches], "parts": PARTS,
        "chips": {
            name: {"memory": chip.memory_bytes * request.chips, "peak": chip.peak_flops * request.efficiency.compute}
            for name, chip in hardware.items()
        },
        "count": request.chips,
        "candidates": _columns(fitted, found, priced, every),
        "at": at,
    }  # fmt: skip


def _columns(
    fitted: FamilyFit, found: Sequence[Candidate], priced: Priced, every: Sequence[Choice]
) -> dict[str, Sequence[Any]]:
    """What does not depend on the request, a list for each column."""
    cells = fitted.measured
    known = np.full(len(found), -1)
    if cells.error:
        known = cells.index(*frontier.law_arguments(found))
    known = np.where([bool(choice.extrapolates) for choice in every], -1, known)
    outside = [
        "; ".join(text.partition(": ")[2] for text in choice.warnings if text.startswith("extrapolates_"))
        for choice in every
    ]
    return {
        "llm": [printable(choice.llm) for choice in every],
        "size": [params_label(choice.llm_params_billion) for choice in every],
        "n": _short([choice.llm_params_billion for choice in every]),
        "encoder": [printable(choice.encoder) for choice in every],
        "compressor": [printable(choice.compressor) for choice in every],
        "v": [choice.visual_tokens for choice in every],
        "error": [float(error) for error in priced.error],
        "low": _short([choice.low for choice in every]),
        "high": _short([choice.high for choice in every]),
        "measured": [None if i < 0 else float(f"{cells.error[i]:.4g}") for i in known],
        "basis": [
            "outside" if choice.extrapolates else "cell" if i >= 0 else "between"
            for i, choice in zip(known, every, strict=True)
        ],
        "outside": [printable(text) for text in outside],
        "last": [int(bool(one.extrapolates)) for one in found],  # ranks behind all measured ones
    }


def _flops(priced: Priced, request: Request) -> dict[str, Any]:
    """Costs that depend on the question's length alone."""
    return {
        "flops": priced.each("total_flops").tolist(),
        "flops_by_part": [_short([price.flops[part] for part in PARTS]) for price in priced.prices],
        "paper_flops": frontier.paper_flops(priced, request).tolist(),
        "cache": priced.each("cache_bytes").tolist(),
    }


def _on_chips(found: Sequence[Candidate], request: Request, hardware: Mapping[str, Chip]) -> dict[str, Any]:
    """Memory of a batch, and its seconds on every chip."""
    free = [candidates.price(one.model, dataclasses.replace(request, on=None)) for one in found]
    work = [roofline.request_work(one.model, request) for one in found]
    data: dict[str, Any] = {"memory": [float(price.memory_bytes) for price in free]}
    for name, chip in hardware.items():
        on = dataclasses.replace(request, on=chip)
        prices = [price._replace(times=roofline.times(one, on)) for price, one in zip(free, work, strict=True)]
        data[name] = {
            "secs": [float(price.secs) for price in prices],
            "secs_by_part": [_short([price.times[part].secs for part in PARTS]) for price in prices],
            "binds": [frontier.bound(price)[0] for price in prices],  # c(ompute) or m(emory)
        }
    return data


def _short(values: Any) -> list[float]:
    return [float(f"{value:.4g}") for value in np.asarray(values, float)]
