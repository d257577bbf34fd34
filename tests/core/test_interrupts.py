"""Ctrl-C ends a command at any moment with one line, and a part that has to end differently can."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAD = """
import ctypes, os, signal, sys, threading, time
from pathlib import Path
from vlm_jax.cli import run_main
from vlm_jax.core.files import atomic_write

def interrupt(times=1):
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGINT)
    threading.Event().wait()

def main(argv):
"""
MOMENTS = {
    "in_python": "    interrupt()",
    "twice": "    interrupt(2)",
    "in_c_code": "    threading.Timer(0.2, os.kill, (os.getpid(), 2)).start()\n"
    "    while True: ctypes.CDLL(None).sleep(60)",
    "where_an_exception_is_ignored": "    class Loud:\n        def __del__(self): interrupt()\n"
    "    Loud()\n    time.sleep(60)",
    "where_everything_is_caught": "    try:\n        interrupt()\n    except BaseException: pass\n    time.sleep(60)",
    "while_it_writes": "    with atomic_write(Path(argv[0]) / 'file') as new:\n"
    "        new.write_text('half')\n        interrupt()",
    "raised": "    raise KeyboardInterrupt",
    "with_threads": "    threading.Thread(target=time.sleep, args=(60,)).start()\n    interrupt()",
}


@pytest.fixture(autouse=True)
def sigint_as_in_a_terminal() -> Iterator[None]:
    """A child inherits an ignored signal: the tests may run in the background of a script, which ignores Ctrl-C."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def run(body: str, folder: Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-c", f"{HEAD}{body}\n\nrun_main(main)", str(folder)]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False, timeout=50)


@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_is_one_line_and_130(tmp_path: Path, moment: str) -> None:
    done = run(MOMENTS[moment], tmp_path)
    assert (done.returncode, done.stderr) == (130, "stopped by Ctrl-C\n")
    assert not list(tmp_path.iterdir())


def test_a_part_of_a_command_ends_differently(tmp_path: Path) -> None:
    """As the launcher, which waits for its workers."""
    body = (
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "    try:\n        interrupt()\n    finally:\n        print('saved', flush=True)"
    )
    done = run(body, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (130, "saved\n", "stopped by Ctrl-C\n")


def test_a_process_that_ignores_ctrl_c_goes_on(tmp_path: Path) -> None:
    """As one started with nohup or in the background of a script."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        done = run("    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(0.1)\n    print('done')", tmp_path)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_the_cursor_of_a_terminal_is_shown_again(tmp_path: Path) -> None:
    """A progress bar hides it."""
    main, terminal = os.openpty()
    argv = [sys.executable, "-c", f"{HEAD}    interrupt()\n\nrun_main(main)"]
    done = subprocess.run(argv, cwd=ROOT, stdout=terminal, stderr=subprocess.PIPE, check=False, timeout=50)
    os.close(terminal)
    assert (done.returncode, os.read(main, 100)) == (130, b"\x1b[?25h")
    os.close(main)
