"""The whole study in minutes: data, a grid of small models, the law, a plan, a page.

    python -m experiments.demo --workdir workdirs/demo          # what `make demo` runs

A second run finds every row there and only draws again.
"""

import argparse
from pathlib import Path

from experiments import launch, report
from experiments.launching import local
from vlm_jax.cli import ArgumentParser, run_main

GRID = Path(__file__).parents[1] / "configs" / "grids" / "demo.py"


def main(argv: list[str]) -> int:
    parser = ArgumentParser(
        prog="python -m experiments.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, default=Path("workdirs/demo"))
    parser.add_argument("--workers", type=int, default=local.default_workers(), help="processes")
    args = parser.parse_args(argv)
    failed = launch.main(["--grid", str(GRID), "--workdir", str(args.workdir), "--workers", str(args.workers)])
    if failed:
        return failed
    report.report(args.workdir)
    return 0


if __name__ == "__main__":
    run_main(main)
