"""What libraries print about a save that failed in the background; `Checkpoints.wait` raises its error."""

import functools
import logging
import sys
import threading
from typing import Any

from vlm_jax.core.files import disk_problem


@functools.cache
def hold_back() -> None:
    """Drops messages that repeat the error of a failed save: logs of Orbax's threads and of asyncio, and exceptions of
    TensorStore's callbacks, which call an event loop that has ended with the save."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(lambda record: not _repeats(record))
    show_unraisable, show_of_thread = sys.unraisablehook, threading.excepthook

    def unraisablehook(args: Any) -> None:
        if not (isinstance(args.exc_value, RuntimeError) and str(args.exc_value) == "Event loop is closed"):
            show_unraisable(args)

    def excepthook(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is None or disk_problem(args.exc_value) is None:
            show_of_thread(args)

    sys.unraisablehook, threading.excepthook = unraisablehook, excepthook


def _repeats(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    if record.levelno < logging.ERROR:
        return False
    return disk_problem(error or RuntimeError(record.getMessage())) is not None or (
        record.name == "absl" and error is not None
    )
