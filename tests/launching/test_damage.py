"""Damaged files in the workdir of a grid: one line that names the file, or a cell that is done again."""

import shutil
from pathlib import Path

import pytest

from experiments import launch
from experiments.launching import states
from experiments.launching.cells import Cell, write_row
from tests.launching.conftest import row
from vlm_jax.core.errors import UserError

CONTENTS = {
    "folder": None, "empty": b"", "binary": b"\xff\xfe\0", "list": b"[]", "null": b"null", "object": b"{}",
    "deep": b"[" * 100_000, "digits": b'{"time": ' + b"9" * 5000 + b"}",
    "types": b'{"doing": 3, "share": "x", "host": [], "pid": "1", "time": {}}',
    "numbers": b'{"doing": "training", "share": 1e400, "host": "a", "pid": 1, "time": NaN}',
}  # fmt: skip
# Of the cell, then of the workdir.
FILES = (
    "progress.json", "error.txt", "job.txt", "lock", "row.json", "../../rows.jsonl", "../../rows.lock", "../../cells",
)  # fmt: skip


def damage(path: Path, content: bytes | None) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.mkdir() if content is None else path.write_bytes(content)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", CONTENTS)
def test_the_status_of_a_damaged_grid_is_a_table_or_one_line(
    cells: list[Cell], grid: str, workdir: Path, name: str, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_row(cells[1], row(cells[1]))
    damage((cells[0].folder / name).resolve(), CONTENTS[content])
    message = ""
    try:
        launch.main(["--grid", grid, "--workdir", str(workdir), "--status"])
    except UserError as error:
        message = str(error)
    assert "waiting" in capsys.readouterr().out if not message else str(workdir) in message and "\n" not in message


@pytest.mark.parametrize("content", [name for name in CONTENTS if name != "folder"])
def test_a_damaged_progress_file_is_none(cells: list[Cell], content: str) -> None:
    damage(cells[0].folder / "progress.json", CONTENTS[content])
    assert states.progress_of(cells[0]) is None
    assert states.state_of(cells[0]).kind == "waiting"


@pytest.mark.parametrize("name", ["rows.lock", "workers.log", "cells"])
def test_a_launch_into_a_damaged_workdir_is_one_line(
    grid: str, workdir: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(workdir / name, b"" if name == "cells" else None)
    with pytest.raises(UserError, match=rf"{name}.* \((mend it, or choose another --workdir|remove it)\)"):
        launch.main(["--grid", grid, "--workdir", str(workdir), "--workers", "1"])


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"])
def test_a_name_that_is_no_folder(grid: str, name: str) -> None:
    with pytest.raises(UserError, match=r"--workdir '.*': expected the name of a folder") as error:
        launch.main(["--grid", grid, "--workdir", name, "--status"])
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("index", ["²", "9" * 5000, "-1", "3", "", "1/0", "1/²", "a"])
def test_an_index_that_is_none(grid: str, workdir: Path, index: str) -> None:
    with pytest.raises(UserError, match="--index"):
        launch.main(["--grid", grid, "--workdir", str(workdir), f"--index={index}"])
