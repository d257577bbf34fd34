"""Signals that end a command at any moment, also while the main thread is in C++ code, as when it compiles.

Python runs signal handlers in the main thread, between instructions; an exception raised there may pass through C++
frames that cannot carry one, and ends the process with a crash. A thread that reads signal numbers from a pipe does not
wait for the main thread and raises nothing.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable

INTERRUPTED = 130  # exit code of Ctrl-C, as a shell reports it
_SHOW_CURSOR = b"\x1b[?25h"
_notices: dict[int, Callable[[], None]] = {}


def watch(signum: int, notice: Callable[[], None]) -> None:
    """Calls `notice()` in a thread when the signal arrives. To be called in the main thread, which sets the handler."""
    if not _notices:
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=_read, args=(reader,), name="signals", daemon=True).start()
    _notices[signum] = notice


def _read(reader: int) -> None:
    while numbers := os.read(reader, 64):
        for number in dict.fromkeys(numbers):
            if number in _notices:
                _notices[number]()


def exit_on_interrupt() -> None:
    """From now on, Ctrl-C prints one line and ends the process with code 130, after removing temporary files.

    A part of a command that has to end differently sets a handler of its own (`signal.default_int_handler`).
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        return
    signal.signal(signal.SIGINT, _ignore)
    watch(signal.SIGINT, _interrupted)


def _ignore(signum: int, frame: object) -> None:
    """The handler, without which Python would raise KeyboardInterrupt: the thread ends the process."""


def _interrupted() -> None:
    if signal.getsignal(signal.SIGINT) is _ignore:
        exit_interrupted()


def exit_interrupted() -> None:
    """Ends the process as Ctrl-C does, without waiting for its threads."""
    if files := sys.modules.get("vlm_jax.core.files"):  # else nothing is being written
        files.remove_temporary()
    with contextlib.suppress(OSError):
        terminal = next((stream for stream in (1, 2) if os.isatty(stream)), None)
        if terminal is not None:
            os.write(terminal, _SHOW_CURSOR)  # hidden by a progress bar
        os.write(2, b"stopped by Ctrl-C\n")
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(INTERRUPTED)
