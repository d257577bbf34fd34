"""Compiles a run's real programs for a TPU pod on a machine without one, and says what they hold, send and take:

    python -m vlm_jax.aot --config configs/llava.py:llm=qwen1.5-7b,tokens=16 --topology v5e:16x16

With several topologies or strategies, all are compiled and the cheapest that fits (chip-seconds a call) is named. The
exit code is 3 where nothing fits. Needs libtpu (`pip install 'vlm_jax[tpu]'` brings it).
"""

import json
import os
from pathlib import Path

from vlm_jax.aot import ENVIRONMENT
from vlm_jax.core.errors import Flags, door, unknown


def parser() -> Flags:
    """The flags."""
    flags = Flags(prog="python -m vlm_jax.aot", description=__doc__, allow_abbrev=False)
    flags.add_argument(
        "--config", required=True, help="FILE.py:name=value,... ; single fields: --config.compute.remat=dots"
    )
    flags.add_argument("--topology", required=True, nargs="+", help="v5e:16x16, v5p:4x4x8, v4:4x4x4, v6e:8x8, ...")
    flags.add_argument("--mode", default="train", help="train, prefill or decode")
    flags.add_argument("--strategy", nargs="+", default=[], help="instead of compute.strategy: tables to compare")
    flags.add_argument("--mesh", nargs="+", default=[], help="instead of compute.mesh: data,fsdp,tensor (-1: the rest)")
    flags.add_argument("--stage", help="a stage's name; without it the last")
    flags.add_argument("--json", type=Path, help="write the rows here too")
    flags.add_argument("--hlo", type=Path, help="write the compiled program's text here")
    return flags


def main(argv: list[str]) -> int:
    """Compiles, prints, compares."""
    os.environ.update(ENVIRONMENT)

    from vlm_jax.config.arguments import load_config, split_overrides
    from vlm_jax.config.resolve import resolve

    argv, overrides = split_overrides(argv)
    flags = parser().parse_args(argv)
    spec = resolve(load_config(flags.config, overrides))
    stages = {stage.name: stage for stage in spec.stages}
    if flags.stage and flags.stage not in stages:
        raise unknown("stage", flags.stage, stages)

    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from vlm_jax.aot import report, variants

    rows, cells = [], variants.variants(spec, flags.topology, flags.strategy, flags.mesh)
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), transient=True) as progress:
        bar = progress.add_task("", total=len(cells))
        for topology, cell in cells:
            progress.update(bar, description=f"compiling for {topology} (a minute or two)")
            row, text = variants.compile_row(cell, stages.get(flags.stage, cell.stages[-1]), topology, flags.mode)
            rows.append(row)
            if flags.hlo:
                flags.hlo.write_text(text)
            progress.advance(bar)
            text = "\n".join([*report.lines(row), *([] if row["fits"] else [report.advice(row)])])
            progress.console.print(text, soft_wrap=True, markup=False, highlight=False)
    if flags.json:
        rest = flags.json.with_suffix(".part")
        rest.write_text(json.dumps(rows if len(rows) > 1 else rows[0], indent=1) + "\n")
        os.replace(rest, flags.json)
    if len(rows) > 1:
        print(variants.ranking(rows))
    return 0 if any(row["fits"] for row in rows) else 3


if __name__ == "__main__":
    door(main)()
