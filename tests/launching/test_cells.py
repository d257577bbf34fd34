"""Cells of a grid, and their rows: whole or not there, gathered once."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from experiments.launching import cells as module
from experiments.launching import tables
from experiments.launching.attempt import with_checkpoints
from experiments.launching.cells import Cell
from tests.launching.conftest import ROOT, row
from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import spec_hash
from vlm_jax.evaluation import results
from vlm_jax.sizing import chips


def test_rows_are_gathered_once_in_the_order_of_the_grid(cells: list[Cell], workdir: Path) -> None:
    for cell in (cells[2], cells[0]):
        module.write_row(cell, row(cell))
    assert set(module.rows_of(cells, workdir)) == {cells[0].spec_hash, cells[2].spec_hash}
    assert not (workdir / "rows.jsonl").exists()
    for _ in range(2):
        module.gather(cells, workdir)
    assert [r.cell for r in results.read(workdir / "rows.jsonl")] == [cells[0].name, cells[2].name]
    module.write_row(cells[1], row(cells[1]))
    module.gather(cells, workdir)
    assert [r.cell for r in results.read(workdir / "rows.jsonl")] == [cells[i].name for i in (0, 2, 1)]


def test_a_row_that_was_gathered_long_ago_is_enough(cells: list[Cell], workdir: Path) -> None:
    results.append(workdir / "rows.jsonl", row(cells[1]))
    assert set(module.gather(cells, workdir)) == {cells[1].spec_hash}
    assert len(results.read(workdir / "rows.jsonl")) == 1


def test_a_row_of_another_experiment_in_the_folder_does_not_count(cells: list[Cell], workdir: Path) -> None:
    module.write_row(cells[0], dataclasses.replace(row(cells[0]), spec_hash="000000000000"))
    assert module.gather(cells, workdir) == {}
    assert not (workdir / "rows.jsonl").exists()


def test_a_row_that_cannot_be_written_leaves_the_old_one(cells: list[Cell]) -> None:
    module.write_row(cells[0], row(cells[0]))
    with pytest.raises(UserError, match="stderr=nan"):
        module.write_row(cells[0], dataclasses.replace(row(cells[0]), stderr=float("nan")))
    assert module.row_of(cells[0]) == row(cells[0])


def _gather(location: str, workdir: Path) -> None:
    module.gather(module.cells_of(location, workdir), workdir)


def test_launchers_that_gather_at_once_add_each_row_once(grid: str, cells: list[Cell], workdir: Path) -> None:
    for cell in cells:
        module.write_row(cell, row(cell))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(_gather, [grid] * 4, [workdir] * 4))
    assert [r.cell for r in results.read(workdir / "rows.jsonl")] == [cell.name for cell in cells]


def test_two_cells_of_one_experiment_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.py"
    path.write_text(
        "from vlm_jax.config.sweep import Grid\n"
        f"def get_grid(arg): return Grid('{ROOT}/configs/vlm.py', (dict(llm='d24'), dict(llm='d24', tokens=4)))\n"
    )
    with pytest.raises(UserError, match=r"llm=d24 and llm=d24,tokens=4 have the same spec"):
        module.cells_of(str(path), tmp_path)


def test_checkpoint_intervals_do_not_change_the_spec_hash(cells: list[Cell]) -> None:
    spec = dataclasses.replace(cells[0].spec, save_every_steps=0)
    assert with_checkpoints(spec).save_every_steps >= 1
    assert spec_hash(with_checkpoints(spec)) == spec_hash(spec)
    assert with_checkpoints(dataclasses.replace(spec, save_every_steps=77)).save_every_steps == 77


def test_speed_is_the_median_of_the_rows_of_one_device(cells: list[Cell]) -> None:
    cell = cells[0]
    rows = [row(cell, 6e9, secs) for secs in (1.0, 2.0, 3.0)] + [row(cell, 1e15, 1.0, "TPU v6 lite")]
    speed = tables.measured(rows)
    assert speed is not None
    assert speed.flops_per_sec == 3e9
    assert "3 rows" in speed.source
    assert "cpu" in speed.source
    assert tables.measured([]) is None
    assumed = tables.assumed(chips.chip("v6e"), 16)
    assert assumed.flops_per_sec == pytest.approx(0.6 * 16 * 9.2e14)
    assert "assumption" in assumed.source


def test_an_elastic_cell_has_a_row_for_each_v(tmp_path: Path) -> None:
    """All of them or none count, and all are gathered."""
    grid = tmp_path / "grid.py"
    grid.write_text(
        "from vlm_jax.config.sweep import Grid, param\n"
        f"def get_grid(arg): return Grid({str(ROOT / 'configs' / 'vlm.py')!r}, param('elastic', '1+4', '2+4'))\n"
    )
    cells = module.cells_of(str(grid), tmp_path)
    for cell in cells:
        cell.folder.mkdir(parents=True)
    first = [dataclasses.replace(row(cells[0]), spec_hash=digest) for digest in cells[0].row_hashes]
    assert len(first) == 2
    module.write_row(cells[0], *first)
    assert module.row_of(cells[0]) == first[-1]
    assert set(module.gather(cells, tmp_path)) == set(cells[0].row_hashes)
    assert [r.spec_hash for r in results.read(tmp_path / "rows.jsonl")] == list(cells[0].row_hashes)
    module.write_row(cells[1], row(cells[1]))
    with pytest.raises(UserError, match="expected 2 rows, got 1"):
        module.rows_of(cells, tmp_path)
