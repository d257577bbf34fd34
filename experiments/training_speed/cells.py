"""What small cells of the study cost, in processor seconds: `python -m experiments.training_speed.cells`.

Each figure is of `experiments.launch` with one worker, from its start to the rows: imports, compilation, training,
evaluation. Data and features exist beforehand. "cold": no program is cached; "warm": all are. Then several cells: one
launch with an empty program cache, beside a launch for each cell, with one program cache that is empty at first. Of
these launches the ones of two seeds are run; any further seed counts as the second, whose programs are all cached.
Beside both, launches that find no program cached: those of one seed, times the seeds. Renews cells.json and the table
of README.md.
"""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.flags import whole
from experiments.inference_speed.measuring import cpu_name
from experiments.readme import write_block
from experiments.report import markdown_table
from vlm_jax.cli import ArgumentParser, run_main
from vlm_jax.core.errors import UserError

HERE = Path(__file__).parent
ONE, MODELS, SEEDS = "llms=d48,tokens=4", ("d24", "d48"), (0, 1, 2)
TOKENS = (1, 4)
PROGRAMS = "programs"  # of the cache: compiled programs
# The launches that one launch is measured beside, by the name of their seconds.
APART = {"apart_secs": "a launch for each, one program cache", "uncached_secs": "a launch for each, nothing cached"}


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="python -m experiments.training_speed.cells", description=__doc__)
    parser.add_argument("--steps", type=whole(1), default=400)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), args.steps)
    print(json.dumps(result, indent=1))
    (HERE / "cells.json").write_text(json.dumps(result, indent=1) + "\n")
    write_block(HERE / "README.md", "cells", table(result), "experiments.training_speed.cells")


def measure(folder: Path, steps: int) -> dict[str, Any]:
    """Processor seconds and compiled programs of the launches."""
    launch(folder, f"llms=d24,tokens=1,steps={min(steps, 20)}")  # data and features
    alone = {name: launch(folder, f"{ONE},steps={steps}", cold=name == "cold") for name in ("cold", "warm")}
    every = "llms={},tokens={},seeds={}".format(*("+".join(map(str, of)) for of in (MODELS, TOKENS, SEEDS)))
    together = launch(folder, f"{every},steps={steps}", cold=True)

    def apart(seed: int, cold: Sequence[bool]) -> float:
        """Seconds of a launch for each model and V; `cold`: whether it finds no program."""
        args = (f"llms={llm},tokens={v},seeds={seed},steps={steps}" for llm in MODELS for v in TOKENS)
        return sum(launch(folder, arg, no_program)["secs"] for arg, no_program in zip(args, cold, strict=True))

    shapes = len(MODELS) * len(TOKENS)
    uncached = apart(SEEDS[0], [True] * shapes)
    first = apart(SEEDS[0], [True, *[False] * (shapes - 1)])
    second = apart(SEEDS[1], [False] * shapes)
    several = {
        "cells": shapes * len(SEEDS), "seeds": len(SEEDS), "launch_secs": together["secs"], "first_secs": first,
        "second_secs": second, "apart_secs": first + (len(SEEDS) - 1) * second, "uncached_secs": len(SEEDS) * uncached,
    }  # fmt: skip
    several = {name: round(value, 1) for name, value in several.items()}
    settings = {"steps": steps, "load": round(os.getloadavg()[0], 1), "cpu": cpu_name(), "cores": os.cpu_count()}
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
    count, together = several["cells"], several["launch_secs"]
    rows.append([f"{count} cells, one launch, cold", f"{together:.1f}", ""])
    for key, how in APART.items():
        if key in several:
            ratio = f"{several[key] / together:.1f} times as many"
            rows.append([f"{count} cells, {how}", f"{several[key]:.1f} ({ratio})", ""])
    note = f"{result['steps']} steps a cell, {result['cores']} cores, load average {result['load']}, {result['cpu']}."
    if "apart_secs" in several:
        note += (
            f" A launch for each, one program cache: {several['first_secs']:.1f} of the first seed, whose programs are "
            f"compiled, and {several['second_secs']:.1f} of the second, which also counts for every further seed."
        )
    return f"{markdown_table(rows)}\n\n{note}"


if __name__ == "__main__":
    run_main(main)
