"""The launch command: output before a run, and errors."""

import sys
from pathlib import Path

import pytest

from experiments import launch
from experiments.launching import index, states
from experiments.launching.cells import Cell, write_row
from tests.launching.conftest import row
from vlm_jax.cli import run_main
from vlm_jax.core.errors import UserError


def test_a_dry_run_predicts_minutes_from_the_rows_that_are_there(
    grid: str, cells: list[Cell], workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row at ten megaflops a second: the other cells take their FLOPs at that speed."""
    words = ["--grid", grid, "--workdir", str(workdir), "--dry-run", "--workers", "2"]
    assert launch.main(words) == 0
    assert "minutes are shown once" in capsys.readouterr().out
    write_row(cells[0], row(cells[0], 6e8, 60.0))
    assert launch.main(words) == 0
    text = capsys.readouterr().out
    left = sum(cell.flops for cell in cells[1:])
    assert "3 cells, 2 to do" in text
    assert f"about {left / 1e7 / 60 / 2:.1f} min of training with 2 at a time" in text
    assert "compiling comes on top" in text
    assert not (workdir / "rows.jsonl").exists()


def test_status_gathers_and_shows_each_cell(
    grid: str, cells: list[Cell], workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_row(cells[0], row(cells[0]))
    states.fail(cells[1], "Traceback\nValueError: [no] such thing")
    assert launch.main(["--grid", grid, "--workdir", str(workdir), "--status"]) == 0
    text = capsys.readouterr().out
    assert "error 0.250 ± 0.250" in text
    assert "ValueError: [no] such thing" in text
    assert "1 done, 1 failed, 0 running, 1 waiting" in text
    assert len((workdir / "rows.jsonl").read_text().splitlines()) == 1


def test_an_index_that_is_done_does_nothing(
    grid: str, cells: list[Cell], workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for cell in cells:
        write_row(cell, row(cell))
    for words in ("2", "0,1", "all"):
        assert launch.main(["--grid", grid, "--workdir", str(workdir), "--index", words]) == 0
    assert "cell 2 is done" in capsys.readouterr().out
    assert [cell.index for cell in index.parse("2,0", cells)] == [2, 0]
    with pytest.raises(UserError, match="cells 0 to 2"):
        index.parse("-1", cells)


def test_shares_of_a_grid_are_disjoint_and_complete(cells: list[Cell]) -> None:
    shares = [index.parse(f"{number}/2", cells) for number in range(2)]
    assert [[cell.index for cell in share] for share in shares] == [[2, 0], [1]]  # the dearest first
    assert index.parse("3/4", cells) == []


def test_bad_input_is_one_line_and_exit_code_2(
    grid: str, workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, in_the_way = tmp_path / "broken.py", tmp_path / "file"
    broken.write_text("from vlm_jax.config.sweep import Grid\ndef get_grid(arg): return Grid('no.py', ({'llm': 1},))\n")
    in_the_way.touch()
    here = ["--grid", grid, "--workdir", str(workdir)]
    cases = {
        (*here, "--backend", "slrum"): "did you mean 'slurm'",
        (*here, "--index", "3"): "cells 0 to 2",
        (*here, "--index", "one"): "cells 0 to 2",
        (*here, "--workers", "0"): "--workers: expected at least 1, got 0",
        (*here, "--partition", "gpu"): "--backend slurm",
        (*here, "--accelerator", "v6e-16"): "--dry-run",
        (*here, "--backend", "slurm", "--slurm", "account"): "NAME=VALUE",
        (*here, "--index", "4/4"): "share I/N",
        ("--grid", grid, "--workdir", str(in_the_way), "--dry-run"): "expected a folder, got the file",
        (*here, "--processes", "2"): "--index",
        ("--grid", str(broken), "--workdir", str(workdir)): "cell llm=1",
        ("--grid", str(tmp_path / "none.py"), "--workdir", str(workdir)): "none.py",
        ("--grid", grid, "--workdir", str(tmp_path / "none"), "--status"): "no such folder",
        ("--grid", grid, "--workdir", str(in_the_way / "below")): "expected a folder, got the file",
    }
    for argv, expected in cases.items():
        monkeypatch.setattr(sys, "argv", ["launch", *argv])
        with pytest.raises(SystemExit) as stopped:
            run_main(launch.main)
        text = capsys.readouterr().err
        assert stopped.value.code == 2, (argv, text)
        assert expected in text, (argv, text)
        assert len(text.strip().splitlines()) == 1, text
    assert list(workdir.iterdir()) == []


@pytest.mark.parametrize(("cell_index", "attempted"), [(2, ["llm=d96,data=rows4_tiny,steps=4"]), (-1, [])])
def test_a_process_that_is_not_the_first_helps_with_the_cell_of_the_first(
    grid: str, cells: list[Cell], workdir: Path, monkeypatch: pytest.MonkeyPatch, cell_index: int, attempted: list[str]
) -> None:
    """Whatever its own index says: the hosts of a slice may be out of step."""
    helped: list[str] = []
    monkeypatch.setattr(index.processes, "is_primary", lambda: False)
    monkeypatch.setattr(index.processes, "broadcast_from_primary", lambda value: cell_index)
    monkeypatch.setattr(index.processes, "watch_sigterm", lambda: lambda step: False)
    monkeypatch.setattr(index, "attempt", lambda cell, report, stop: helped.append(cell.name))
    assert launch.main(["--grid", grid, "--workdir", str(workdir), "--index", "0"]) == 0
    assert helped == attempted
