"""The cells of a grid and their rows.

Whoever runs a cell writes its row whole into `WORKDIR/cells/NAME/row.json`. `rows.jsonl` is the table of them that the
other commands read: `gather` adds what is missing. So the machines that train share no file that they append to, and a
bucket or a copied folder will do.
"""

import os
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from vlm_jax.config.arguments import load_config
from vlm_jax.config.resolve import resolve
from vlm_jax.config.sweep import cell_name, load_grid
from vlm_jax.core.errors import UserError
from vlm_jax.core.files import write_text
from vlm_jax.core.rows import ResultRow
from vlm_jax.core.specs import RunSpec, spec_hash
from vlm_jax.evaluation import results
from vlm_jax.sizing import cost


class Cell(NamedTuple):
    index: int  # in the grid
    name: str
    spec: RunSpec
    spec_hash: str
    flops: float  # of its training
    folder: Path  # checkpoints, metrics, lock, row


def cells_of(grid_location: str, workdir: Path) -> list[Cell]:
    """Every cell, resolved. Raises `UserError` for a cell that cannot be, and for two that are one experiment."""
    grid = load_grid(grid_location)
    cells: list[Cell] = []
    names: dict[str, str] = {}
    for index, arguments in enumerate(grid.cells):
        name = cell_name(arguments)
        try:
            spec = resolve(load_config(f"{grid.config}:{name}"))
        except UserError as error:
            raise UserError(f"cell {name}: {error}") from error
        digest = spec_hash(spec)
        if digest in names:
            raise UserError(f"{grid_location}: cells {names[digest]} and {name} are one experiment; drop one of them")
        names[digest] = name
        cells.append(Cell(index, name, spec, digest, cost.run_flops(spec), workdir / "cells" / name))
    return cells


def row_of(cell: Cell) -> ResultRow | None:
    """The row that was written in the cell's folder, if it is one of this experiment."""
    path = cell.folder / "row.json"
    if not path.exists():
        return None
    (row,) = results.read(path)
    return row if row.spec_hash == cell.spec_hash else None


def write_row(cell: Cell, row: ResultRow) -> None:
    """Writes the row to the cell's folder."""
    path = cell.folder / "row.json"
    write_text(path, results.to_line(row, path))


def rows_of(cells: list[Cell], workdir: Path) -> dict[str, ResultRow]:
    """By `spec_hash`, the rows that these cells have so far, gathered or not."""
    table = workdir / "rows.jsonl"
    wanted = {cell.spec_hash for cell in cells}
    rows = {row.spec_hash: row for row in (results.read(table) if table.exists() else ()) if row.spec_hash in wanted}
    for cell in cells:
        if cell.spec_hash not in rows and (row := row_of(cell)):
            rows[cell.spec_hash] = row
    return rows


def gather(cells: list[Cell], workdir: Path) -> dict[str, ResultRow]:
    """Adds to `rows.jsonl` the rows of cells that it lacks, each once, however many launchers do so at a time."""
    with FileLock(workdir / "rows.lock"):
        table = workdir / "rows.jsonl"
        there = results.done(table)
        rows = rows_of(cells, workdir)
        for cell in cells:
            if cell.spec_hash in rows and cell.spec_hash not in there:
                results.append(table, rows[cell.spec_hash])
    return rows


def open_workdir(workdir: Path) -> None:
    """Makes the workdir. Raises `UserError` where that, or writing in it, is not possible."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir {workdir}: cannot be made ({error.strerror}); choose another") from error
    if not os.access(workdir, os.W_OK | os.X_OK):
        raise UserError(f"--workdir {workdir}: no right to write there; choose another")
