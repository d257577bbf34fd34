"""What libraries print about a save that failed in the background; `Checkpoints.wait` raises its error."""

import functools
import logging
import sys
import threading
import warnings
from typing import Any

from vlm_jax.core.files import disk_problem


@functools.cache
def hold_back() -> None:
    """Drops messages that repeat the error of a failed save: logs of Orbax's threads and of asyncio, exceptions of
    TensorStore's callbacks, which call an event loop that has ended with the save, and its writes that never began."""
    for name in ("absl", "asyncio", "concurrent.futures"):
        logging.getLogger(name).addFilter(lambda record: not _repeats(record))
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    show_unraisable, show_of_thread = sys.unraisablehook, threading.excepthook

    def unraisablehook(args: Any) -> None:
        if not (_of_a_closed_loop(args.exc_value) or (args.exc_value and disk_problem(args.exc_value))):
            show_unraisable(args)

    def excepthook(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is None or disk_problem(args.exc_value) is None:
            show_of_thread(args)

    sys.unraisablehook, threading.excepthook = unraisablehook, excepthook


def _of_a_closed_loop(error: BaseException | None) -> bool:
    return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"


def _repeats(record: logging.LogRecord) -> bool:
    if record.levelno < logging.ERROR:
        return False
    error, message = record.exc_info[1] if record.exc_info else None, record.getMessage()
    return (
        disk_problem(error or RuntimeError(message)) is not None
        or _of_a_closed_loop(error)
        or (record.name == "absl" and error is not None)
        or (record.name == "asyncio" and message.startswith("Task was destroyed but it is pending"))
    )
