"""What small cells of the study cost, in processor seconds: `python -m experiments.training_speed.cells`.

Each figure is of `experiments.launch` with one worker, from its start to the rows: imports, compilation, training,
evaluation. Data and features exist beforehand. "cold": no program is cached; "warm": all are. Then several cells: one
launch with an empty program cache, beside a launch for each cell without any cached program. Renews cells.json and the
table of README.md.
"""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from experiments.inference_speed.measuring import cpu_name
from experiments.readme import write_block
from experiments.report import markdown_table
from vlm_jax.cli import ArgumentParser, run_main
from vlm_jax.core.errors import UserError

HERE = Path(__file__).parent
ONE, SEVERAL = "llms=d48,tokens=4", "llms=d24+d48,tokens=1+4,seeds=0+1+2"
PROGRAMS = "programs"  # of the cache: compiled programs


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="python -m experiments.training_speed.cells", description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args(argv)
    if args.steps < 1:
        raise UserError(f"--steps: expected at least 1, got {args.steps}")
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), args.steps)
    print(json.dumps(result, indent=1))
    (HERE / "cells.json").write_text(json.dumps(result, indent=1) + "\n")
    write_block(HERE / "README.md", "cells", table(result), "experiments.training_speed.cells")


def measure(folder: Path, steps: int) -> dict[str, Any]:
    """Processor seconds and compiled programs of the launches."""
    from vlm_jax.config.sweep import cell_name, load_grid

    launch(folder, f"llms=d24,tokens=1,steps={min(steps, 20)}")  # data and features
    alone = {name: launch(folder, f"{ONE},steps={steps}", cold=name == "cold") for name in ("cold", "warm")}
    together = launch(folder, f"{SEVERAL},steps={steps}", cold=True)
    grid = load_grid(f"experiments/training_speed/grid.py:{SEVERAL},steps={steps}")
    apart = []
    for cell in grid.cells:
        if cell["seed"] == 0:  # others cost the same
            arg = f"llms={cell['llm']},tokens={cell['tokens']},steps={steps}"
            print(cell_name(cell), file=sys.stderr)
            apart.append(launch(folder, arg, cold=True)["secs"])
    times = len(grid.cells) // len(apart)
    settings = {"steps": steps, "load": round(os.getloadavg()[0], 1), "cpu": cpu_name(), "cores": os.cpu_count()}
    several = {"cells": len(grid.cells), "launch_secs": together["secs"], "apart_secs": round(times * sum(apart), 1)}
    return {**settings, **alone, "several": several}


def launch(folder: Path, arg: str, cold: bool = False) -> dict[str, float]:
    """One launch in a new workdir. Raises `UserError` if it fails."""
    cache, workdir = folder / "cache", folder / "workdir"
    shutil.rmtree(workdir, ignore_errors=True)
    if cold:
        shutil.rmtree(cache / PROGRAMS, ignore_errors=True)
    command = [sys.executable, "-m", "experiments.launch", "--workers", "1", "--workdir", str(workdir)]
    before = _children_secs()
    done = subprocess.run(
        [*command, "--grid", f"experiments/training_speed/grid.py:{arg}"],
        env={**os.environ, "VLM_JAX_CACHE": str(cache), "JAX_LOG_COMPILES": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise UserError(f"experiments.launch --grid ...:{arg} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    logs = "".join(path.read_text() for path in workdir.glob("cells/*/log.txt"))
    compiled = [float(secs) for secs in re.findall(r"Finished XLA compilation of .* in ([\d.e-]+) sec", logs)]
    return {"secs": round(_children_secs() - before, 1), "programs": len(compiled)}


def _children_secs() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def table(result: dict[str, Any]) -> str:
    several = result["several"]
    rows = [["work", "processor seconds", "programs"]]
    rows += [
        [f"one cell, {name}", f"{result[name]['secs']:.1f}", str(result[name]["programs"])] for name in ("cold", "warm")
    ]
    count, ratio = several["cells"], several["apart_secs"] / several["launch_secs"]
    rows += [
        [f"{count} cells, a launch for each, cold", f"{several['apart_secs']:.1f}", ""],
        [f"{count} cells, one launch, cold", f"{several['launch_secs']:.1f} ({ratio:.1f} times less)", ""],
    ]
    note = f"{result['steps']} steps a cell, {result['cores']} cores, load average {result['load']}, {result['cpu']}."
    return f"{markdown_table(rows)}\n\n{note}"


if __name__ == "__main__":
    run_main(main)
