"""Runs cells on this machine in parallel: one process per GPU, one on a TPU host, one per core elsewhere."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from experiments.launching import states
from experiments.launching.cells import Cell
from experiments.launching.follow import follow
from vlm_jax.core.errors import STOPPED, UserError

_LOOK_EVERY_SECS = 0.3
_SAVING_SECS = 60
# XLA on CPUs allocates the temporary buffer of a program at every execution. glibc maps large blocks anew each time,
# and page faults take up to half of a small step: a heap that keeps freed memory avoids them. (Heaps of threads are at
# most 64 MiB; MALLOC_ARENA_MAX=1 serves larger buffers too, but makes cold compilation a third dearer.)
_KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",  # no block is mapped
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    "MALLOC_TOP_PAD_": str(1 << 26),
}


class Devices(NamedTuple):
    """Devices to divide between processes, found without JAX, which would claim them."""

    gpus: tuple[str, ...]  # as CUDA_VISIBLE_DEVICES names them
    tpu: bool
    cores: tuple[int, ...]


def devices(environment: Mapping[str, str] = os.environ, dev: Path = Path("/dev")) -> Devices:
    """The accelerators and cores that this process may use."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    platforms = environment.get("JAX_PLATFORMS", "")
    gpus = tuple(sorted((path.name.removeprefix("nvidia") for path in dev.glob("nvidia[0-9]*")), key=int))
    if "CUDA_VISIBLE_DEVICES" in environment and gpus:
        gpus = tuple(name for name in environment["CUDA_VISIBLE_DEVICES"].split(",") if name not in ("", "-1"))
    tpu = any(dev.glob("accel[0-9]*")) or (not gpus and any(dev.glob("vfio/[0-9]*")))
    if platforms == "cpu":
        gpus, tpu = (), False
    return Devices(gpus, tpu, tuple(sorted(cores)))


def default_workers() -> int:
    """One process per GPU, one on a TPU host, one per CPU core."""
    here = devices()
    return len(here.gpus) or (1 if here.tpu else len(here.cores))


def share_of(index: int, workers: int, here: Devices) -> tuple[dict[str, str], list[str]]:
    """Environment and command prefix of worker `index` of `workers`."""
    if here.gpus:
        mine = here.gpus[index::workers] or (here.gpus[index % len(here.gpus)],)
        shared = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if workers > len(here.gpus) else {}
        return {"CUDA_VISIBLE_DEVICES": ",".join(mine), **shared}, []
    if here.tpu:
        return {}, []
    # Small cells spend more time compiling than optimisation saves, and two single-threaded programs are faster than
    # one with two threads.
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=1".strip()
    pinned = shutil.which("taskset") and workers <= len(here.cores)
    prefix = ["taskset", "-c", ",".join(map(str, here.cores[index::workers]))] if pinned else []
    return {
        "XLA_FLAGS": flags,
        **{name: os.environ.get(name, value) for name, value in _KEEP_FREED_MEMORY.items()},
    }, prefix


def run(left: list[Cell], grid: str, workdir: Path, workers: int, console: Console) -> None:
    """Runs the cells. Raises `UserError` for an invalid number of workers and if a worker cannot start."""
    here = devices()
    if workers < 1 or (here.tpu and workers > 1):
        raise UserError(f"--workers: expected {'1 or more' if workers < 1 else '1 on a TPU host'}, got {workers}")
    for cell in left:
        if not states.is_locked(cell):  # retried
            (cell.folder / "error.txt").unlink(missing_ok=True)
    workers = min(workers, len(left))
    log = workdir / "workers.log"
    command = [sys.executable, "-m", "experiments.launching.worker", "--grid", grid, "--workdir", str(workdir)]

    def start(index: int) -> subprocess.Popen[bytes]:
        environment, prefix = share_of(index, workers, here)
        with open(log, "ab") as output:
            return subprocess.Popen([*prefix, *command], stdout=output, stderr=output, env=os.environ | environment)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # workers end their step and save first
    running = {index: start(index) for index in range(workers)}
    try:
        look_every_secs = _LOOK_EVERY_SECS + len(left) / 100  # each look reads files of every cell
        follow(left, workdir, _tender(running, left, start, log), console, look_every_secs)
    finally:
        _stop(list(running.values()), console)


def _stop(processes: list[subprocess.Popen[bytes]], console: Console) -> None:
    """Sends SIGTERM to the workers and waits until they have saved."""
    if processes:
        console.print("stopping: each worker ends its step and saves")
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(_SAVING_SECS)
        except subprocess.TimeoutExpired:
            process.kill()


def _tender(
    running: dict[int, subprocess.Popen[bytes]],
    left: list[Cell],
    start: Callable[[int], subprocess.Popen[bytes]],
    log: Path,
) -> Callable[[], bool]:
    """Restarts workers that die in a cell, which is marked failed; the result tells whether any worker runs."""

    def going() -> bool:
        for index, process in list(running.items()):
            code = process.poll()
            if code is None:
                continue
            del running[index]
            if code in (0, STOPPED):  # stopped by a signal, and has saved
                continue
            me = (socket.gethostname(), process.pid)
            dead = [cell for cell in left if (last := states.progress_of(cell)) and (last["host"], last["pid"]) == me]
            if not dead:
                raise UserError(f"worker {index}: ended outside a cell (see {log})")
            lines = states.last_lines(dead[0].folder / "log.txt", 5)
            states.fail(dead[0], "\n".join([*lines, f"its process ended with {code}"]))
            running[index] = start(index)
        return bool(running)

    return going
