"""One run at a time trains in a workdir: the lock ends with its process, however that ends."""

import errno
import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from vlm_jax.core.errors import UserError
from vlm_jax.distributed import ownership, processes
from vlm_jax.distributed.ownership import own_workdir

ROOT = Path(__file__).parents[2]
HOLDER = """
import pathlib, sys
from vlm_jax.distributed.ownership import own_workdir

with own_workdir(pathlib.Path(sys.argv[1])):
    print("owned", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "_PATIENCE_SECS", 0.05)


def refuse(workdir: Path, message: str) -> None:
    with pytest.raises(UserError, match=message), own_workdir(workdir):
        pytest.fail("two runs own it")


def test_another_process_owns_it_until_it_is_killed(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "owned\n"
        refuse(tmp_path / "run", rf"run: process {other.pid} on {socket.gethostname()} \(since \d{{4}}-.*trains here")
        other.send_signal(signal.SIGKILL)
    with own_workdir(tmp_path / "run"):
        owner = json.loads((tmp_path / "run" / "owner.json").read_text())
        assert owner["pid"] != other.pid


def test_blocks_of_one_run_nest(tmp_path: Path) -> None:
    """The command locks before it reads data, and training, which is called by others too, locks again."""
    (tmp_path / "link").symlink_to(tmp_path)
    with own_workdir(tmp_path):
        with own_workdir(tmp_path / "link"):
            pass
        with pytest.raises(TimeoutError):
            FileLock(tmp_path / "run.lock").acquire(blocking=False)
    with FileLock(tmp_path / "run.lock").acquire(blocking=False):
        refuse(tmp_path, r"another process \(it holds .*run\.lock\) trains here")


def test_a_workdir_in_which_nothing_was_written_is_removed(tmp_path: Path) -> None:
    with own_workdir(tmp_path / "deep" / "run"):
        pass
    assert not list(tmp_path.iterdir())
    with own_workdir(tmp_path / "deep" / "run"):
        (tmp_path / "deep" / "run" / "spec.json").write_text("{}")
    assert sorted(path.name for path in (tmp_path / "deep" / "run").iterdir()) == ["run.lock", "spec.json"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"pid": "x", "host": 1, "start": 2}', "\udcff"])
def test_a_damaged_owner_file_is_no_other_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "owner.json").write_bytes(content.encode(errors="surrogateescape"))
    with FileLock(tmp_path / "run.lock"):
        refuse(tmp_path, "another process")


def test_a_folder_in_the_place_of_the_lock_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.lock").mkdir()
    refuse(tmp_path, r"run\.lock: expected a lock file, got a folder \(remove it\)")
    (tmp_path / "file").write_text("")
    refuse(tmp_path / "file" / "run", r"cannot write here \(Not a directory\): choose another --workdir")


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_flock_gets_a_lock_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def unsupported(*args: object) -> None:
        raise OSError(code, "not supported")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with own_workdir(tmp_path):
        monkeypatch.setattr(ownership, "_owned", set())  # as another process sees it
        refuse(tmp_path, "trains here")
    with own_workdir(tmp_path):
        pass


def test_the_other_processes_of_a_run_end_with_process_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They neither lock nor write: process 0 broadcasts whether it has the lock."""
    monkeypatch.setattr(processes, "is_primary", lambda: False)
    monkeypatch.setattr(processes, "broadcast_from_primary", lambda value: 1)
    refuse(tmp_path / "run", "process 0 cannot lock it")
    monkeypatch.setattr(processes, "broadcast_from_primary", lambda value: 0)
    with own_workdir(tmp_path / "run"):
        assert not (tmp_path / "run").exists()
