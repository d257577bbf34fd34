"""Compressors compared: `python -m experiments.compressors.report --workdir workdirs/compressors`.

Renews rows.jsonl (without --workdir it is read), the figure and the tables of README.md.
"""

import itertools
import math
import shutil
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.compressors.grid import FAMILIES, TRAINED
from experiments.compressors.training_free import nearest
from experiments.readme import write_block
from experiments.report import markdown_table
from vlm_jax.cli import ArgumentParser, run_main
from vlm_jax.core.rows import ResultRow
from vlm_jax.evaluation import results
from vlm_jax.scaling import plots
from vlm_jax.sizing import compression

HERE = Path(__file__).parent
COMMAND = "experiments.compressors.report"
TOKENS = (1, 4, 16)
# Cells of one compressor that are trained differently, by a mark in the cell's name.
SEPARATE, DRAWN, LONGER, MOST = "one V", "elastic", "elastic, three times the steps", "elastic, most"
STEPS = 400


class SeedMean(NamedTuple):
    """The mean of the seeds of one cell."""

    error: float
    stderr: float
    seeds: int


def training(row: ResultRow) -> str:
    """How the row's weights were trained: for one V, or for several."""
    if not row.model.compressor.elastic:
        return SEPARATE
    if row.train_steps > STEPS:
        return LONGER
    return MOST if "elastic_steps=most" in row.cell else DRAWN


def cells(rows: Iterable[ResultRow]) -> dict[tuple[str, str, str, int], SeedMean]:
    """(family, compressor, training, V) -> the mean over seeds. Its standard error has the spread of the seeds and the
    noise of the test images, which the seeds share."""
    grouped = defaultdict(list)
    for row in rows:
        grouped[row.family, row.compressor, training(row), row.visual_tokens].append(row)
    out = {}
    for key, same in grouped.items():
        errors = [row.error for row in same]
        spread = np.var(errors, ddof=1) / len(errors) if len(errors) > 1 else 0.0
        noise = np.mean([row.stderr**2 for row in same])
        out[key] = SeedMean(float(np.mean(errors)), math.sqrt(spread + noise), len(errors))
    return out


def shown(cell: SeedMean | None) -> str:
    if cell is None:
        return ""
    return f"{cell.error:.3f} ± {cell.stderr:.3f}" + ("" if cell.seeds > 1 else " (one seed)")


def error_lines(found: dict[tuple[str, str, str, int], SeedMean], families: Sequence[str]) -> list[list[str]]:
    """Trained compressors, best mean at V = 4 and 16 first; the blind baseline and all patches below them."""
    keys = list(itertools.product(families, (4, 16)))

    def mean(name: str) -> float:
        errors = [found[f, name, SEPARATE, v].error for f, v in keys if (f, name, SEPARATE, v) in found]
        return float(np.mean(errors)) if errors else math.inf

    lines = [["compressor", *(f"{family}, V = {v}" for family in families for v in TOKENS)]]
    for name in sorted(TRAINED, key=mean):
        line = [shown(found.get((family, name, SEPARATE, v))) for family in families for v in TOKENS]
        lines.append([name, *line])
    for name, v in (("none", 64), ("blind", 0)):
        line = [[shown(found.get((family, name, SEPARATE, v))), "", ""] for family in families]
        lines.append([f"{name} (V = {v})", *itertools.chain(*line)])
    return lines


def cost_lines(rows: Iterable[ResultRow], tokens: int) -> list[list[str]]:
    """MFLOP of a question about an image by part, at one V, cheapest first."""
    head = ["compressor", "encoder", "compressor and projector", "question", "prefill", "decode", "total"]
    lines, done = [], set()
    for row in sorted(rows, key=total):
        if row.visual_tokens != tokens or row.compressor in done or row.compressor not in TRAINED:
            continue
        done.add(row.compressor)
        parts = [row.encoder_flops, row.compressor_flops, row.question_flops, row.prefill_flops, row.decode_flops]
        alive = compression.mean(compression.alive(row.model))
        values = [*(f"{part / 1e6:.2f}" if part else "-" for part in parts), f"{total(row) / 1e6:.1f}", f"{alive:g}"]
        lines.append([row.compressor, *values])
    return [[*head, "visual tokens in a layer (mean)"], *lines]


def total(row: ResultRow) -> float:
    return row.encoder_flops + row.compressor_flops + row.question_flops + row.prefill_flops + row.decode_flops


def elastic_lines(found: dict[tuple[str, str, str, int], SeedMean], families: Sequence[str]) -> list[list[str]]:
    """One training for all V beside one for each."""
    lines = [["family", "compressor", "training", *(f"V = {v}" for v in TOKENS)]]
    names = sorted({name for _, name, how, _ in found if how != SEPARATE}, key=TRAINED.index)
    for family, name, how in itertools.product(families, names, (SEPARATE, DRAWN, LONGER, MOST)):
        line = [shown(found.get((family, name, how, v))) for v in TOKENS]
        if any(line):
            lines.append([family, name, how, *line])
    return lines


def training_free_lines(rows: Iterable[ResultRow], families: Sequence[str]) -> list[list[str]]:
    """Training-free methods on the models of all patches, at the V of each that are nearest to those of the head."""
    rows = list(rows)
    found, grids = cells(rows), {row.model.encoder.token_grid for row in rows}
    lines = [["method", *(f"{family}, V = {v}" for family in families for v in TOKENS)]]
    for name, grid in itertools.product(dict.fromkeys(name for _, name, _, _ in found), grids):
        given = [nearest(name, v, grid) for v in TOKENS]
        line = []
        for family, (i, own) in itertools.product(families, enumerate(given)):
            text = "" if own in given[:i] else shown(found.get((family, name, SEPARATE, own)))
            line.append(text if own == TOKENS[i] or not text else f"{text} (V = {own})")
        lines.append([name, *line])
    return lines


@plots.styled
def draw(found: dict[tuple[str, str, str, int], SeedMean], families: Sequence[str], out: Path) -> Path:
    """A panel for each family: a line for each compressor, a point for each V."""
    import matplotlib.pyplot as plt

    order = [line[0] for line in error_lines(found, families)[1:-2]][::-1]
    figure, panels = plt.subplots(
        1, len(families), figsize=(3.4 * len(families) + 1.2, 5.6), sharey=True, squeeze=False
    )
    for panel, family in zip(panels[0], families, strict=True):
        for v, color in zip(TOKENS, plots.RAMP[1:], strict=True):
            cells = [(i, found.get((family, name, SEPARATE, v))) for i, name in enumerate(order)]
            known = [(i, cell) for i, cell in cells if cell]
            if not known:
                continue
            places, values = zip(*known, strict=True)
            errors, bars = [cell.error for cell in values], [2 * cell.stderr for cell in values]
            panel.errorbar(errors, places, xerr=bars, fmt="o", color=color, ms=5, elinewidth=1, label=f"V = {v}")
        blind = found.get((family, "blind", SEPARATE, 0))
        if blind:
            panel.axvline(blind.error, color=plots.FAINT, linestyle=":", linewidth=1)
            panel.annotate("no image ", (blind.error, len(order) - 0.5), color=plots.FAINT, fontsize=8, ha="right")
        panel.set_title(family)
        panel.set_xlabel("token error (± 2 standard errors)")
        panel.set_xlim(left=0)
    panels[0, 0].set_yticks(range(len(order)), order)
    panels[0, -1].legend(loc="best")
    figure.tight_layout()
    path = plots.save(figure, out)
    plt.close(figure)
    return path


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog=f"python -m {COMMAND}", description=__doc__, allow_abbrev=False)
    parser.add_argument("--workdir", type=Path, help="of experiments/compressors/grid.py; default: the committed rows")
    args = parser.parse_args(argv)
    if args.workdir is not None:
        results.read(args.workdir / "rows.jsonl")
        shutil.copyfile(args.workdir / "rows.jsonl", HERE / "rows.jsonl")
    rows = results.read(HERE / "rows.jsonl")
    families = [family for family in FAMILIES if any(row.family == family for row in rows)]
    free = HERE / "training_free.jsonl"
    found = cells(rows)
    draw(found, families, HERE / "figures" / "errors.png")
    secs = sum({row.params_sha256: row.train_secs for row in rows}.values()) / 60  # of each training once
    texts = {
        "errors": f"{len(rows)} rows, {secs:.0f} minutes of training:\n\n"
        + markdown_table(error_lines(found, families)),
        "cost": markdown_table(cost_lines([row for row in rows if row.family == families[0]], 4)),
        "elastic": markdown_table(elastic_lines(found, families)),
        "training_free": markdown_table(training_free_lines(results.read(free), families)) if free.exists() else "",
    }
    for name, text in texts.items():
        write_block(HERE / "README.md", name, text, COMMAND)
        print(text)


if __name__ == "__main__":
    run_main(main)
