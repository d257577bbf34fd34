"""Multi-process runs: start, barrier, broadcast, preemption.

All processes run the same program; only process 0, the primary, writes files outside checkpoints. When one is lost, the
others exit within a minute with code `LOST`, and the same command in all of them resumes. The workdir is shared by all
processes; the cache may be shared (on a file system with locks) or local to a host.
"""

import argparse
import contextlib
import ctypes
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from vlm_jax.core import interrupts
from vlm_jax.core.errors import LOST, STOPPED, RunStopped, UserError

_HEARTBEAT_SECS = 30  # a process silent for this long is lost
_INIT_SECS = 120
_SHUTDOWN_SECS = 20
_GRACE_SECS = 20  # from SIGTERM to the end of a step; the rest of the usual 30 s is for saving
# Error messages of collectives, the coordinator and Orbax's barriers after a process was lost.
_LOST = re.compile(
    r"gloo|nccl|connection|coordination|barrier|heartbeat|socket|peer|UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED", re.I
)

_RESUME = "{}: start all processes again, they resume from the newest checkpoint"
_KEPT: list[Any] = []  # the SIGABRT handler, which must outlive its installation


def add_flags(parser: argparse.ArgumentParser) -> None:
    """`--processes`, `--process` and `--coordinator`."""
    group = parser.add_argument_group("multi-process runs", "start the same command in every process, on one workdir")
    group.add_argument("--processes", default="1", help="number, or auto: from a TPU pod, Slurm, Open MPI or JAX's env")
    group.add_argument("--process", type=int, help="index of this process, from 0")
    group.add_argument("--coordinator", help="HOST:PORT of process 0, the port any free one")


@contextlib.contextmanager
def init_distributed(args: argparse.Namespace) -> Iterator[None]:
    """Initialises `jax.distributed` from the flags of `add_flags`. Raises `UserError` for inconsistent flags, or if the
    other processes do not connect. With several processes, an error in the block exits this one without waiting.
    """
    _initialize(args)
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1 or isinstance(error, UserError | RunStopped):
            raise
        _abort(error)


def _initialize(args: argparse.Namespace) -> None:
    automatic, flags = args.processes == "auto", (args.process, args.coordinator)
    if not automatic and not re.fullmatch("[0-9]{1,6}", args.processes):
        raise UserError(f"--processes: expected a number or auto, got {args.processes[:80]!r}")
    if automatic or int(args.processes) == 1:
        if flags != (None, None):
            raise UserError("--process and --coordinator need --processes N (how many there are)")
    elif None in flags or not 0 <= args.process < int(args.processes) or not _is_address(args.coordinator):
        raise UserError(
            f"--processes {args.processes}: expected --process 0 to {int(args.processes) - 1} and --coordinator "
            f"HOST:PORT, got {args.process} and {args.coordinator}"
        )
    if not automatic and int(args.processes) == 1:
        return
    numbers = {} if automatic else dict(num_processes=int(args.processes), process_id=args.process)
    try:
        jax.distributed.initialize(
            args.coordinator, initialization_timeout=_INIT_SECS, heartbeat_timeout_seconds=_HEARTBEAT_SECS,
            shutdown_timeout_seconds=_SHUTDOWN_SECS, **numbers,
        )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--processes {args.processes}: cannot connect to the others ({_line(error)})") from error
    _exit_cleanly_on_abort()


def _is_address(text: str) -> bool:
    """Whether `text` is HOST:PORT; JAX's coordinator crashes on an invalid port."""
    host, _, port = text.rpartition(":")
    return bool(host) and port.isascii() and port.isdigit() and 0 < int(port) < 2**16


def _exit_cleanly_on_abort() -> None:
    """Installs a SIGABRT handler: JAX aborts a process that lost the coordinator from a C++ thread, where only a C
    function can still print a message and choose the exit code."""
    what = f"process {jax.process_index()} was aborted, as when another one is lost"
    message = f"error: {_RESUME.format(what)}\n".encode()

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def handler(signum: int) -> None:
        del signum
        os.write(2, message)
        os._exit(LOST)

    _KEPT[:] = [handler]
    ctypes.CDLL(None).signal(signal.SIGABRT, handler)


def _abort(error: BaseException) -> NoReturn:
    """Reports the error and exits without waiting for the other processes."""
    code = 1
    if isinstance(error, KeyboardInterrupt):
        interrupts.exit_interrupted()
    if isinstance(error, Exception) and _LOST.search(str(error)):
        code = LOST
        what = f"process {jax.process_index()} lost another process ({_line(error)})"
        print(f"error: {_RESUME.format(what)}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]


def is_primary() -> bool:
    """Whether this is process 0, which writes files."""
    return jax.process_index() == 0


def check_initialized() -> None:
    """Raises `UserError` on a pod whose processes were started without `--processes`."""
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise UserError(f"the devices belong to {jax.process_count()} processes: add --processes auto to the command")


def broadcast_from_primary(value: int) -> int:
    """The value of process 0, in every process."""
    return value if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def fetch(leaf: Any) -> np.ndarray:
    """A global array as a numpy array on every host. All processes must call it."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
        return np.asarray(leaf)
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))


def barrier(name: str) -> None:
    """Returns once all processes have called it."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def watch_sigterm() -> Callable[[int], bool]:
    """`stop(step)` -> True at the same step in all processes, once one of them has received SIGTERM.

    A single process exits without saving if no step ends in time (compilation).
    """
    if jax.process_count() > 1:
        return multihost_utils.reached_preemption_sync_point
    requested, noticed = threading.Event(), threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: requested.set())

    def end() -> None:
        requested.set()
        if not noticed.wait(_GRACE_SECS):
            print("stopped by SIGTERM, without saving: no step ended in time", file=sys.stderr, flush=True)
            os._exit(STOPPED)

    interrupts.watch(signal.SIGTERM, lambda: threading.Thread(target=end, name="sigterm", daemon=True).start())

    def stop(step: int) -> bool:
        del step
        if requested.is_set():
            noticed.set()
        return requested.is_set()

    return stop
