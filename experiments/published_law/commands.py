"""What the two commands about laws cost, in processor seconds: `python -m experiments.published_law.commands`.

Whole processes, imports included, in turn: `fit_law` of the 56 published scores with its defaults, `plan` over
thousands of models, and importing jax and flax, which neither does. The search that the paper describes is in
benchmark.py. Writes commands.json.
"""

import json
import math
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from experiments.flags import whole
from experiments.inference_speed.measuring import cpu_name
from vlm_jax.cli import ArgumentParser, run_main
from vlm_jax.core.errors import UserError
from vlm_jax.sizing.zoo import DECODERS, ENCODERS

HERE = Path(__file__).parent
COMPRESSORS = ("resampler", "tokenpacker", "quecc")
TOKENS = (1, 4, 16, 36, 64, 144, 576)


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="python -m experiments.published_law.commands", description=__doc__)
    parser.add_argument("--repeats", type=whole(1), default=5)
    args = parser.parse_args(argv)
    encoders, llms = ([name for name in zoo if published(name)] for zoo in (ENCODERS, DECODERS))
    commands = {
        "fit_law": ["-m", "vlm_jax.fit_law", "--rows", str(HERE / "published_scores.csv")],
        "plan": [
            "-m", "vlm_jax.plan", "--law", str(HERE / "law.json"), "--family", "reasoning", "--tflops", "8",
            "--question-tokens", "50", "--encoders", *encoders, "--compressors", *COMPRESSORS, "--llms", *llms,
            "--tokens", *map(str, TOKENS),
        ],
        "import": ["-c", "import jax, flax.linen"],
    }  # fmt: skip
    secs: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(args.repeats):
        for name, command in commands.items():
            secs[name].append(round(measure(command), 2))
    result: dict[str, Any] = {name: sorted(values) for name, values in secs.items()}
    result |= {"combinations": math.prod(map(len, (encoders, COMPRESSORS, llms, TOKENS)))}
    result |= {"load": round(os.getloadavg()[0], 1), "cpu": cpu_name()}
    (HERE / "commands.json").write_text(json.dumps(result, indent=1) + "\n")
    for name in commands:
        print(f"{name:>8}  {statistics.median(result[name]):.2f} s")


def published(name: str) -> bool:
    """Not a model of the small study."""
    return not re.fullmatch(r"glyph-\d+|d\d+", name)


def measure(command: list[str]) -> float:
    """Processor seconds of a new process. Raises `UserError` if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        extra = ["--out", f"{folder}/law.json"] if "vlm_jax.fit_law" in command else []
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, *command, *extra], capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed: {done.stderr[-500:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    run_main(main)
