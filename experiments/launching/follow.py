"""Progress of a running grid: a bar with time left, a line per finished cell, and failures at the end."""

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from experiments.launching import states
from experiments.launching.cells import Cell, gather

# Start-up, tracing, compiling and evaluating cost a small cell about as much as this many FLOPs of training.
_FIXED_FLOPS = 2e11
_ERROR_LINES = 3


def follow(
    left: list[Cell], workdir: Path, going: Callable[[], bool], console: Console, look_every_secs: float
) -> None:
    """Shows progress and gathers rows while `going()` is true."""
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
        TextColumn("{task.fields[count]}"), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    ended: dict[str, states.State] = {}
    weights = {cell.name: cell.flops + _FIXED_FLOPS for cell in left}
    with Progress(*columns, console=console, speed_estimate_period=3600) as progress:
        bar = progress.add_task("starting", total=sum(weights.values()), count=f"0/{len(left)} cells")
        while True:
            more = going()
            now = {cell.name: ended.get(cell.name) or states.state_of(cell) for cell in left}
            news = [cell for cell in left if cell.name not in ended and now[cell.name].kind in ("done", "failed")]
            ended |= {cell.name: now[cell.name] for cell in news}
            for cell in news:
                kind, text = now[cell.name].kind, now[cell.name].text
                label = escape(text) if kind == "done" else "[red]failed[/]"
                console.print(label, escape(cell.name), highlight=False, soft_wrap=True)
            if any(now[cell.name].kind == "done" for cell in news):
                gather(left, workdir)
            doing = Counter(state.doing for state in now.values() if state.kind == "running")
            shares = {name: 1.0 if state.kind == "failed" else state.share for name, state in now.items()}
            progress.update(
                bar,
                description=", ".join(f"{what} {n}" for what, n in doing.items())
                or ("ended" if len(ended) == len(left) else "starting"),
                completed=sum(weights[name] * share for name, share in shares.items()),
                count=f"{len(ended)}/{len(left)} cells",
            )
            if not more:
                return
            time.sleep(look_every_secs)


def conclude(without: list[Cell], workdir: Path, console: Console) -> int:
    """Prints which cells have no row and why; returns the exit code."""
    failed = [cell for cell in without if states.error_of(cell)]
    for cell in failed:
        head, lines = f"{cell.name} ({cell.folder / 'error.txt'})", states.error_of(cell)[-_ERROR_LINES:]
        text = escape("\n    ".join([head, *lines]))
        console.print(f"[red]failed[/] {text}", highlight=False, soft_wrap=True)
    if elsewhere := len(without) - len(failed):
        console.print(f"without a row yet, run by another launch or cut off: {elsewhere}; see --status, and run again")
    console.print(f"rows: {workdir / 'rows.jsonl'}", soft_wrap=True)
    return 1 if without else 0
