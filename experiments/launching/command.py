"""The command `experiments.launch`: its flags, and what it does with the cells of a grid."""

import argparse
import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from experiments.flags import whole
from experiments.launching import index, local, slices, slurm, tables
from experiments.launching.cells import Cell, cells_of, gather, open_workdir, rows_of
from experiments.launching.follow import conclude
from vlm_jax.cli import ArgumentParser
from vlm_jax.core.errors import UserError, unknown
from vlm_jax.core.rows import ResultRow
from vlm_jax.distributed import processes
from vlm_jax.sizing import chips

_LOG_WIDTH = 160
_BACKENDS = ("local", "slurm")
# The flags of Slurm, with their defaults.
_OF_SLURM = {"partition": None, "minutes": 240, "gpus": None, "cpus": None, "slurm": []}


def parse(argv: list[str], description: str | None) -> argparse.Namespace:
    """The flags, checked as far as they can be without the grid."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = ArgumentParser(prog="python -m experiments.launch", description=description, formatter_class=raw)
    parser.add_argument("--grid", required=True, help="configs/grids/FILE.py[:arguments]")
    parser.add_argument("--workdir", required=True, type=Path, help="rows.jsonl and one folder a cell")
    parser.add_argument("--backend", default="local", help=f"{', '.join(_BACKENDS)} (default: local)")
    parser.add_argument(
        "--workers", type=int, metavar="N",
        help="cells at a time: local, processes (default: one a GPU or TPU host, else one a core); slurm, tasks "
        "(default: 64)",
    )  # fmt: skip
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="print the cells and what they cost, run nothing")
    what.add_argument("--status", action="store_true", help="gather rows, show how far each cell is, run nothing")
    what.add_argument("--index", metavar="I", help="run cell I (or I,J, or share I/N, or all) here and now")
    parser.add_argument("--accelerator", metavar="TYPE", help="with --dry-run: minutes on a TPU slice, such as v6e-16")
    of_slurm = parser.add_argument_group("--backend slurm")
    of_slurm.add_argument("--partition")
    of_slurm.add_argument(
        "--minutes", type=whole(1), help="time limit of a task (default: 240); a longer cell goes on anew"
    )
    of_slurm.add_argument("--gpus", type=whole(0), help="GPUs a task")
    of_slurm.add_argument("--cpus", type=whole(1), help="cores a task")
    of_slurm.add_argument(
        "--slurm", action="append", metavar="NAME=VALUE", help="any other option of sbatch, such as account=lab"
    )
    processes.add_flags(parser)
    args = parser.parse_args(argv)
    if args.processes != "1" and args.index is None:
        raise UserError(
            f"--processes {args.processes} goes with --index: a launch is one process, its cells may be more"
        )
    if args.backend not in _BACKENDS:
        raise unknown("backend", args.backend, _BACKENDS)
    for name, default in _OF_SLURM.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif args.backend != "slurm":
            raise UserError(f"--{name} belongs to --backend slurm, got --backend {args.backend}")
    if args.accelerator and not args.dry_run:
        raise UserError("--accelerator goes with --dry-run; experiments/pod.sh runs a grid on a TPU slice")
    if args.workers is None:
        args.workers = 64 if args.backend == "slurm" else 1 if args.accelerator else local.default_workers()
    if args.workers < 1:
        raise UserError(f"--workers: expected at least 1, got {args.workers}")
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.stat(args.workdir)
    except (OSError, ValueError) as error:
        name = str(args.workdir)[:80]
        raise UserError(f"--workdir {name!a}: expected the name of a folder ({type(error).__name__})") from error
    path = next(path for path in (args.workdir, *args.workdir.absolute().parents) if os.path.lexists(path))
    if not path.is_dir():
        raise UserError(f"--workdir {args.workdir}: expected a folder, got the file {path} (choose another)")
    return args


def slurm_options(args: argparse.Namespace) -> slurm.Options:
    if wrong := [option for option in args.slurm if "=" not in option.strip("=")]:
        raise UserError(f"--slurm {wrong[0]}: write it as NAME=VALUE")
    more = dict(option.split("=", 1) for option in args.slurm)
    return slurm.Options(args.minutes, args.partition, args.gpus, args.cpus, args.workers, more)


def speed_of(args: argparse.Namespace, rows: dict[str, ResultRow]) -> tables.Speed | None:
    """How fast cells will train: as measured in this workdir, else as the figures of the TPU say."""
    if not args.accelerator:
        return tables.measured(rows.values())
    chip, count = slices.parse(args.accelerator)
    measured = tables.measured(row for row in rows.values() if chips.of_device(row.device) == chip)
    return measured or tables.assumed(chip, count)


def starter(left: list[Cell], args: argparse.Namespace, console: Console) -> Callable[[], None]:
    """The runner of the backend. Raises `UserError` for missing or invalid settings before anything is written."""
    if args.backend == "slurm":
        executor = slurm.make_executor(args.workdir / "slurm", slurm_options(args))
        slurm.queue()
        return lambda: slurm.run(left, args.grid, args.workdir, executor, console)
    return lambda: local.run(left, args.grid, args.workdir, args.workers, console)


def show_commands(left: list[Cell], args: argparse.Namespace, console: Console) -> None:
    """What a dry run can say of the backend."""
    if args.backend == "slurm" and left:
        console.print(f"one array of {len(left)} tasks, {slurm_options(args)}; the first task runs:", soft_wrap=True)
        console.print(
            *slurm.command(args.grid, args.workdir, left[0].index), soft_wrap=True, highlight=False, markup=False
        )


def show_status(cells: list[Cell], args: argparse.Namespace, console: Console) -> None:
    if not args.workdir.is_dir():
        raise UserError(f"--workdir {args.workdir}: no such folder, so no grid was launched there")
    open_workdir(args.workdir)
    tables.show_status(cells, gather(cells, args.workdir), console)


def main(argv: list[str], description: str | None = None) -> int:
    """Plans, shows or runs the grid. Raises `UserError`, also where a file of the workdir cannot be read or written."""
    args = parse(argv, description)
    try:
        return _run(args)
    except OSError as error:
        where = error.filename2 or error.filename or f"{args.workdir}, or where the output goes"
        raise UserError(f"{where}: {error.strerror or error} (mend it, or choose another --workdir)") from error


def _run(args: argparse.Namespace) -> int:
    console = Console()
    if not console.is_terminal:  # a log or a pipe
        console = Console(width=_LOG_WIDTH)
    cells = cells_of(args.grid, args.workdir)
    if args.status:
        show_status(cells, args, console)
        return 0
    if args.index is not None:
        chosen = index.parse(args.index, cells)
        open_workdir(args.workdir)
        return index.run(chosen, cells, args, console)
    rows = rows_of(cells, args.workdir)
    left = [cell for cell in cells if not cell.is_done(rows)]
    if args.accelerator:
        slices.check_batches(left, args.accelerator)
    tables.show_plan(cells, rows, speed_of(args, rows), args.workers, console)
    if args.dry_run:
        show_commands(left, args, console)
        return 0
    start = starter(left, args, console)
    open_workdir(args.workdir)
    gather(cells, args.workdir)
    if left:
        start()
    rows = gather(cells, args.workdir)
    without = [cell for cell in cells if not cell.is_done(rows)]
    return conclude(without, args.workdir, console)
