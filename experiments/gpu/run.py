"""Everything that only a GPU can show, in one command: `python -m experiments.gpu.run`.

    python -m experiments.gpu.run                  # on one H100 or H200: about 12 minutes; renews README.md
    python -m experiments.gpu.run --toy            # on a CPU: tries the script at tiny sizes
    python -m experiments.gpu.run --table          # renews README.md from results.jsonl, without measuring

The parts run in this order, each in a process and with a time budget of its own: correctness, training, transformers,
planner. Every result is a line of results.jsonl as soon as it is there; a second run measures what is missing, and what
failed.
"""

import importlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from experiments.gpu import results, table
from experiments.gpu.sizes import GPU, TOY, TOY_CHIP
from experiments.readme import write_block
from vlm_jax.cli import make_parser, run_main
from vlm_jax.core.errors import UserError, unknown
from vlm_jax.core.files import write_text

HERE = Path(__file__).parent
RESULTS = HERE / "results.jsonl"
MODULES = {"correctness": "correctness", "training": "training", "transformers": "beside", "planner": "planner"}
SECS = {"correctness": 150, "training": 240, "transformers": 150, "planner": 150}  # budgets
_GRACE_SECS = 45  # for the case that runs when a budget ends
# torch allocates on the same GPU.
_ENVIRONMENT = {"transformers": {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}}
_WORKERS = 4  # programs that are compiled at a time
_TOY_WORKERS = 2


def main(argv: list[str]) -> int:
    """Runs the parts; returns the exit code of the first that could not start, else 0."""
    parser = make_parser("run", __doc__)
    parser.prog = "python -m experiments.gpu.run"
    parser.add_argument("--parts", nargs="+", default=list(MODULES), metavar="PART", help=", ".join(MODULES))
    parser.add_argument("--toy", action="store_true", help="tiny sizes, on any device; results are no measurements")
    parser.add_argument("--again", action="store_true", help="measure everything anew")
    parser.add_argument("--table", action="store_true", help="renew README.md from results.jsonl alone")
    parser.add_argument("--out", type=Path, help="file of the results; README.md is not renewed")
    parser.add_argument("--alone", choices=tuple(MODULES), help="run one part in this process, as the others do")
    args = parser.parse_args(argv)
    for name in args.parts:
        if name not in MODULES:
            raise unknown("--parts", name, MODULES)
    if args.toy and args.table:
        raise UserError("--table: results of --toy are no measurements: leave one of them out")
    out = args.out or (Path(tempfile.mkdtemp(prefix="vlm_jax_gpu_")) / "toy.jsonl" if args.toy else RESULTS)
    if args.alone:
        run_part(args.alone, out, args.toy)
        return 0
    if not args.table:
        if args.again:
            write_text(out, "")
        for part in args.parts:
            if code := start_part(part, out, args.toy):
                return code
    if not (args.toy or args.out):
        write_block(HERE / "README.md", "results", table.markdown(results.read(out), GPU), "experiments.gpu.run")
    failed = [row for row in results.newest(results.read(out)) if "error" in row or row.get("ok") is False]
    print(f"results: {out}; {len(failed)} failed or out of tolerance")
    for row in failed:
        print(f"  {row['part']}: {row['name']}: {row.get('error', 'out of tolerance')}")
    return 0


def start_part(part: str, out: Path, toy: bool) -> int:
    """Runs a part in a new process: a crash or a hang is its result, and its memory is free afterwards. Returns the
    exit code of bad input, else 0.
    """
    command = [sys.executable, "-m", "experiments.gpu.run", "--alone", part, "--out", str(out), *["--toy"] * toy]
    environment = {**os.environ, **_ENVIRONMENT.get(part, {})}
    try:
        code = subprocess.run(command, env=environment, timeout=SECS[part] + _GRACE_SECS).returncode
        error = f"ended with exit code {code}" if code else ""
    except subprocess.TimeoutExpired:
        code, error = 0, f"killed after {SECS[part] + _GRACE_SECS} s"
    if code == 2:
        return code
    if error:
        results.append(out, {"part": part, "name": "process", "device": None, "error": error})
    return 0


def run_part(part: str, out: Path, toy: bool) -> None:
    """Measures the missing cases of a part. Raises `UserError` without a GPU whose peaks are known."""
    deadline = time.monotonic() + SECS[part]
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
    module: Any = importlib.import_module(f"experiments.gpu.{MODULES[part]}")
    cases = module.cases(TOY if toy else GPU, found, chip)
    run_cases(part, cases, found, deadline, _TOY_WORKERS if toy else _WORKERS)


if __name__ == "__main__":
    run_main(main)
