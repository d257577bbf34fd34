"""Runs cells by their index in the grid, for Slurm tasks and for every host of a TPU slice.

One cell runs in this process. Several run one after the other, each in its own process, so that a crash or a lost
connection to other hosts does not affect the next.
"""

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from experiments.launching import states
from experiments.launching.attempt import attempt, with_checkpoints
from experiments.launching.cells import Cell, rows_of
from vlm_jax.core.errors import STOPPED, RunStopped, UserError
from vlm_jax.core.interrupts import INTERRUPTED
from vlm_jax.distributed import processes

_NONE = -1  # in place of an index
_PATIENCE_SECS = 120  # a file server keeps the lock of a machine that died for a while


def parse(text: str, cells: list[Cell]) -> list[Cell]:
    """`"3"`, `"3,7"`, `"all"`, or `"1/4"`, the second of four shares of about the same cost.

    Raises `UserError` for an index that the grid does not have.
    """
    if text == "all":
        return cells
    number, slash, shares = text.partition("/")
    if slash:
        if not (_is_index(number) and _is_index(shares) and int(number) < int(shares)):
            raise UserError(f"--index {text[:80]}: expected share I/N with I from 0 to N - 1, as in 0/4")
        return sorted(cells, key=lambda cell: -cell.flops)[int(number) :: int(shares)]
    chosen = []
    for item in text.split(","):
        if not _is_index(item) or int(item) >= len(cells):
            raise UserError(
                f"--index {text[:80]}: the grid has cells 0 to {len(cells) - 1} (several: 3,7 or 0/4 or all)"
            )
        chosen.append(cells[int(item)])
    return chosen


def _is_index(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10


def run(chosen: list[Cell], cells: list[Cell], args: argparse.Namespace, console: Console) -> int:
    """Runs the chosen cells without a row; returns 1 if one fails."""
    rows = rows_of(chosen, args.workdir)
    for cell in chosen:
        if cell.is_done(rows):
            console.print(f"cell {cell.index} is done: {cell.name}", soft_wrap=True, markup=False)
    left = [cell for cell in chosen if not cell.is_done(rows)]
    if len(chosen) > 1:
        return _run_several(left, args, console)
    if not left:
        return 0
    with processes.init_distributed(args):
        if processes.is_primary():
            return _run_one(left[0], args.workdir, console)
        # Hosts whose last cell ended differently may be out of step: the cell of the primary counts.
        shared = processes.broadcast_from_primary(_NONE)
        if shared != _NONE:
            attempt(_saving(cells[shared]), lambda doing, share: None, processes.watch_sigterm())
        return 0


def _run_several(left: list[Cell], args: argparse.Namespace, console: Console) -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ends the process of the cell too
    failed = 0
    flags = ["--grid", args.grid, "--workdir", str(args.workdir), "--processes", args.processes]
    flags += [] if args.process is None else ["--process", str(args.process), "--coordinator", args.coordinator]
    for number, cell in enumerate(left, start=1):
        console.print(f"cell {cell.index}, {number} of {len(left)}: {cell.name}", soft_wrap=True, markup=False)
        command = [sys.executable, "-m", "experiments.launch", *flags, "--index", str(cell.index)]
        code = subprocess.run(command, check=False).returncode
        if code in (STOPPED, INTERRUPTED, -signal.SIGTERM, -signal.SIGINT):
            return STOPPED
        failed += code != 0
    console.print(f"{len(left) - failed} of {len(left)} cells done" if left else "nothing to do")
    return 1 if failed else 0


def _run_one(cell: Cell, workdir: Path, console: Console) -> int:
    # Slurm's warning before the time limit is for submitit, which puts the task back in the queue; then comes SIGTERM.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    with states.try_lock(cell, _PATIENCE_SECS) as mine:
        to_do = mine and not cell.is_done(rows_of([cell], workdir))
        processes.broadcast_from_primary(cell.index if to_do else _NONE)
        if not to_do:
            console.print(f"cell {cell.index}: {states.state_of(cell).text}", soft_wrap=True, markup=False)
            return 0 if mine else 1
        try:
            _attempt_with_bar(cell, console)
        except RunStopped:
            raise
        except Exception:
            if jax.process_count() > 1:
                raise  # the others wait for this process
            console.print(f"[red]failed[/] {escape(cell.name)}", soft_wrap=True)
            print("\n".join(states.error_of(cell)), file=sys.stderr)
            return 1
    console.print(states.state_of(cell).text, cell.name, highlight=False, soft_wrap=True, markup=False)
    return 0


def _attempt_with_bar(cell: Cell, console: Console) -> None:
    """Runs the cell with a progress bar, or a line per tenth if stdout is not a terminal."""
    write, started, printed = states.reporter(cell), time.monotonic(), ""
    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("starting", total=1.0)

        def report(doing: str, share: float) -> None:
            nonlocal printed
            write(doing, share)
            progress.update(bar, description=doing, completed=share)
            if not console.is_terminal and printed != (printed := f"{doing}, {int(10 * share) * 10} %"):
                console.print(f"{time.monotonic() - started:7.0f} s  {printed}")

        attempt(_saving(cell), report, processes.watch_sigterm())


def _saving(cell: Cell) -> Cell:
    return cell._replace(spec=with_checkpoints(cell.spec))
