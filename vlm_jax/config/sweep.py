"""Grids: `product(param("llm", "d24", "d48"), param("tokens", 1, 4)) + product(...)` is a tuple of cells."""

import itertools
from typing import Any, NamedTuple

from vlm_jax.config.arguments import load_file
from vlm_jax.core.errors import UserError

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
    """`"configs/grids/size_by_tokens.py:arg"` -> its grid. Raises `UserError` for a missing file or a repeated cell."""
    path, _, arg = location.partition(":")
    module = load_file(path)
    if not hasattr(module, "get_grid"):
        raise UserError(f"{path}: expected a function get_grid(arg), got none")
    grid = module.get_grid(arg)
    if not isinstance(grid, Grid):
        raise UserError(f"{path}: expected get_grid to return a Grid, got {type(grid).__name__}")
    names = [cell_name(cell) for cell in grid.cells]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(f"{path}: the grid names the cell {repeated[0]!r} {names.count(repeated[0])} times")
    return grid
