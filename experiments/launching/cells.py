"""The cells of a grid and their rows.

A cell's row is written to `WORKDIR/cells/NAME/row.json`, one for each V of an elastic compressor. `gather` adds
missing rows to `rows.jsonl`, which the other commands read. So training machines append to no shared file, and a bucket
or a copied folder works too.
"""

import os
from collections.abc import Container
from pathlib import Path
from typing import NamedTuple

from vlm_jax.config.arguments import load_config
from vlm_jax.config.resolve import resolve
from vlm_jax.config.sweep import cell_name, load_grid
from vlm_jax.core.errors import UserError
from vlm_jax.core.files import file_lock, write_text
from vlm_jax.core.rows import ResultRow
from vlm_jax.core.specs import RunSpec, at_every_v, spec_hash
from vlm_jax.evaluation import results
from vlm_jax.sizing import cost


class Cell(NamedTuple):
    index: int  # in the grid
    name: str
    spec: RunSpec
    spec_hash: str
    row_hashes: tuple[str, ...]  # `spec_hash` of each of its rows; its own is the last
    flops: float  # of its training
    folder: Path  # checkpoints, metrics, lock, row

    def is_done(self, rows: Container[str]) -> bool:
        """Whether all its rows are among those of these hashes."""
        return all(digest in rows for digest in self.row_hashes)


def cells_of(grid_location: str, workdir: Path) -> list[Cell]:
    """The resolved cells of a grid. Raises `UserError` for invalid cells and for two with the same spec."""
    grid = load_grid(grid_location)
    cells: list[Cell] = []
    names: dict[str, str] = {}
    for index, arguments in enumerate(grid.cells):
        name = cell_name(arguments)
        try:
            spec = resolve(load_config(f"{grid.config}:{name}"))
        except UserError as error:
            raise UserError(f"cell {name}: {error}") from error
        hashes = tuple(spec_hash(at) for at in at_every_v(spec))
        digest = hashes[-1]
        if digest in names:
            raise UserError(f"{grid_location}: {names[digest]} and {name} have the same spec (drop one)")
        names[digest] = name
        cells.append(Cell(index, name, spec, digest, hashes, cost.run_flops(spec), workdir / "cells" / name))
    return cells


def row_of(cell: Cell) -> ResultRow | None:
    """The row in the cell's folder if it is of this spec."""
    return _written(cell).get(cell.spec_hash)


def _written(cell: Cell) -> dict[str, ResultRow]:
    """The rows in the cell's folder by `spec_hash`, if they are of this spec."""
    path, hashes = cell.folder / "row.json", cell.row_hashes
    if not path.exists():
        return {}
    rows = results.read(path)
    if len(rows) != len(hashes):
        expected = "one row" if len(hashes) == 1 else f"{len(hashes)} rows"
        raise UserError(f"{path}: expected {expected}, got {len(rows)} (delete it and run the cell again)")
    return {row.spec_hash: row for row in rows} if tuple(row.spec_hash for row in rows) == hashes else {}


def write_row(cell: Cell, *rows: ResultRow) -> None:
    """Writes the cell's row, or its rows in the order of their V."""
    path = cell.folder / "row.json"
    write_text(path, "".join(results.to_line(row, path) for row in rows))


def rows_of(cells: list[Cell], workdir: Path) -> dict[str, ResultRow]:
    """The rows of these cells by `spec_hash`, gathered or not."""
    table = workdir / "rows.jsonl"
    hashes = {digest for cell in cells for digest in cell.row_hashes}
    rows = {row.spec_hash: row for row in (results.read(table) if table.exists() else ()) if row.spec_hash in hashes}
    for cell in cells:
        if not cell.is_done(rows):
            rows |= _written(cell)
    return rows


def gather(cells: list[Cell], workdir: Path) -> dict[str, ResultRow]:
    """Adds missing rows of cells to `rows.jsonl`, under a lock, and returns all rows."""
    with file_lock(workdir / "rows.lock"):
        table = workdir / "rows.jsonl"
        stored = results.done(table)
        rows = rows_of(cells, workdir)
        for digest in (digest for cell in cells for digest in cell.row_hashes):
            if digest in rows and digest not in stored:
                results.append(table, rows[digest])
    return rows


def open_workdir(workdir: Path) -> None:
    """Creates the workdir. Raises `UserError` if it cannot be created or written."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir {workdir}: cannot create: {error.strerror} (choose another)") from error
    if not os.access(workdir, os.W_OK | os.X_OK):
        raise UserError(f"--workdir {workdir}: cannot write: permission denied (choose another)")
