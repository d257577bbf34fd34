"""The tables of README.md, from the rows of results.jsonl; cells without a row say so."""

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from experiments.gpu import results
from experiments.gpu.results import Row
from experiments.gpu.sizes import Sizes
from experiments.report import markdown_table

MISSING, TOO_LARGE = "not measured", "does not fit"


def markdown(rows: Sequence[Row], sizes: Sizes) -> str:
    """The tables of every device in turn; one of empty tables without rows."""
    found = []
    for device in results.devices(rows) or [None]:
        newest = results.newest([row for row in rows if row["device"] in (device, None)])
        by_part: dict[str, dict[str, Row]] = {}
        for row in newest:
            by_part.setdefault(row["part"], {})[row["name"]] = row
        versions = sorted({row["jax"] for row in newest if "jax" in row})
        head = f"**{device}**, JAX {', '.join(versions)}." if device else f"No GPU: {MISSING}."
        found += [
            head,
            correctness(by_part.get("correctness", {})),
            training(by_part.get("training", {}), sizes),
            transformers(by_part.get("transformers", {}), sizes),
            planner(by_part.get("planner", {}), sizes),
            failures(newest),
        ]
    return "\n\n".join(text for text in found if text)


def correctness(rows: dict[str, Row]) -> str:
    """A line for each kind of check, with its worst case."""
    from experiments.gpu.correctness import FUSED_OVER_PLAIN, PRECISIONS

    lines = [["check", "cases", "worst", "tolerance", "largest difference", "passed"]]
    kinds = {f"logits, {dtype}, {precision} precision": f"{tolerance:g}"
             for (dtype, precision), tolerance in PRECISIONS.items()}  # fmt: skip
    kinds["attention, cudnn, bfloat16"] = f"{FUSED_OVER_PLAIN:g} times plain attention's"
    kinds["resumed training"] = "bit for bit, or twice the difference of a repeat"
    for kind, tolerance in kinds.items():
        mine = [row for row in rows.values() if row.get("kind") == kind]
        if not mine:
            lines.append([kind, *[MISSING] * 2, tolerance, *[MISSING] * 2])
            continue
        worst = _largest(row.get("relative", row.get("ratio", row.get("max_abs", 0.0))) for row in mine)
        largest = _largest(row.get("max_abs", row.get("out_max_abs", 0.0)) for row in mine)
        passed = sum(row["ok"] for row in mine)
        lines.append([kind, str(len(mine)), f"{worst:.2g}", tolerance, f"{largest:.2g}", f"{passed} of {len(mine)}"])
    return "Against the references:\n\n" + markdown_table(lines)


def _largest(values: Iterable[float | str]) -> float:
    """The largest; above all numbers is what is not finite, which the rows have as text."""
    return max(map(float, values), key=lambda value: value if math.isfinite(value) else math.inf)


def training(rows: dict[str, Row], sizes: Sizes) -> str:
    """The best choice of each cell, and the choices that do not fit."""
    from experiments.gpu.training import TARGET, cell_name, choice_name

    lines = [["LLM, V", "rows", "remat", "attention", "step, ms", "tokens a second", f"MFU (target {TARGET:.0%})"]]
    too_large = {name for name, row in rows.items() if row.get("fits") is False}
    for decoder in sizes.decoders:
        for tokens in sizes.tokens:
            name = cell_name(decoder, tokens)
            mine = [row for row in rows.values() if row.get("cell") == name and "mfu" in row]
            if not mine:
                names = [choice_name(decoder, tokens, choice) for choice in sizes.choices]
                lines.append([name, *[TOO_LARGE if too_large.issuperset(names) else MISSING] * 6])
                continue
            best = max(mine, key=lambda row: row["mfu"])
            lines.append([
                name, str(best["batch_rows"]), best["remat"], best["attention"], f"{1e3 * best['step_secs']:.1f}",
                f"{best['tokens_per_sec']:,.0f}", f"{best['mfu']:.1%}",
            ])  # fmt: skip
    text = f"The train step, rows of {sizes.row_tokens:,} positions, {sizes.encoder.name}:\n\n{markdown_table(lines)}"
    return "\n\n".join([text, *([f"{TOO_LARGE.capitalize()}: {'; '.join(sorted(too_large))}."] if too_large else [])])


def transformers(rows: dict[str, Row], sizes: Sizes) -> str:
    """Milliseconds beside transformers."""
    from experiments.gpu.beside import case_name

    head = ["LLM, prompt", "prefill, ms", "transformers", "ratio", "each token, ms", "transformers", "ratio"]
    lines = [[*head, "same tokens"]]
    for decoder in sizes.decoders:
        for tokens in sizes.tokens:
            for batch in sizes.batches:
                name = case_name(decoder, tokens + sizes.question_tokens, batch)
                row = rows.get(name, {})
                lines.append([name, *(_beside(row) if "same_tokens" in row else [MISSING] * 7)])
    note = next((f" {row['note']}." for row in rows.values() if "note" in row and len(rows) == 1), "")
    return f"Beside transformers, bfloat16 (ratio above 1: vlm_jax is faster):{note}\n\n{markdown_table(lines)}"


def _beside(row: Row) -> list[str]:
    cells = []
    for phase in ("prefill", "token"):
        ratio = statistics.median(row[f"{phase}_ratio"])
        cells += [f"{row[f'{phase}_ms']:.2f}", f"{row[f'theirs_{phase}_ms']:.2f}", f"{ratio:.2f}"]
    return [*cells, f"{row['same_tokens']:.1%}"]


def planner(rows: dict[str, Row], sizes: Sizes) -> str:
    """Measured milliseconds of each cell, and the error of the planner where it did not calibrate."""
    from experiments.gpu.planner import PARTS, TARGET, calibrates, cell_name, cells, median_errors, prediction

    lines = [["cell", *(f"{part}, ms" for part in (*PARTS, "request")), "the planner's error"]]
    errors = prediction(sizes, rows)
    for model, batch in cells(sizes):
        name = cell_name(model, batch)
        parts = rows.get(name, {}).get("parts")
        times = [1e3 * parts[part]["secs"] for part in PARTS] if parts else []
        shown = [f"{value:.2f}" for value in (*times, sum(times))] if times else [MISSING] * (len(PARTS) + 1)
        error = f"{errors[name]['request']:+.0%}" if name in errors else MISSING
        lines.append([name, *shown, "calibrates" if calibrates(sizes, model, batch) else error])
    each = ", ".join(f"{part} {value:.0%}" for part, value in median_errors(errors).items()) or MISSING
    sentence = f"Median error of the predicted cells (target {TARGET:.0%}): {each}."
    text = f"{sizes.question_tokens} question tokens, {sizes.answer_tokens} answer tokens, {sizes.encoder.name}"
    return f"The planner's latency ({text}):\n\n{markdown_table(lines)}\n\n{sentence}"


def write_calibrations(folder: Path, rows: Sequence[Row]) -> None:
    """A `calibration_CHIP.csv` for every chip with measured cells."""
    from experiments.gpu.planner import write_calibration

    cells = [row for row in results.newest(rows) if "parts" in row]
    for name in sorted({row["chip"] for row in cells}):
        write_calibration(folder / f"calibration_{name}.csv", [row for row in cells if row["chip"] == name])


def failures(rows: Sequence[Row]) -> str:
    """Cases that failed or are out of tolerance, one a line."""
    lines = [
        f"* {row['part']}, {row['name']}: {row.get('error', 'out of tolerance').splitlines()[0][:160]}"
        for row in rows
        if "error" in row or row.get("ok") is False
    ]
    return "Failed or out of tolerance:\n\n" + "\n".join(lines) if lines else ""
