"""The Slurm backend against programs of Slurm's names, and its tasks through submitit's own executors."""

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from experiments import launch
from experiments.launching import slurm, states
from experiments.launching.cells import Cell, write_row
from tests.launching.conftest import ROOT, row
from vlm_jax.core.errors import UserError

submitit = pytest.importorskip("submitit")
OPTIONS = slurm.Options(minutes=30, partition="spot", gpus=1, cpus=2, at_once=2, more={"account": "lab"})


def executor(workdir: Path) -> Any:
    return slurm.make_executor(workdir / "slurm", OPTIONS)


def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def test_a_task_runs_one_cell_by_its_index(
    grid: str, cells: list[Cell], workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command itself, through submitit's pickle, on this machine: its cell is done already."""
    monkeypatch.chdir(ROOT)
    write_row(cells[1], row(cells[1]))
    local = slurm.make_executor(workdir / "slurm", OPTIONS._replace(gpus=None), cluster="local")
    (job,) = slurm.submit(local, cells[1:2], grid, workdir)
    assert f"cell 1 is done: {cells[1].name}" in job.result()
    assert (cells[1].folder / "job.txt").read_text().strip() == job.job_id


def test_missing_cells_are_submitted_as_one_array(
    grid: str, cells: list[Cell], workdir: Path, program: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks that leave the queue without a row are blamed, with the last lines of their logs."""
    monkeypatch.setattr(slurm, "_GRACE_SECS", 0.0)
    monkeypatch.setattr(slurm, "_POLL_EVERY_SECS", 0.0)
    monkeypatch.setattr(slurm, "_LOOK_EVERY_SECS", 0.0)
    calls = program("sbatch", f"cp $1 {workdir}/script; echo Submitted batch job 7")
    program("squeue", f"[ -e {workdir}/log ] && exit; touch {workdir}/log; echo 7_1 >{workdir}/slurm/7_1_0_log.out")
    program("srun")
    (workdir / "slurm").mkdir()
    states.fail(cells[0], "an earlier attempt")
    slurm.run(cells[:2], grid, workdir, executor(workdir), console())
    assert len(calls.read_text().splitlines()) == 1
    script = (workdir / "script").read_text()
    wanted = "array=0-1%2 partition=spot gpus-per-node=1 cpus-per-task=2 time=30 account=lab requeue"
    assert [word for word in wanted.split() if f"#SBATCH --{word}" not in script] == []
    assert states.error_of(cells[0]) == ["Slurm task 7_0 ended without a row"]
    assert states.error_of(cells[1]) == ["7_1", "Slurm task 7_1 ended without a row"]


def test_queued_cells_are_not_submitted_again(
    grid: str, cells: list[Cell], workdir: Path, program: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first cell is queued at the first poll, and has a row at the next."""
    monkeypatch.setattr(slurm, "_POLL_EVERY_SECS", 0.0)
    monkeypatch.setattr(slurm, "_LOOK_EVERY_SECS", 0.0)
    calls = program("sbatch")
    program("srun")
    write_row(cells[1], row(cells[0]))  # where the fake queue finds it
    finish = f"mv {cells[1].folder / 'row.json'} {cells[0].folder / 'row.json'} 2>/dev/null"
    program("squeue", f"if [ -e {workdir}/asked ]; then {finish}; else touch {workdir}/asked; echo 7_0; fi")
    (cells[0].folder / "job.txt").write_text("7_0")
    slurm.run(cells[:1], grid, workdir, executor(workdir), console())
    assert (workdir / "rows.jsonl").exists()
    assert not calls.exists()


def test_missing_programs_and_packages_raise(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, program: Callable[..., Path]
) -> None:
    monkeypatch.setattr(slurm.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="no sbatch"):
        slurm.make_executor(workdir, OPTIONS)
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"vlm_jax\[slurm\]"):
        slurm.make_executor(workdir, OPTIONS)


def test_errors_of_slurm_are_reported(
    grid: str,
    cells: list[Cell],
    workdir: Path,
    program: Callable[..., Path],
    capfd: pytest.CaptureFixture[str],
) -> None:
    program("squeue")
    program("srun")
    program("sbatch", "echo sbatch: error: invalid partition specified: spot >&2; exit 1")
    with pytest.raises(UserError, match="invalid partition"):
        slurm.run(cells, grid, workdir, executor(workdir), console())
    assert capfd.readouterr().err == ""
    assert not (cells[0].folder / "job.txt").exists()
    program("squeue", "echo slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1")
    with pytest.raises(UserError, match="Unable to contact"):
        slurm.run(cells, grid, workdir, executor(workdir), console())


def test_without_a_controller_nothing_is_written(
    grid: str, workdir: Path, program: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    program("sbatch")
    program("srun")
    program("squeue", "echo slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1")
    with pytest.raises(UserError, match="Unable to contact"):
        launch.main(["--grid", grid, "--workdir", str(workdir), "--backend", "slurm"])
    assert list(workdir.iterdir()) == []
