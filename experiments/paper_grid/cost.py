"""Chip hours of each cell of the paper's grid (configs/grids/paper.py), compiled ahead of time for a TPU slice.

    python -m experiments.paper_grid.cost --topology v5e:4x4                # writes rows.jsonl and README.md
    python -m experiments.paper_grid.cost --topology v5e:4x4 --table        # of the rows that exist

Both training stages are compiled (XLA:TPU, no TPU needed) with packed rows, and a step's time is predicted. The steps
of an epoch follow from the published numbers of conversations, and from lengths like LLaVA's that are packed as in
training: text lengths are log-normal, with the medians and means below. A cell takes minutes to compile; those that are
not compiled (--llms, --tokens) are estimated from their FLOPs, at the MFU of the compiled cell nearest in FLOPs.
"""

import json
import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlm_jax.aot import ENVIRONMENT
from vlm_jax.cli import ArgumentParser, run_main
from vlm_jax.core.errors import UserError, unknown
from vlm_jax.core.specs import DataSpec, RunSpec, data_of
from vlm_jax.data import bins

HERE = Path(__file__).parent
BEGIN, END = "<!-- written by experiments.paper_grid.cost -->", "<!-- end -->"
_SAMPLE = 40_000  # conversations of the simulated epoch


class Texts(NamedTuple):
    """Conversations of a stage, and the text tokens of one with its template."""

    conversations: int
    median: float
    mean: float


STAGES = {"align": Texts(558_128, 45, 50), "tune": Texts(665_298, 120, 230)}


def rows_of_epoch(texts: Texts, tokens: int, data: DataSpec, seed: int = 0) -> tuple[float, float]:
    """(rows of an epoch, share of their positions that is used) with V = `tokens`."""
    sigma = np.sqrt(2 * np.log(texts.mean / texts.median))
    lengths = np.random.default_rng(seed).lognormal(np.log(texts.median), sigma, _SAMPLE).astype(int)
    sizes = np.minimum(np.maximum(lengths, 8) + tokens, data.row_tokens)
    rows = int(bins.pack(sizes, np.ones(_SAMPLE, int), data.row_tokens, data.row_images).max()) + 1
    return rows * texts.conversations / _SAMPLE, float(sizes.sum() / (rows * data.row_tokens))


def slice_arguments(topology: str) -> str:
    """Config arguments of a topology: its devices, and one side of its torus as the tensor axis."""
    sides = [int(side) for side in topology.partition(":")[2].split("x")]
    return f"devices={math.prod(sides)},tensor={sides[0]}"


def compile_cell(spec: RunSpec, topology: str) -> dict[str, Any]:
    """The row of a cell: step time, steps, chip hours and memory of its two stages."""
    from vlm_jax.aot import variants
    from vlm_jax.sizing import cost

    out: dict[str, Any] = {"llm": spec.model.decoder.name, "tokens": spec.model.compressor.tokens, "topology": topology}
    for stage in spec.stages:
        data = data_of(spec, stage)
        rows, fill = rows_of_epoch(STAGES[stage.name], out["tokens"], data)
        compiled, _ = variants.compile_row(spec, stage, topology, "train")
        steps = rows / data.batch_rows
        out[stage.name] = {
            "batch_rows": data.batch_rows, "batch_conversations": round(STAGES[stage.name].conversations / steps),
            "row_images": data.row_images, "fill": fill, "steps": round(steps),
            "fits": compiled["fits"], "peak_bytes": compiled["peak_bytes"], "step_secs": compiled.get("step_secs"),
            "mfu": compiled.get("mfu"), "binds": compiled.get("binds"), "step_flops": cost.step_flops(spec, stage),
            "chip_hours": steps * compiled["step_secs"] * compiled["chips"] / 3600 if compiled["fits"] else None,
        }  # fmt: skip
    return out


def estimated_cell(spec: RunSpec, compiled: list[dict[str, Any]], topology: str) -> dict[str, Any]:
    """The row of a cell that was not compiled: chip hours at the MFU of the nearest compiled one that fits."""
    from vlm_jax.sizing import chips, cost

    chip = chips.CHIPS[topology.partition(":")[0]]
    out: dict[str, Any] = {"llm": spec.model.decoder.name, "tokens": spec.model.compressor.tokens, "topology": topology}
    for stage in spec.stages:
        data, flops = data_of(spec, stage), cost.step_flops(spec, stage)
        steps = rows_of_epoch(STAGES[stage.name], out["tokens"], data)[0] / data.batch_rows
        known = [row[stage.name] for row in compiled if row[stage.name]["fits"]]
        if not known:
            raise UserError(f"no cell of {topology} that was compiled fits: nothing to estimate the others from")
        nearest = min(known, key=lambda found: abs(math.log(found["step_flops"] / flops)))
        hours = steps * flops / nearest["mfu"] / chip.peak_flops / 3600
        out[stage.name] = {"steps": round(steps), "mfu": nearest["mfu"], "chip_hours": hours}
    return {**out, "estimated": True}


def table(rows: list[dict[str, Any]], topology: str) -> list[str]:
    """Chip hours, LLMs down and V across, and their sum."""
    rows = [row for row in rows if row["topology"] == topology]
    tokens = sorted({row["tokens"] for row in rows})
    lines = [f"Chip hours on {topology}:", "", "| LLM | " + " | ".join(f"V = {v}" for v in tokens) + " |"]
    lines.append("|---|" + "---:|" * len(tokens))
    total = 0.0
    for llm in sorted({row["llm"] for row in rows}, key=lambda name: float(name.rpartition("-")[2][:-1])):
        cells = []
        for v in tokens:
            row = next((row for row in rows if (row["llm"], row["tokens"]) == (llm, v)), None)
            hours = None if row is None else [row[stage]["chip_hours"] for stage in STAGES]
            cells.append("" if hours is None else "does not fit" if None in hours else f"{sum(hours):,.0f}")
            if hours and row.get("estimated"):
                cells[-1] = f"~{cells[-1]}"
            total += 0 if hours is None or None in hours else sum(hours)
        lines.append(f"| {llm} | " + " | ".join(cells) + " |")
    return [*lines, "", f"All cells: {total:,.0f} chip hours. ~: not compiled, estimated from FLOPs."]


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="python -m experiments.paper_grid.cost", description=__doc__)
    parser.add_argument("--topology", default="v5e:4x4", help="of one cell: v5e:4x4, v5e:16x16, v5p:4x4x8, ...")
    parser.add_argument("--llms", nargs="+", default=None, help="only these")
    parser.add_argument("--tokens", nargs="+", type=int, default=None, help="only these V")
    parser.add_argument("--table", action="store_true", help="compile nothing")
    args = parser.parse_args(argv)
    if not re.fullmatch(r"\w+:[1-9]\d{0,4}(x[1-9]\d{0,4})+", args.topology):
        raise UserError(f"--topology: expected a name such as v5e:4x4, got {args.topology!r}")
    os.environ.update(ENVIRONMENT)

    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from vlm_jax.config.arguments import load_config
    from vlm_jax.config.resolve import resolve
    from vlm_jax.config.sweep import cell_name, load_grid

    path = HERE / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(row["llm"], row["tokens"], row["topology"]) for row in rows}
    grid = load_grid("configs/grids/paper.py")
    for name, chosen in (("llm", args.llms), ("tokens", args.tokens)):
        for value in chosen or ():
            if value not in (known := list(dict.fromkeys(cell[name] for cell in grid.cells))):
                raise unknown(f"{name} of the grid:", str(value), list(map(str, known)))
    cells = [
        cell for cell in grid.cells
        if (args.llms is None or cell["llm"] in args.llms) and (args.tokens is None or cell["tokens"] in args.tokens)
        and (cell["llm"], cell["tokens"], args.topology) not in done and not args.table
    ]  # fmt: skip
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=len(cells))
        for cell in cells:
            progress.update(bar, description=cell_name(cell))
            config = f"{grid.config}:{cell_name(cell)},{slice_arguments(args.topology)}"
            rows.append(compile_cell(resolve(load_config(config)), args.topology))
            with path.open("a") as out:
                out.write(json.dumps(rows[-1]) + "\n")
            progress.advance(bar)
    lines: list[str] = []
    for topology in dict.fromkeys(row["topology"] for row in rows):
        compiled = [row for row in rows if row["topology"] == topology]
        names = {(row["llm"], row["tokens"]) for row in compiled}
        rest = [cell for cell in grid.cells if (cell["llm"], cell["tokens"]) not in names]
        specs = (resolve(load_config(f"{grid.config}:{cell_name(cell)},{slice_arguments(topology)}")) for cell in rest)
        lines += ["", *table([*compiled, *(estimated_cell(spec, compiled, topology) for spec in specs)], topology)]
    readme = HERE / "README.md"
    head, _, rest = readme.read_text().partition(BEGIN)
    readme.write_text("\n".join([head + BEGIN, *lines, "", END + rest.partition(END)[2]]))
    print("\n".join(lines))


if __name__ == "__main__":
    run_main(main)
