"""The whole study in minutes: data, a grid of small models, the law, a plan, a page.

    python -m experiments.demo --workdir workdirs/demo          # what `make demo` runs

A second run finds every row there and only draws again.
"""

import argparse
from pathlib import Path

from rich.console import Console

from vlm_jax.cli import ArgumentParser, run_main

GRID = Path(__file__).parents[1] / "configs" / "grids" / "demo.py"


def main(argv: list[str]) -> int:
    parser = ArgumentParser(
        prog="python -m experiments.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, default=Path("workdirs/demo"))
    parser.add_argument("--workers", type=int, help="processes (default: one a GPU or TPU host, else one a core)")
    args = parser.parse_args(argv)
    _step(1, f"train and evaluate a grid of small models in {args.workdir}")
    with Console(stderr=True).status("importing JAX"):
        from experiments.launching import command
    workers = [] if args.workers is None else ["--workers", str(args.workers)]
    failed = command.main(["--grid", str(GRID), "--workdir", str(args.workdir), *workers])
    if failed:
        return failed
    _step(2, "fit the law, plan, draw")
    from experiments import report

    report.report(args.workdir)
    return 0


def _step(number: int, what: str) -> None:
    """Printed before the slow imports, so that the first line appears at once."""
    print(f"step {number} of 2: {what}", flush=True)


if __name__ == "__main__":
    run_main(main)
