"""The state of a cell, as the files in its folder say, so that any machine that sees the folder knows it.

    lock            held by the process that runs the cell; the operating system releases it when the process ends
    progress.json   what that process does, how far it is, where it runs; stays behind where it was killed
    error.txt       why the last attempt failed
    row.json        done

The lock is `flock`: it holds between processes of a machine, and between machines on NFS version 4 and on Lustre
mounted with `flock`. On a bucket it does not; there, each cell belongs to one slice, and it counts as running while
its progress file is recent.
"""

import contextlib
import math
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from filelock import Timeout

from experiments.launching.cells import Cell, row_of
from vlm_jax.core import reading, text
from vlm_jax.core.errors import UserError
from vlm_jax.core.files import file_lock, write_json, write_text
from vlm_jax.core.rows import ResultRow

Report = Callable[[str, float], None]  # (what is being done, share of the cell that is done)

_FAILED = "failed"  # in place of what a process does
_SHOWN = r"[\w .,:%/()+-]{1,100}"  # that a terminal shows as it is
_LOG_BYTES = 2**16  # of its end
_RECENT_SECS = 600  # a large program compiles for minutes without a report
_REPORT_EVERY_SECS = 1.5  # a bucket takes one write a second of the same file


class State(NamedTuple):
    kind: Literal["done", "failed", "running", "waiting"]
    share: float
    doing: str  # of a running cell, what it does
    text: str  # for people


@contextlib.contextmanager
def try_lock(cell: Cell, patience_secs: float = 0.2) -> Iterator[bool]:
    """Whether this process got the lock of the cell, which it keeps until the end of the block. `is_locked` takes the
    lock for an instant, hence the patience."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    lock = file_lock(cell.folder / "lock")
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(Timeout):
            stack.enter_context(lock.acquire(timeout=patience_secs))
        yield lock.is_locked


def is_locked(cell: Cell) -> bool:
    """Whether some process holds the lock of the cell."""
    path = cell.folder / "lock"
    if not reading.kind(path):
        return False
    try:
        # Tries twice, because another process may be asking too.
        with file_lock(path).acquire(timeout=0.02, poll_interval=0.02):
            return False
    except Timeout:
        return True


def reporter(cell: Cell) -> Report:
    """Writes `progress.json`, at most every `_REPORT_EVERY_SECS` within a phase."""
    last = ("", 0.0)

    def report(doing: str, share: float) -> None:
        nonlocal last
        if doing == last[0] and time.monotonic() - last[1] < _REPORT_EVERY_SECS:
            return
        last = doing, time.monotonic()
        where = {"host": socket.gethostname(), "pid": os.getpid()}
        write_json(cell.folder / "progress.json", {"doing": doing, "share": share, **where, "time": time.time()})

    return report


def progress_of(cell: Cell) -> dict[str, Any] | None:
    """The contents of `progress.json`; None where there is none, or a damaged one."""
    try:
        values = reading.read_object(cell.folder / "progress.json")
        times = [value for value in (values["share"], values["time"]) if type(value) in (int, float)]
        fits = all(re.fullmatch(_SHOWN, values[name]) for name in ("doing", "host")) and type(values["pid"]) is int
        return values if fits and len(times) == 2 and all(map(math.isfinite, times)) else None
    except (UserError, ValueError, TypeError, KeyError, OverflowError):
        return None


def state_of(cell: Cell, row: ResultRow | None = None) -> State:
    """`row`, where it is known already, saves a look."""
    if row := row or row_of(cell):
        return State("done", 1.0, "", f"error {row.error:.3f} ± {row.stderr:.3f}")
    progress, is_held = progress_of(cell), is_locked(cell)
    if progress is None or progress["doing"] == _FAILED:
        if is_held:
            return State("running", 0.0, "starting", "starting")
        lines, task = error_of(cell), task_of(cell)
        given = f"given to Slurm task {task}" if task else ""
        return State("failed", 0.0, "", lines[-1]) if lines else State("waiting", 0.0, "", given)
    # An error next to progress is older: an attempt that makes progress removes it, but a copied folder has both.
    ago, here = time.time() - progress["time"], progress["host"] == socket.gethostname()
    where = f"{progress['doing']}, {progress['share']:.0%}, on {progress['host']}"
    if is_held or (not here and ago < _RECENT_SECS):
        return State("running", progress["share"], progress["doing"], f"{where}, process {progress['pid']}")
    return State("waiting", 0.0, "", f"stopped {_ago(ago)} ago ({where}); resumes from its last checkpoint")


def error_of(cell: Cell) -> list[str]:
    """The lines of `error.txt`; empty where the cell has not failed."""
    path = cell.folder / "error.txt"
    try:
        if not reading.kind(path):
            return []
        lines = reading.read_bytes(path).decode(errors="replace").strip().splitlines()
    except UserError as error:
        return [f"{error} (delete it)"]
    return [text.printable(line) for line in lines] or ["failed"]


def task_of(cell: Cell) -> str:
    """The Slurm task that last got the cell; empty where none has."""
    with contextlib.suppress(UserError):
        task = reading.read_text(cell.folder / "job.txt").strip()
        return task if re.fullmatch(r"\d+(_\d+)?", task, re.ASCII) and len(task) < 40 else ""
    return ""


def last_lines(path: Path, count: int) -> list[str]:
    """The last lines of a log; none where it cannot be read."""
    with contextlib.suppress(UserError, OSError), reading.open_regular(path) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _LOG_BYTES))
        return [text.printable(line) for line in file.read().decode(errors="replace").splitlines()[-count:]]
    return []


def fail(cell: Cell, why: str) -> None:
    """Records why the cell failed, and that it no longer runs."""
    write_text(cell.folder / "error.txt", why.rstrip() + "\n")
    reporter(cell)(_FAILED, 0.0)


def _ago(secs: float) -> str:
    return f"{secs:.0f} s" if secs < 100 else f"{secs / 60:.0f} min" if secs < 6000 else f"{secs / 3600:.0f} h"
