"""What becomes of a cell, told by the files in its folder, so that any machine that sees the folder can say it.

    lock            held by the process that runs the cell; the operating system's, so it goes when the process does
    progress.json   what that process does, how far it is, where it runs; stays behind where it was killed
    error.txt       why the last attempt failed
    row.json        done

The lock is `flock`: it holds between processes of a machine, and between machines on NFS version 4 and on Lustre
mounted with `flock`. On a bucket it does not; there, each cell is given to one job only, and a cell counts as running
while its progress file is young.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

from filelock import FileLock, Timeout

from experiments.launching.cells import Cell, row_of
from vlm_jax.core.files import write_json, write_text
from vlm_jax.core.rows import ResultRow

Tell = Callable[[str, float], None]  # (what is being done, share of the cell that is done)

_FAILED = "failed"  # in place of what a process does
_YOUNG_SECS = 600  # a large program compiles for minutes without a word
_TELL_EVERY_SECS = 1.5  # a bucket takes one write a second of the same file


class State(NamedTuple):
    kind: Literal["done", "failed", "running", "waiting"]
    share: float
    doing: str  # of a running cell, what it does
    text: str  # for people


@contextlib.contextmanager
def taken(cell: Cell, patience_secs: float = 0.2) -> Iterator[bool]:
    """Whether this process now holds the cell; it does until the end of the block. `held` takes the lock for an
    instant, so one refusal is no answer."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(cell.folder / "lock")
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(Timeout):
            stack.enter_context(lock.acquire(timeout=patience_secs))
        yield lock.is_locked


def held(cell: Cell) -> bool:
    """Whether some process holds the cell."""
    if not (cell.folder / "lock").exists():
        return False
    try:
        # Tries twice, because another process may be asking too.
        with FileLock(cell.folder / "lock").acquire(timeout=0.02, poll_interval=0.02):
            return False
    except Timeout:
        return True


def teller(cell: Cell) -> Tell:
    """Writes `progress.json`; soon repeated calls that tell no new phase are left out."""
    last = ("", 0.0)

    def tell(doing: str, share: float) -> None:
        nonlocal last
        if doing == last[0] and time.monotonic() - last[1] < _TELL_EVERY_SECS:
            return
        last = doing, time.monotonic()
        sign = {"doing": doing, "share": share, "host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
        write_json(cell.folder / "progress.json", sign)

    return tell


def sign_of(cell: Cell) -> dict[str, Any] | None:
    """What `progress.json` says; None where there is none."""
    try:
        return json.loads((cell.folder / "progress.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def state_of(cell: Cell, row: ResultRow | None = None) -> State:
    """`row`, where it is known already, saves a look."""
    if row := row or row_of(cell):
        return State("done", 1.0, "", f"error {row.error:.3f} ± {row.stderr:.3f}")
    sign, is_held = sign_of(cell), held(cell)
    if sign is None or sign["doing"] == _FAILED:
        if is_held:
            return State("running", 0.0, "starting", "starting")
        text, task = error_of(cell), task_of(cell)
        given = f"given to Slurm task {task}" if task else ""
        return State("failed", 0.0, "", text[-1]) if text else State("waiting", 0.0, "", given)
    # An error that lies beside progress is an older one: the attempt that makes progress removed it, a copy has both.
    ago, here = time.time() - sign["time"], sign["host"] == socket.gethostname()
    where = f"{sign['doing']}, {sign['share']:.0%}, on {sign['host']}"
    if is_held or (not here and ago < _YOUNG_SECS):
        return State("running", sign["share"], sign["doing"], f"{where}, process {sign['pid']}")
    return State("waiting", 0.0, "", f"stopped {_ago(ago)} ago ({where}); goes on from its last checkpoint")


def error_of(cell: Cell) -> list[str]:
    """The lines of `error.txt`; empty where the cell has not failed."""
    try:
        return (cell.folder / "error.txt").read_text(errors="replace").strip().splitlines() or ["failed"]
    except FileNotFoundError:
        return []


def task_of(cell: Cell) -> str:
    """The Slurm task that last got the cell; empty where none has."""
    path = cell.folder / "job.txt"
    return path.read_text().strip() if path.exists() else ""


def fail(cell: Cell, text: str) -> None:
    """Says why the cell has failed, and that it no longer runs."""
    write_text(cell.folder / "error.txt", text.rstrip() + "\n")
    teller(cell)(_FAILED, 0.0)


def _ago(secs: float) -> str:
    return f"{secs:.0f} s" if secs < 100 else f"{secs / 60:.0f} min" if secs < 6000 else f"{secs / 3600:.0f} h"
