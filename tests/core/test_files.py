"""A file or folder is replaced in one step, or stays as it was."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from vlm_jax.core import files
from vlm_jax.core.errors import UserError
from vlm_jax.core.files import (
    atomic_write,
    disk_problem,
    file_lock,
    remove_stale,
    remove_temporary,
    write_json,
    write_text,
)

ROOT = Path(__file__).parents[2]


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


def write_folder(path: Path, content: str) -> None:
    with atomic_write(path) as new:
        new.mkdir()
        (new / content).write_text(content)


def test_a_folder_appears_when_the_block_ends_and_replaces_an_empty_one_alone(tmp_path: Path) -> None:
    """What somebody writes into the target while the block runs is not lost."""
    path = tmp_path / "model.v1"
    path.mkdir()
    write_folder(path, "new")
    assert names(tmp_path) == ["model.v1"]
    with pytest.raises(OSError, match="not empty"):
        write_folder(path, "newer")
    assert names(path) == ["new"]
    assert names(tmp_path) == ["model.v1"]


def test_a_link_is_replaced_and_its_target_is_not_touched(tmp_path: Path) -> None:
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    target.write_text("precious")
    link.symlink_to(target)
    write_text(link, "new")
    assert (target.read_text(), link.read_text(), link.is_symlink()) == ("precious", "new", False)
    folder, link = tmp_path / "folder", tmp_path / "link"
    folder.mkdir()
    link.symlink_to(folder)
    with pytest.raises(OSError, match="directory"):
        write_folder(link, "new")
    assert not names(folder)


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


THEIRS = (
    "law.partial", "law.json.new", "law.json.tmp", f"law.partial-{os.getpid()}.json", ".law.json", ".law.vlm_jax-.json",
    ".law.vlm_jax-0123.json", "law.vlm_jax-0123456789abcdef.json", ".law.vlm_jax-0123456789abcdef.json.old",
)  # fmt: skip


def test_files_with_names_like_temporary_ones_stay(tmp_path: Path) -> None:
    """Also where the write fails, and where leftovers of killed processes are removed."""
    for name in THEIRS:
        (tmp_path / name).write_text("mine")
    write_text(tmp_path / "law.json", "new")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "law.json", "\ud800")
    remove_stale(tmp_path / "law.json")
    assert names(tmp_path) == sorted((*THEIRS, "law.json"))


KILLED = """
import os, pathlib, signal, sys
from vlm_jax.core.files import atomic_write

with atomic_write(pathlib.Path(sys.argv[1])) as new:
    new.write_text("half") if sys.argv[2] == "file" else new.mkdir()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_process_left_is_removed(tmp_path: Path, kind: str) -> None:
    """A block that still runs keeps its file."""
    path = tmp_path / "a.npy"
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), kind], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = names(tmp_path)
    assert left != "a.npy"
    with atomic_write(path) as new:
        new.write_text("new")
        remove_stale(path)
    assert names(tmp_path) == ["a.npy"]


def test_an_interrupted_process_removes_what_it_has_written(tmp_path: Path) -> None:
    with contextlib.suppress(FileNotFoundError), atomic_write(tmp_path / "a") as new:
        new.mkdir()
        (new / "half").write_text("half")
        remove_temporary()
        assert not names(tmp_path)
    assert not names(tmp_path)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "Disk quota exceeded"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory"), "Not a directory"),
        (FileExistsError(errno.EEXIST, "File exists", "checkpoints"), "File exists: checkpoints"),
        (ValueError("INTERNAL: write failed: No space left on device [/run]"), "No space left"),
        (ValueError("broken"), None),
        (FileNotFoundError(errno.ENOENT, "No such file"), None),
    ],
)
def test_errors_of_a_disk_are_recognised(error: Exception, reason: str | None) -> None:
    assert disk_problem(error) == reason


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


@pytest.mark.parametrize("put", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to(path.parent / "elsewhere")])
def test_a_lock_is_a_file(tmp_path: Path, put: Callable[[Path], None]) -> None:
    """A link's target would be created, a pipe would be opened."""
    put(tmp_path / "lock")
    with pytest.raises(UserError, match=r"lock: expected a (lock file|file or folder), got a (folder|named pipe|link)"):
        file_lock(tmp_path / "lock")
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    with file_lock(tmp_path / "other") as lock:
        assert lock.is_locked


@pytest.mark.parametrize("name", ["pipe", "link", "/dev/null", "/dev/stdout", "."])
def test_a_device_is_not_replaced_by_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As root, the rename that ends a write would replace `/dev/null`, which is why it is not tried here."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    os.symlink("/dev/null", "link")
    before = os.lstat(name).st_mode
    with pytest.raises(UserError, match=f"{name}: expected .* file to write"):
        files._check_target(Path(name)) if name.startswith("/dev/") else write_text(Path(name), "a")
    assert os.lstat(name).st_mode == before
    assert sorted(os.listdir()) == ["link", "pipe"]
