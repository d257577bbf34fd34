"""A file or folder is replaced in one step, or stays as it was."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from vlm_jax.core.files import atomic_write, write_json, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "figure.png"
    write_text(path, "old")
    with atomic_write(path) as new:
        assert new.suffix == ".png"
        new.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    write_json(path, {"a": [1]})
    assert path.read_text() == '{\n "a": [\n  1\n ]\n}\n'
    assert names(tmp_path) == ["figure.png"]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "model.v1"
    for content in ("old", "new"):
        with atomic_write(path) as new:
            new.mkdir()
            (new / content).write_text(content)
    assert names(tmp_path) == ["model.v1"]
    assert names(path) == ["new"]


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()])
def test_a_block_that_fails_changes_nothing(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "rows.json"
    path.write_text("old")

    def fails(make: Callable[[Path], object]) -> None:
        with atomic_write(path) as new:
            make(new)
            raise error

    for make in (Path.mkdir, Path.touch):
        with pytest.raises(type(error)):
            fails(make)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["rows.json"]


def test_what_a_killed_process_left_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / f"a.partial-{os.getpid()}.txt").mkdir()
    write_text(tmp_path / "a.txt", "new")
    assert names(tmp_path) == ["a.txt"]


def test_content_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, synced = tmp_path / "folder", []

    def fsync(file: IO[bytes]) -> None:
        assert not path.exists()
        synced.append(Path(file.name).name)

    monkeypatch.setattr(os, "fsync", fsync)
    with atomic_write(path) as new:
        (new / "deep").mkdir(parents=True)
        for name in ("a", "deep/b"):
            (new / name).write_text(name)
    assert sorted(synced) == ["a", "b"]
