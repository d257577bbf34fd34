"""Run a grid: every cell once, finished cells skipped, a failing cell reported and survived.

    python -m experiments.launch --grid configs/grids/size_by_tokens.py --workdir workdirs/study --dry-run
    python -m experiments.launch --grid configs/grids/size_by_tokens.py --workdir workdirs/study --workers 4

Run it again to do what is missing; run it twice at once and the two share the cells. Rows go to WORKDIR/rows.jsonl.
"""

import argparse
import json
import os
import selectors
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from vlm_jax.config.arguments import load_config
from vlm_jax.config.resolve import resolve
from vlm_jax.config.sweep import cell_name, load_grid
from vlm_jax.core.errors import Flags, UserError, door
from vlm_jax.core.specs import RunSpec, spec_hash, total_steps
from vlm_jax.sizing import cost
from vlm_jax.store import results

# Start-up, tracing, compiling and evaluating cost a small cell about as much as this many FLOPs of training.
_FIXED_FLOPS = 2e11


class Cell(NamedTuple):
    name: str
    spec: RunSpec
    flops: float
    done: bool


def cells_of(grid_location: str, workdir: Path) -> list[Cell]:
    """Every cell, resolved, with its training cost. Raises `UserError` for a cell that cannot be."""
    grid = load_grid(grid_location)
    rows = workdir / "rows.jsonl"
    done = results.done(rows)
    cells = []
    for cell in grid.cells:
        name = cell_name(cell)
        try:
            spec = resolve(load_config(f"{grid.config}:{name}"))
        except UserError as error:
            raise UserError(f"cell {name}: {error}") from error
        cells.append(Cell(name, spec, cost.run_flops(spec), spec_hash(spec) in done))
    return cells


def show(cells: list[Cell], console: Console) -> None:
    """The grid as a table, with what each cell will cost."""
    table = Table(box=None)
    table.add_column("cell", no_wrap=True, min_width=max((len(cell.name) for cell in cells), default=0))
    for name in ("LLM params", "V", "steps", "FLOPs", "state"):
        table.add_column(name, justify="right")
    for cell in cells:
        params = cost.decoder_params(cell.spec.model.decoder, "excluded")
        steps = total_steps(cell.spec)
        state = "[green]done[/]" if cell.done else "to do"
        table.add_row(
            cell.name, f"{params:,}", str(cell.spec.model.compressor.tokens), f"{steps:,}", f"{cell.flops:.2e}", state
        )
    console.print(table)
    left = [cell for cell in cells if not cell.done]
    console.print(f"{len(cells)} cells, {len(left)} to do, {sum(cell.flops for cell in left):.2e} training FLOPs\n")


def has_accelerator() -> bool:
    """Whether this machine has a TPU or an NVIDIA GPU that JAX may use; asking JAX would take the device."""
    devices = ("accel*", "vfio/[0-9]*", "nvidia[0-9]*")
    return os.environ.get("JAX_PLATFORMS") != "cpu" and any(any(Path("/dev").glob(name)) for name in devices)


def cores() -> list[int]:
    """The cores this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def default_workers() -> int:
    """One process where there is an accelerator, which belongs to one process; one a core on a CPU."""
    return 1 if has_accelerator() else len(cores())


def start_worker(index: int, workers: int, grid: str, workdir: Path, since: float) -> subprocess.Popen[bytes]:
    """A worker on its own share of the cores: two single-threaded programs finish before one two-threaded one."""
    command = [sys.executable, "-m", "experiments.worker", "--grid", grid, "--workdir", str(workdir)]
    command += ["--since", str(since)]
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if not has_accelerator():
        # Small cells spend more time compiling than a better program would win back.
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} --xla_backend_optimization_level=1".strip()
        if shutil.which("taskset") and workers <= len(cores()):
            command = ["taskset", "-c", ",".join(map(str, cores()[index::workers])), *command]
    with open(workdir / f"worker{index}.log", "ab") as log:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment, bufsize=0)


def events(grid: str, workdir: Path, workers: int) -> Iterator[dict[str, Any]]:
    """Events of all workers until none is left. A worker that dies at a cell is replaced; the cell is left alone."""
    selector, since = selectors.DefaultSelector(), time.time()
    running: dict[int, str] = {}

    def start(index: int) -> None:
        process = start_worker(index, workers, grid, workdir, since)
        selector.register(process.stdout, selectors.EVENT_READ, (index, process))

    for index in range(workers):
        start(index)
    try:
        while selector.get_map():
            for key, _ in selector.select():
                index, process = key.data
                line = key.fileobj.readline()
                if line:
                    event = json.loads(line)
                    running[index] = event["cell"]
                    if event["event"] in ("done", "failed"):
                        del running[index]
                    yield event
                    continue
                selector.unregister(key.fileobj)
                if process.wait() != 0:
                    cell = running.pop(index, None)
                    if cell is None:
                        raise UserError(f"worker {index} ended outside a cell: see {workdir / f'worker{index}.log'}")
                    (workdir / "cells" / cell / "error.txt").write_text(
                        f"its process ended with {process.returncode}\n"
                    )
                    yield {"event": "failed", "cell": cell}
                    start(index)
    finally:
        for key in list(selector.get_map().values()):
            key.data[1].terminate()


def run(cells: list[Cell], grid: str, workdir: Path, workers: int, console: Console) -> list[str]:
    """Runs what is to do; returns the names of the cells that failed."""
    left = {cell.name: cell.flops + _FIXED_FLOPS for cell in cells if not cell.done}
    total, finished, failed = sum(left.values()), 0.0, []
    shares: dict[str, float] = {}
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
        TextColumn("{task.fields[count]}"), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=True),
    )  # fmt: skip
    with Progress(*columns, console=console, speed_estimate_period=3600) as progress:
        bar = progress.add_task("data, features, programs", total=total, count=f"0/{len(left)} cells")
        for event in events(grid, workdir, min(workers, len(left))):
            name = event["cell"]
            if event["event"] == "step":
                shares[name] = event["share"]
            if event["event"] in ("done", "failed"):
                shares.pop(name, None)
                finished += left.pop(name, 0.0)
                if event["event"] == "failed":
                    failed.append(name)
                    progress.console.print(f"[red]failed[/] {name}")
                else:
                    progress.console.print(f"error {event['error']:.3f} ± {event['stderr']:.3f}  {name}")
            so_far = finished + sum(left.get(n, 0.0) * share for n, share in shares.items())
            count = f"{len(cells) - len(left) - sum(c.done for c in cells)}/{sum(not c.done for c in cells)} cells"
            if event["event"] != "start":  # before its first step, a worker makes data and features, and compiles
                progress.update(bar, description="training")
            progress.update(bar, completed=so_far, count=count)
    return failed


def report_failures(failed: list[str], workdir: Path, console: Console) -> None:
    for name in failed:
        error = workdir / "cells" / name / "error.txt"
        lines = error.read_text().strip().splitlines()[-3:]
        console.print(f"[red]failed[/] {name} ({error})", *lines, sep="\n    ")


def main(argv: list[str]) -> int:
    parser = Flags(
        prog="python -m experiments.launch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--grid", required=True, help="configs/grids/FILE.py[:arguments]")
    parser.add_argument("--workdir", required=True, type=Path, help="rows.jsonl and one folder a cell")
    parser.add_argument(
        "--workers", type=int, default=default_workers(), help="processes (default: one a core, or one an accelerator)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the cells and what they cost, run nothing")
    args = parser.parse_args(argv)
    console = Console()
    cells = cells_of(args.grid, args.workdir)
    show(cells, console)
    if args.dry_run or all(cell.done for cell in cells):
        return 0
    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: at least 1")
    args.workdir.mkdir(parents=True, exist_ok=True)
    failed = run(cells, args.grid, args.workdir, args.workers, console)
    report_failures(failed, args.workdir, console)
    done = results.done(args.workdir / "rows.jsonl")
    elsewhere = [cell for cell in cells if spec_hash(cell.spec) not in done and cell.name not in failed]
    if elsewhere:
        console.print(
            f"{len(elsewhere)} cells are being run by another launch on this workdir; run again when it has ended"
        )
    console.print(f"rows: {args.workdir / 'rows.jsonl'}")
    return 1 if failed or elsewhere else 0


if __name__ == "__main__":
    door(main)()
