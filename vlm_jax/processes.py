"""Several processes as one run: how they meet, agree and part.

Promises: every process runs the same program; process 0 alone writes files outside checkpoints; where one is lost, the
others end within a minute with code `LOST`, and the same command starts all of them again. The workdir must be shared
by all processes; the cache may be shared or each host's own, and a shared one must honour file locks.
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

from vlm_jax.core.errors import LOST, STOPPED, Ended, UserError

_HEARTBEAT_SECS = 30  # a process that was silent for so long is lost
_MEETING_SECS = 120
_PARTING_SECS = 20
_GRACE_SECS = 20  # from SIGTERM until a step has ended; of the usual half minute, the rest is for saving
# What the collectives, the coordinator and Orbax's barriers say when a process is gone.
_LOST = re.compile(
    r"gloo|nccl|connection|coordination|barrier|heartbeat|socket|peer|UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED", re.I
)

_GOES_ON = "{}: start all of them again, they go on from the newest checkpoint"
_ME: list[Any] = []  # number of this process, and the handler, which must outlive its installation


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
def joined(args: argparse.Namespace) -> Iterator[None]:
    """Meets the other processes, for the length of a command.

    Raises `UserError` where the flags do not fit together or the others do not come. An error that leaves the block
    ends this process at once if there are others: they would wait for it, and it for them.
    """
    _meet(args)
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1 or isinstance(error, UserError | Ended):
            raise
        _leave(error)


def _meet(args: argparse.Namespace) -> None:
    automatic, flags = args.processes == "auto", (args.process, args.coordinator)
    if not automatic and not args.processes.isdigit():
        raise UserError(f"--processes {args.processes}: a number or auto is wanted")
    if automatic or int(args.processes) == 1:
        if flags != (None, None):
            raise UserError("--process and --coordinator go with --processes N: name their number too")
    elif None in flags or not 0 <= args.process < int(args.processes) or not _is_address(args.coordinator):
        raise UserError(
            f"--processes {args.processes} wants --process 0 to {int(args.processes) - 1} and --coordinator HOST:PORT"
        )
    if not automatic and int(args.processes) == 1:
        return
    named = {} if automatic else dict(num_processes=int(args.processes), process_id=args.process)
    try:
        jax.distributed.initialize(
            args.coordinator,
            initialization_timeout=_MEETING_SECS,
            heartbeat_timeout_seconds=_HEARTBEAT_SECS,
            shutdown_timeout_seconds=_PARTING_SECS,
            **named,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--processes {args.processes}: the processes did not meet ({_line(error)})") from error
    _end_well_on_abort()


def _is_address(text: str) -> bool:
    """HOST:PORT. JAX's coordinator takes what is not for a number, and crashes."""
    host, _, port = text.rpartition(":")
    return bool(host) and port.isascii() and port.isdigit() and 0 < int(port) < 2**16


def _end_well_on_abort() -> None:
    """JAX aborts a process that has lost the coordinator: from a thread of C++, past every `except`.

    A handler that is a C function runs in that thread before the process is gone, and says what to do.
    """

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def handler(signum: int) -> None:
        del signum
        os.write(2, f"error: process {_ME[0]} {_GOES_ON.format('was aborted, as when another one is lost')}\n".encode())
        os._exit(LOST)

    _ME[:] = [jax.process_index(), handler]
    ctypes.CDLL(None).signal(signal.SIGABRT, handler)


def _leave(error: BaseException) -> NoReturn:
    """Says what happened, and goes without waiting for anybody."""
    code = 1
    if isinstance(error, KeyboardInterrupt):
        code = 130
    elif isinstance(error, Exception) and _LOST.search(str(error)):
        code = LOST
        what = f"lost another process ({_line(error)})"
        print(f"error: process {jax.process_index()} {_GOES_ON.format(what)}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]


def is_first() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


def check_joined() -> None:
    """Raises `UserError` where the devices belong to several processes that have not met: a pod without the flag."""
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise UserError(f"the devices belong to {jax.process_count()} processes: add --processes auto to the command")


def first_says(value: int) -> int:
    """Process 0's value, in every process."""
    return value if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def fetch(leaf: Any) -> np.ndarray:
    """A whole array on this host, wherever its parts are. Every process must ask for it."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
        return np.asarray(leaf)
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))


def meet(name: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def watch_sigterm() -> Callable[[int], bool]:
    """Whether to stop behind a step: True at the same step in all processes, once one of them has got SIGTERM.

    One process alone also ends without saving if no step ends in time, as while it compiles: signal handlers of Python
    wait for the main thread, so a thread of its own watches.
    """
    if jax.process_count() > 1:
        return multihost_utils.reached_preemption_sync_point
    asked, heard = threading.Event(), threading.Event()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGTERM, lambda *_: asked.set())
    signal.set_wakeup_fd(writer)

    def watch() -> None:
        while signal.SIGTERM not in os.read(reader, 64):
            pass
        asked.set()
        if not heard.wait(_GRACE_SECS):
            print("stopped by SIGTERM, without saving: no step ended in time", file=sys.stderr, flush=True)
            os._exit(STOPPED)

    threading.Thread(target=watch, name="sigterm", daemon=True).start()

    def stop(step: int) -> bool:
        del step
        if asked.is_set():
            heard.set()
        return asked.is_set()

    return stop
