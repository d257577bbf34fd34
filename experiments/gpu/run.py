"""Everything that only a GPU can show, in one command: `python -m experiments.gpu.run`.

    python -m experiments.gpu.run                  # on one H100 or H200, within 12 minutes; renews README.md
    python -m experiments.gpu.run --toy            # on a CPU: tries the script at tiny sizes
    python -m experiments.gpu.run --table          # renews README.md from results.jsonl, without measuring
    python -m experiments.gpu.run --table --out X  # prints the tables of the file X, and leaves README.md as it is

The parts run in this order, each in a process and with a share of the time: correctness, training, transformers,
planner. Every result is a line of results.jsonl as soon as it is there; a second run measures what is missing, and what
failed. The exit code is 1 where a case failed or is out of tolerance; the tables name it.
"""

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from experiments.flags import real
from experiments.gpu import results, table
from experiments.gpu.sizes import GPU, TOY, TOY_CHIP
from experiments.readme import write_block
from vlm_jax.cli import ArgumentParser, run_main
from vlm_jax.core.errors import UserError, unknown

HERE = Path(__file__).parent
RESULTS = HERE / "results.jsonl"
MODULES = {"correctness": "correctness", "training": "training", "transformers": "beside", "planner": "planner"}
MINUTES = 12.0
_SHARES = {"correctness": 0.2, "training": 0.3, "transformers": 0.2, "planner": 0.2}  # of them; the rest is slack
_SLACK = 0.1  # of them, for the cases that run when a part's time ends
# torch allocates on the same GPU.
_ENVIRONMENT = {"transformers": {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}}
_WORKERS = 4  # programs that are compiled at a time
_TOY_WORKERS = 2


def main(argv: list[str]) -> int:
    """Runs the parts; returns the exit code of the first that could not start, else 1 if a case failed, else 0."""
    parser = ArgumentParser(
        prog="python -m experiments.gpu.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", default=list(MODULES), metavar="PART", help=", ".join(MODULES))
    parser.add_argument("--toy", action="store_true", help="tiny sizes, on any device; results are no measurements")
    parser.add_argument("--again", action="store_true", help="measure anew what this device has measured")
    parser.add_argument("--minutes", type=real(0.01, 1e6), default=MINUTES, help="for all parts together")
    parser.add_argument("--table", action="store_true", help="measure nothing: tables of the results there are")
    parser.add_argument(
        "--out", type=Path, help="file of the results, which --table expects to exist; README.md is not renewed"
    )
    parser.add_argument("--alone", choices=tuple(MODULES), help="run one part in this process, as the others do")
    args = parser.parse_args(argv)
    for name in args.parts:
        if name not in MODULES:
            raise unknown("--parts", name, MODULES)
    if args.toy and args.table:
        raise UserError("--table: results of --toy are no measurements: leave one of them out")
    out = args.out or (Path(tempfile.mkdtemp(prefix="vlm_jax_gpu_")) / "toy.jsonl" if args.toy else RESULTS)
    if args.alone:
        run_part(args.alone, out, args.toy, args.again, args.minutes)
        return 0
    if out.is_dir():
        raise UserError(f"--out {out}: expected a file, got a folder")
    if args.table and args.out and not results.read(out):
        raise UserError(f"--out {out}: expected a file with results, got none (measure them without --table)")
    start = time.monotonic()
    for index, part in enumerate(() if args.table else args.parts):
        end = start + 60 * args.minutes * sum(_SHARES[each] for each in args.parts[: index + 1])
        if code := start_part(part, out, args.toy, args.again, end - time.monotonic(), 60 * args.minutes * _SLACK):
            return code
    rows = results.read(out)
    text = table.markdown(rows, TOY if args.toy else GPU)
    if not (args.toy or args.out):
        write_block(HERE / "README.md", "results", text, "experiments.gpu.run")
    table.write_calibrations(out.parent, rows)
    print(f"{text}\n\nresults: {out}")
    return 1 if table.failures(results.newest(rows)) else 0


def start_part(part: str, out: Path, toy: bool, again: bool, secs: float, slack: float) -> int:
    """Runs a part in a new process: a crash or a hang is its result, and its memory is free afterwards. It begins no
    case after `secs`, and is killed `slack` seconds later. Returns the exit code of bad input, else 0.
    """
    command = [sys.executable, "-m", "experiments.gpu.run", "--alone", part, "--out", str(out)]
    command += [f"--minutes={max(secs, 1) / 60}", *["--toy"] * toy, *["--again"] * again]
    environment = {**os.environ, **_ENVIRONMENT.get(part, {})}
    try:
        code = subprocess.run(command, env=environment, timeout=max(secs, 1) + slack).returncode
        error = f"ended with exit code {code}" if code else ""
    except subprocess.TimeoutExpired:
        code, error = 0, "killed at the end of its time"
    if code == 2:
        return code
    if error:
        results.append(out, {"part": part, "name": "process", "device": None, "error": error})
    return 0


def run_part(part: str, out: Path, toy: bool, again: bool, minutes: float) -> None:
    """Measures the missing cases of a part. Raises `UserError` without a GPU whose peaks are known."""
    deadline = time.monotonic() + 60 * minutes
    import jax

    from experiments.gpu.cases import run_cases
    from vlm_jax import build
    from vlm_jax.sizing import chips

    device = jax.local_devices()[0]
    chip = chips.chip(TOY_CHIP) if toy else chips.of_device(device.device_kind)
    if not toy and (chip is None or device.platform not in ("gpu", "cuda")):
        raise UserError(
            f"expected an H100, H200 or A100, got {device.device_kind} (--toy tries the script on any device)"
        )
    if toy:
        jax.config.update("jax_disable_most_optimizations", True)
    build.use_compilation_cache(build.default_cache())
    found = results.Results(out, device.device_kind, jax.__version__)
    if again:
        found.forget(part)
    module: Any = importlib.import_module(f"experiments.gpu.{MODULES[part]}")
    cases = module.cases(TOY if toy else GPU, found, chip)
    run_cases(part, cases, found, deadline, _TOY_WORKERS if toy else _WORKERS)


if __name__ == "__main__":
    run_main(main)
