"""Cells as the tasks of a Slurm job array, submitted through submitit. A task runs `experiments.launch --index I`.

Slurm puts a task back in its queue when it takes the machine away, submitit does when the time limit nears; either way
the cell resumes from its last checkpoint. The workdir is on a file system that all nodes see and that has `flock`
(NFS version 4, Lustre mounted with `flock`).
"""

import contextlib
import io
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from experiments.launching import states
from experiments.launching.cells import Cell
from experiments.launching.follow import follow
from vlm_jax.core.errors import UserError
from vlm_jax.core.files import file_lock, write_text

_LOOK_EVERY_SECS, _POLL_EVERY_SECS = 1.0, 5.0
_GRACE_SECS = 20.0  # until what a node has written is seen here
_REQUEUES = 1000  # at the time limit, while there is progress to be made
_LOG_LINES = 5


class Options(NamedTuple):
    """What a task asks of Slurm; None leaves it to the cluster."""

    minutes: int
    partition: str | None
    gpus: int | None
    cpus: int | None
    at_once: int
    more: dict[str, str]  # options of sbatch that are not above


def command(grid: str, workdir: Path, index: int) -> list[str]:
    """What a task runs."""
    flags = ["--grid", grid, "--workdir", str(workdir), "--index", str(index)]
    return [sys.executable, "-m", "experiments.launch", *flags]


def run(left: list[Cell], grid: str, workdir: Path, executor: Any, console: Console) -> None:
    """Submits what is not in the queue yet and follows it. Ctrl-C leaves the array running.

    Raises `UserError` where Slurm refuses.
    """
    with file_lock(workdir / "submit.lock"):
        queued = queue()
        new = [cell for cell in left if states.task_of(cell) not in queued and not states.is_locked(cell)]
        submit(executor, new, grid, workdir)
    if new:
        array = states.task_of(new[0]).split("_")[0]
        console.print(f"submitted {len(new)} tasks, array {array}; logs in {workdir / 'slurm'}", soft_wrap=True)
    if len(new) < len(left):
        console.print(f"{len(left) - len(new)} cells are in the queue or running already")
    console.print("Ctrl-C leaves them running; --status shows the grid, the same command follows it again\n")
    follow(left, workdir, _watcher(left, workdir), console, _LOOK_EVERY_SECS)


def make_executor(folder: Path, options: Options, cluster: str = "slurm") -> Any:
    """submitit's executor; other clusters than Slurm ("local", "debug") run the same commands on this machine.

    Raises `UserError` without submitit or Slurm.
    """
    try:
        import submitit
    except ImportError:
        raise UserError("--backend slurm goes through submitit: pip install 'vlm_jax[slurm]'") from None
    if cluster == "slurm" and not shutil.which("sbatch"):
        raise UserError("--backend slurm: this machine has no sbatch; run it on a login node of the cluster")
    executor = submitit.AutoExecutor(folder, cluster=cluster, slurm_max_num_timeout=_REQUEUES)
    settings = {
        "slurm_partition": options.partition, "gpus_per_node": options.gpus, "cpus_per_task": options.cpus,
        "slurm_array_parallelism": options.at_once,
    }  # fmt: skip
    executor.update_parameters(
        name="vlm_jax",
        timeout_min=options.minutes,
        stderr_to_stdout=True,
        slurm_additional_parameters={"requeue": True, **options.more},
        **{name: value for name, value in settings.items() if value is not None},
    )
    return executor


def submit(executor: Any, cells: Sequence[Cell], grid: str, workdir: Path) -> list[Any]:
    """One array of all cells; each learns its task from `job.txt` in its folder. Returns submitit's jobs."""
    if not cells:
        return []
    import submitit

    class Command(submitit.helpers.CommandFunction, submitit.helpers.Checkpointable):
        """A command that is put back in the queue as it is: its checkpoints are its own."""

    # From the folder where the launch was typed, so that paths mean the same. Of a class made here, submitit's pickle
    # carries the body: the task needs nothing of this project to read it.
    try:
        with contextlib.redirect_stderr(io.StringIO()), executor.batch():  # it also prints what it raises
            jobs = [executor.submit(Command(command(grid, workdir, c.index), cwd=Path.cwd())) for c in cells]
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        raise UserError(f"Slurm refused the array: {error}") from error
    for cell, job in zip(cells, jobs, strict=True):
        cell.folder.mkdir(parents=True, exist_ok=True)
        (cell.folder / "error.txt").unlink(missing_ok=True)
        write_text(cell.folder / "job.txt", job.job_id)
    return jobs


def queue() -> set[str]:
    """The tasks of this user that wait or run. Raises `UserError` where Slurm does not answer."""
    squeue = ["squeue", "--noheader", "--array", "--format=%i", f"--user={os.getuid()}"]
    try:
        queue = subprocess.run(squeue, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", "") or str(error)).strip()
        raise UserError(f"squeue: {reason}; is Slurm running, and may this user use it?") from error
    return set(queue.stdout.split())


def _watcher(left: list[Cell], workdir: Path) -> Callable[[], bool]:
    """Whether a task of these cells is in the queue. A task that left it without a row or a reason was killed: that is
    recorded in its cell's `error.txt`."""
    polled = -_POLL_EVERY_SECS
    gone: dict[str, float] = {}
    open_cells = {cell.name: cell for cell in left}
    queued: set[str] = set()

    def going() -> bool:
        nonlocal polled, queued
        if time.monotonic() - polled < _POLL_EVERY_SECS:
            return bool(open_cells)
        polled = time.monotonic()
        try:
            queued = queue()
        except UserError:
            return True  # a controller that is busy or restarts
        for cell in list(open_cells.values()):
            if states.task_of(cell) in queued:
                continue
            kind = states.state_of(cell).kind
            if kind == "waiting" and time.monotonic() - gone.setdefault(cell.name, polled) < _GRACE_SECS:
                continue
            if kind == "waiting" and states.task_of(cell):
                logs = sorted((workdir / "slurm").glob(f"{states.task_of(cell)}_*_log.out"))
                lines = states.last_lines(logs[-1], _LOG_LINES) if logs else []
                states.fail(cell, "\n".join([*lines, f"Slurm task {states.task_of(cell)} ended without a row"]))
            if kind != "running":
                del open_cells[cell.name]
        return bool(open_cells)

    return going
