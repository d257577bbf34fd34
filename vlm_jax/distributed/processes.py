"""Multi-process runs: start, barrier, broadcast, preemption.

Every process runs the same program; process 0, the primary, alone writes files outside checkpoints. Where one is lost,
the others exit within a minute with code `LOST`, and the same command in all of them resumes. The workdir must be
shared by all processes; the cache may be shared (on a file system with locks) or local to each host.
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

from vlm_jax.core.errors import LOST, STOPPED, RunStopped, UserError

_HEARTBEAT_SECS = 30  # a process that was silent for this long is lost
_INIT_SECS = 120
_SHUTDOWN_SECS = 20
_GRACE_SECS = 20  # from SIGTERM until a step has ended; of the usual half minute, the rest is for saving
# What the collectives, the coordinator and Orbax's barriers say when a process is gone.
_LOST = re.compile(
    r"gloo|nccl|connection|coordination|barrier|heartbeat|socket|peer|UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED", re.I
)

_RESUME = "{}: start all processes again, they resume from the newest checkpoint"
_KEPT: list[Any] = []  # the SIGABRT handler, which must outlive its installation


def add_flags(parser: argparse.ArgumentParser) -> None:
    """`--processes`, `--process` and `--coordinator`."""
    group = parser.add_argument_group(
        "several processes", "start the same command in every process; the workdir must be shared by all of them"
    )
    group.add_argument(
        "--processes", default="1", help="how many; auto: as a TPU pod, Slurm, Open MPI or JAX's variables say"
    )
    group.add_argument("--process", type=int, help="number of this one, from 0")
    group.add_argument("--coordinator", help="HOST:PORT of process 0, the port any free one")


@contextlib.contextmanager
def init_distributed(args: argparse.Namespace) -> Iterator[None]:
    """`jax.distributed`, as the flags say, for the length of a command.

    Raises `UserError` where the flags do not fit together or the other processes do not connect. Where there are
    others, an error that leaves the block exits this process at once: they would wait for it, and it for them.
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
    if not automatic and not args.processes.isdigit():
        raise UserError(f"--processes: expected a number or auto, got {args.processes!r}")
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
    named = {} if automatic else dict(num_processes=int(args.processes), process_id=args.process)
    try:
        jax.distributed.initialize(
            args.coordinator,
            initialization_timeout=_INIT_SECS,
            heartbeat_timeout_seconds=_HEARTBEAT_SECS,
            shutdown_timeout_seconds=_SHUTDOWN_SECS,
            **named,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--processes {args.processes}: cannot connect to the others ({_line(error)})") from error
    _exit_cleanly_on_abort()


def _is_address(text: str) -> bool:
    """HOST:PORT. JAX's coordinator crashes on a port that is no number."""
    host, _, port = text.rpartition(":")
    return bool(host) and port.isascii() and port.isdigit() and 0 < int(port) < 2**16


def _exit_cleanly_on_abort() -> None:
    """JAX aborts a process that has lost the coordinator, from a C++ thread and past every `except`.

    A handler that is a C function runs in that thread, so it can still print what to do and choose the exit code.
    """
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
        code = 130
    elif isinstance(error, Exception) and _LOST.search(str(error)):
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
    """Raises `UserError` where devices belong to several processes that are not connected: a pod without the flag."""
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise UserError(f"the devices belong to {jax.process_count()} processes: add --processes auto to the command")


def broadcast_from_primary(value: int) -> int:
    """Process 0's value, in every process."""
    return value if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def fetch(leaf: Any) -> np.ndarray:
    """The whole array on this host, wherever its shards are. Every process must call it."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
        return np.asarray(leaf)
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))


def barrier(name: str) -> None:
    """Returns when every process has called it."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def watch_sigterm() -> Callable[[int], bool]:
    """`stop(step)`: True after the same step in all processes, once one of them has received SIGTERM.

    A single process also exits without saving if no step ends in time, as while it compiles. Python runs signal
    handlers in the main thread, which is then busy, so a thread of its own watches.
    """
    if jax.process_count() > 1:
        return multihost_utils.reached_preemption_sync_point
    requested, noticed = threading.Event(), threading.Event()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGTERM, lambda *_: requested.set())
    signal.set_wakeup_fd(writer)

    def watch() -> None:
        while signal.SIGTERM not in os.read(reader, 64):
            pass
        requested.set()
        if not noticed.wait(_GRACE_SECS):
            print("stopped by SIGTERM, without saving: no step ended in time", file=sys.stderr, flush=True)
            os._exit(STOPPED)

    threading.Thread(target=watch, name="sigterm", daemon=True).start()

    def stop(step: int) -> bool:
        del step
        if requested.is_set():
            noticed.set()
        return requested.is_set()

    return stop
