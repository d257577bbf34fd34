"""A grid as a table: what it will cost, and how far it is."""

import statistics
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.launching import states
from experiments.launching.cells import Cell
from vlm_jax.core.rows import ResultRow
from vlm_jax.core.specs import total_steps
from vlm_jax.sizing import chips, cost

_COLOURS = {"done": "green", "failed": "red", "running": "yellow", "waiting": "default"}


class Speed(NamedTuple):
    """How fast cells train, and how that is known."""

    flops_per_sec: float
    source: str


def measured(rows: Iterable[ResultRow]) -> Speed | None:
    """The median over the rows of the device that most were trained on; a cell that was cut off and went on counts the
    seconds of its last part alone, which a median withstands. None without rows."""
    trainings = {(row.cell, row.device, row.train_secs): row for row in rows if row.train_secs > 0}
    rows = list(trainings.values())  # one of those that a training gave
    if not rows:
        return None
    device, _ = Counter(row.device for row in rows).most_common(1)[0]
    rates = [row.train_flops / row.train_secs for row in rows if row.device == device]
    return Speed(statistics.median(rates), f"as {len(rates)} rows here took on {device}")


def assumed(chip: chips.Chip, count: int) -> Speed:
    """A share of the chips' published peak: an assumption, and a small model will not reach it."""
    share = chips.ASSUMED.compute
    return Speed(chip.peak_flops * count * share, f"at {share:.0%} of the peak of {count} x {chip.name}, an assumption")


def show_plan(
    cells: list[Cell], rows: dict[str, ResultRow], speed: Speed | None, at_once: int, console: Console
) -> None:
    """What each cell will cost, and what is to do."""
    table = Table(box=None)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("cell", overflow="fold")
    for name in ("LLM params", "V", "steps", "FLOPs", *(["minutes"] if speed else []), "state"):
        table.add_column(name, justify="right", no_wrap=True)
    for cell in cells:
        model = cell.spec.model
        numbers = [
            f"{cost.decoder_params(model.decoder, 'excluded'):,}",
            str(model.compressor.tokens),
            f"{total_steps(cell.spec):,}",
            f"{cell.flops:.2e}",
            *([_minutes(cell.flops / speed.flops_per_sec)] if speed else []),
            "[green]done[/]" if cell.is_done(rows) else "to do",
        ]
        table.add_row(str(cell.index), escape(cell.name), *numbers)
    console.print(table)
    flops = sum(cell.flops for cell in cells if not cell.is_done(rows))
    count = sum(not cell.is_done(rows) for cell in cells)
    console.print(f"{len(cells)} cells, {count} to do, {flops:.2e} training FLOPs", soft_wrap=True)
    if not speed:
        console.print("minutes are shown once a row here has measured the speed")
    elif count:
        secs = flops / speed.flops_per_sec / min(at_once, count)
        console.print(
            f"about {_minutes(secs)} min of training with {at_once} at a time, {speed.source}; compiling comes on top",
            soft_wrap=True,
        )
    console.print()


def show_status(cells: list[Cell], rows: dict[str, ResultRow], console: Console) -> None:
    """How far each cell is."""
    table = Table(box=None)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("cell", overflow="fold")
    table.add_column("state", no_wrap=True)
    table.add_column("", overflow="fold")
    kinds: Counter[str] = Counter()
    for cell in cells:
        state = states.state_of(cell, rows.get(cell.spec_hash))
        kinds[state.kind] += 1
        table.add_row(
            str(cell.index), escape(cell.name), f"[{_COLOURS[state.kind]}]{state.kind}[/]", escape(state.text)
        )
    console.print(table)
    console.print(", ".join(f"{kinds[kind]} {kind}" for kind in _COLOURS))


def _minutes(secs: float) -> str:
    minutes = secs / 60
    return "<0.1" if minutes < 0.1 else f"{minutes:.1f}" if minutes < 10 else f"{minutes:,.0f}"
