"""Grids: `product(param("llm", "d24", "d48"), param("tokens", 1, 4)) + product(...)` is a tuple of cells."""

import itertools
import reprlib
from typing import Any, NamedTuple

from vlm_jax.config.arguments import call_function
from vlm_jax.core.errors import UserError

_NAME_BYTES = 255  # of a folder
Cells = tuple[dict[str, Any], ...]


class Grid(NamedTuple):
    """A config file and its argument sets, one a cell."""

    config: str
    cells: Cells


def param(name: str, *values: Any) -> Cells:
    """One argument over its values."""
    return tuple({name: value} for value in values)


def product(*sets: Cells) -> Cells:
    """Every combination, the first set slowest."""
    return tuple({k: v for part in parts for k, v in part.items()} for parts in itertools.product(*sets))


def cell_name(cell: dict[str, Any]) -> str:
    """`{"llm": "d24", "tokens": 1}` -> `"llm=d24,tokens=1"`: the config's argument string, and the cell's folder."""
    return ",".join(f"{name}={value}" for name, value in cell.items())


def load_grid(location: str) -> Grid:
    """`"configs/grids/size_by_tokens.py:arg"` -> its grid. Raises `UserError` for a missing file, an error
    in it, a repeated cell or one whose name is no folder's."""
    path, _, arg = location.partition(":")
    grid = call_function(path, "get_grid", arg)
    if not isinstance(grid, Grid):
        raise UserError(f"{path}: expected get_grid to return a Grid, got {type(grid).__name__}")
    if not isinstance(grid.config, str) or not isinstance(grid.cells, tuple | list):
        raise UserError(f"{path}: expected Grid(CONFIG, CELLS), got {reprlib.repr(tuple(grid))}")
    for i, cell in enumerate(grid.cells):
        if not isinstance(cell, dict):
            raise UserError(f"{path}: cell {i}: expected a dict of arguments, got {reprlib.repr(cell)}")
        name = cell_name(cell)
        if "/" in name or not name.isprintable() or len(name.encode(errors="replace")) > _NAME_BYTES:
            raise UserError(f"{path}: cell {i}: expected arguments that make the name of a folder, got {name[:80]!a}")
    names = [cell_name(cell) for cell in grid.cells]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(f"{path}: the grid names the cell {repeated[0]!r} {names.count(repeated[0])} times")
    return grid
