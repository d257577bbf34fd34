"""Compiles a run's programs for a TPU pod on a machine without one; prints memory, collectives and predicted time:

    python -m vlm_jax.aot --config configs/llava.py:llm=qwen1.5-7b,tokens=16,devices=256 --topology v5e:16x16

With several topologies, strategies or meshes, all are compiled and the cheapest that fits (chip-seconds per row) is
reported; invalid combinations are listed as refused. The exit code is 3 if nothing fits. With compute.remat=auto the
policy that recomputes least and fits is compiled, and with --batch auto also the smallest batch whose predicted MFU is
within 1 % of the highest. Needs libtpu (`pip install 'vlm_jax[tpu]'`).
"""

import argparse
import json
import os
import re
from pathlib import Path
from typing import Any

from vlm_jax.aot import ENVIRONMENT
from vlm_jax.cli import ArgumentParser, run_main
from vlm_jax.core.errors import UserError, unknown
from vlm_jax.core.files import write_text
from vlm_jax.core.specs import RunSpec, StageSpec

_MESH = re.compile(r"-\d+(,-?\d+)+")


def parser() -> ArgumentParser:
    """The flags."""
    flags = ArgumentParser(
        prog="python -m vlm_jax.aot", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    flags.add_argument(
        "--config", required=True, help="FILE.py:name=value,... ; single fields: --config.compute.remat=dots"
    )
    flags.add_argument("--topology", required=True, nargs="+", help="v5e:16x16, v5p:4x4x8, v4:4x4x4, v6e:8x8, ...")
    flags.add_argument("--mode", default="train", help="train, prefill or decode")
    flags.add_argument("--strategy", nargs="+", default=[], help="strategies to compare, instead of compute.strategy")
    flags.add_argument("--mesh", nargs="+", default=[], help="data,fsdp,tensor instead of compute.mesh; -1: the rest")
    flags.add_argument("--stage", help="name of a training stage; default: the last")
    flags.add_argument("--batch", help="auto: train also at the fewest rows within 1 %% of the highest predicted MFU")
    flags.add_argument("--json", type=Path, help="write the rows to this file, after every compilation")
    flags.add_argument("--hlo", type=Path, help="write the HLO text to this file; several: one file each")
    return flags


def main(argv: list[str]) -> int:
    """Compiles every variant, prints the rows and, of several, a ranking."""
    os.environ.update(ENVIRONMENT)

    from vlm_jax.config.arguments import load_config, split_overrides
    from vlm_jax.config.resolve import resolve

    argv, overrides = split_overrides(argv)
    # argparse takes a value that begins with "-" for a flag, unless a space precedes it.
    flags = parser().parse_args([f" {value}" if _MESH.fullmatch(value) else value for value in argv])
    for name, path in (("--json", flags.json), ("--hlo", flags.hlo)):
        if path and (path.is_dir() or not path.parent.is_dir()):
            raise UserError(f"{name} {path}: expected a file in an existing folder")
    if flags.batch not in (None, "auto"):
        raise UserError(f"--batch {flags.batch}: expected auto (other sizes: --config.data.batch_rows=N)")
    if flags.batch and flags.mode != "train":
        raise UserError(f"--batch auto: expected --mode train, got {flags.mode}")
    spec = resolve(load_config(flags.config, overrides))
    stages = {stage.name: stage for stage in spec.stages}
    if flags.stage and flags.stage not in stages:
        raise unknown("stage", flags.stage, stages)

    from vlm_jax.aot import variants

    cells = variants.variants(spec, flags.topology, flags.strategy, flags.mesh)
    rows, refused = _compile(cells, flags, stages.get(flags.stage, spec.stages[-1]))
    if len(rows) > 1:
        print("\n".join([variants.ranking(rows), *refused]))
    return 0 if any(row["fits"] for row in rows) else 3


def _compile(
    cells: list[tuple[str, RunSpec]], flags: argparse.Namespace, stage: StageSpec
) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows, and a line for each refused variant. Raises `UserError` if all are refused."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from vlm_jax.aot import batch, report, variants

    rows: list[dict[str, Any]] = []
    refused: list[str] = []
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), transient=True) as progress:
        bar = progress.add_task("", total=len(cells))
        for topology, cell in cells:
            progress.update(bar, description=f"compiling for {topology} (a minute or two)")
            try:
                if flags.batch:
                    compiled = batch.best(cell, stage, topology)
                else:
                    compiled = [variants.compile_row(cell, stage, topology, flags.mode)]
            except UserError as error:
                refused.append(f"refused: {variants.name(topology, cell)}: {error}")
                if len(refused) == len(cells):
                    raise
                progress.advance(bar)
                continue
            rows += [row for row, _ in compiled]
            is_list = len(cells) > 1 or bool(flags.batch)
            if flags.json:
                write_text(flags.json, json.dumps(rows if is_list else rows[0], indent=1) + "\n")
            for row, program in compiled:
                if flags.hlo:
                    name = variants.name(topology, cell) + (f" {row['batch_examples']}" if flags.batch else "")
                    more = "." + name.replace(" ", ".").replace(":", "-") if is_list else ""
                    write_text(flags.hlo.with_name(f"{flags.hlo.stem}{more}{flags.hlo.suffix}"), program)
                text = "\n".join([*report.lines(row), *([] if row["fits"] else [report.advice(row)])])
                progress.console.print(text, soft_wrap=True, markup=False, highlight=False)
            progress.advance(bar)
    return rows, refused


if __name__ == "__main__":
    run_main(main)
