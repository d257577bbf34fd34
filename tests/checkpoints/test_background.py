"""A save that fails in the background is one line of the command: nothing that a thread prints is left beside it."""

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from vlm_jax.checkpoints import background

ROOT = Path(__file__).parents[2]
FULL = """
import resource, sys
from pathlib import Path
import jax.numpy as jnp
from vlm_jax.checkpoints.orbax import Checkpoints
from vlm_jax.cli import run_main

def main(argv):
    store = Checkpoints(Path(argv[0]), keep=9)
    for step in range(1, 9):
        size = resource.RLIM_INFINITY if step < 3 else 20_000
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        store.save(step, {f"leaf{i}": jnp.arange(20_000.0) * i for i in range(24)}, {"secs": 1.0})
    store.close()

run_main(main)
"""


@pytest.mark.slow
def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk; a checkpoint before it is complete."""
    argv = [sys.executable, "-c", FULL, str(tmp_path)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert line.startswith(f"error: {tmp_path / 'checkpoints'}: cannot write here (File too large")
    assert "earlier checkpoints are intact; free disk space or choose another --workdir, and run again" in line
    assert (tmp_path / "checkpoints" / "1" / "sha256.json").is_file()


def record(name: str, error: Exception | None, message: str = "failed", level: int = logging.ERROR) -> bool:
    """Whether the logger shows it."""
    background.hold_back()
    info = (type(error), error, None) if error else None
    return bool(logging.getLogger(name).filter(logging.LogRecord(name, level, "file", 1, message, (), info)))


def test_logs_that_repeat_the_error_of_a_save_are_dropped_and_no_others() -> None:
    full = ValueError("RESOURCE_EXHAUSTED: write failed: No space left on device")
    assert not record("absl", full)
    assert not record("absl", None, "thread raised an exception: No space left on device")
    assert not record("absl", RuntimeError("of a thread, which wait raises"))
    assert not record("asyncio", full, "Future exception was never retrieved")
    assert not record("asyncio", None, "Task was destroyed but it is pending!\ntask: <Task pending>")
    assert not record("concurrent.futures", RuntimeError("Event loop is closed"))
    assert record("asyncio", RuntimeError("a bug"))
    assert record("absl", None, "something else")
    assert record("absl", full, level=logging.WARNING)
    assert record("other", full)


def test_exceptions_of_threads_are_shown_unless_a_disk_is_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: list[object] = []
    monkeypatch.setattr(threading, "excepthook", shown.append)
    monkeypatch.setattr(sys, "unraisablehook", shown.append)
    background.hold_back.__wrapped__()
    for error in (OSError(28, "No space left on device"), RuntimeError("a bug")):
        threading.excepthook(threading.ExceptHookArgs((type(error), error, None, None)))
    assert [args.exc_value.args for args in shown] == [("a bug",)]
