"""What the files of a cell say, and that one process at a time has it."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.launching import attempt, states
from experiments.launching.cells import Cell, write_row
from tests.launching.conftest import ROOT, row
from vlm_jax.core.errors import BAD_STEP, STOPPED, RunStopped

HOLDER = """
import sys, pathlib
from experiments.launching import cells, states
cell = cells.cells_of(sys.argv[1], pathlib.Path(sys.argv[2]))[0]
with states.try_lock(cell) as mine:
    states.reporter(cell)("training", 0.5)
    print(mine, flush=True)
    sys.stdin.read()
"""


def holder(grid: str, workdir: Path) -> subprocess.Popen[str]:
    """Another process that takes the first cell; its line says whether it has got it."""
    words = [sys.executable, "-c", HOLDER, grid, str(workdir)]
    return subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_cell_is_held_by_one_process_until_that_is_killed(grid: str, cells: list[Cell], workdir: Path) -> None:
    cell = cells[0]
    with holder(grid, workdir) as first:
        assert first.stdout.readline() == "True\n"
        with states.try_lock(cell) as mine:
            assert not mine
        state = states.state_of(cell)
        assert (state.kind, state.share, state.doing) == ("running", 0.5, "training")
        assert f"process {first.pid}" in state.text
        first.send_signal(signal.SIGKILL)
    state = states.state_of(cell)
    assert state.kind == "waiting"
    assert "training, 50%" in state.text
    with states.try_lock(cell) as mine:
        assert mine


def test_looking_at_a_cell_does_not_keep_it_from_anybody(cells: list[Cell]) -> None:
    with states.try_lock(cells[0]) as mine:
        assert mine
        assert states.is_locked(cells[0])
    assert not states.is_locked(cells[0])
    assert not states.is_locked(cells[1])


def test_states_of_a_cell(cells: list[Cell]) -> None:
    cell = cells[0]
    assert states.state_of(cell).kind == "waiting"
    states.fail(cell, "Traceback\nValueError: no\n")
    assert states.state_of(cell)[::3] == ("failed", "ValueError: no")
    write_row(cell, row(cell))
    assert states.state_of(cell)[::3] == ("done", "error 0.250 ± 0.250")


@pytest.mark.parametrize(("age", "kind"), [(5, "running"), (5000, "waiting")])
def test_a_copy_from_another_machine_is_believed_while_it_is_young(cells: list[Cell], age: float, kind: str) -> None:
    sign = {"doing": "training", "share": 0.25, "host": "elsewhere", "pid": 1, "time": time.time() - age}
    (cells[0].folder / "progress.json").write_text(json.dumps(sign))
    (cells[0].folder / "error.txt").write_text("of the attempt before, which a copy still has")
    state = states.state_of(cells[0])
    assert state.kind == kind
    assert "25%" in state.text
    assert "elsewhere" in state.text


@pytest.mark.parametrize(
    ("error", "reason"),
    [(ValueError("broken"), "ValueError: broken"), (RunStopped("not finite", BAD_STEP), "not finite"),
     (RunStopped("saved", STOPPED), None)],
)  # fmt: skip
def test_an_attempt_says_why_it_failed_but_not_that_it_was_stopped(
    cells: list[Cell], monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str | None
) -> None:
    def run(cell: Cell, report: states.Report, stop: Callable[[int], bool]) -> None:
        report("training", 0.5)
        raise error

    monkeypatch.setattr(attempt, "_run", run)
    (cells[0].folder / "error.txt").write_text("an earlier attempt")
    with pytest.raises(type(error)):
        attempt.attempt(cells[0], states.reporter(cells[0]), lambda step: False)
    assert states.state_of(cells[0]).kind == ("failed" if reason else "waiting")
    assert (reason in states.error_of(cells[0])[-1]) if reason else not states.error_of(cells[0])


@pytest.mark.parametrize("name", ["doing", "host"])
@pytest.mark.parametrize("foreign", ["[/bold]", "\x1b[2J", "a\nb", "", "x" * 200, 3])
def test_a_progress_file_with_foreign_text_is_none(cells: list[Cell], name: str, foreign: object) -> None:
    """Of another machine; what it says is shown in a terminal."""
    cells[0].folder.mkdir(parents=True, exist_ok=True)
    values = {"doing": "training", "host": "a-1.b", "pid": 1, "share": 0.5, "time": 1.0}
    (cells[0].folder / "progress.json").write_text(json.dumps(values))
    assert states.progress_of(cells[0]) == values
    (cells[0].folder / "progress.json").write_text(json.dumps({**values, name: foreign}))
    assert states.progress_of(cells[0]) is None


@pytest.mark.parametrize("text", ["../../x", "*", "12_3\n4", "\x1b[2J", "9" * 50])
def test_a_task_is_a_number(cells: list[Cell], text: str) -> None:
    """It becomes part of the names of logs that are looked for."""
    cells[0].folder.mkdir(parents=True, exist_ok=True)
    (cells[0].folder / "job.txt").write_text("123_4\n")
    assert states.task_of(cells[0]) == "123_4"
    (cells[0].folder / "job.txt").write_text(text)
    assert states.task_of(cells[0]) == ""


def test_the_end_of_a_log(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"x" * 2**20 + b"\none\n\xff\x1b[2Jtwo\n")
    assert states.last_lines(tmp_path / "log", 2) == ["one", "\ufffd\\x1b[2Jtwo"]
    assert states.last_lines(tmp_path / "missing", 2) == states.last_lines(tmp_path, 2) == []
