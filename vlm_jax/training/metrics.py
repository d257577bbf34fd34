"""Metrics to `metrics.jsonl` and TensorBoard, written by a thread that waits for the device."""

import contextlib
import errno
import json
import math
import os
import socket
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tensorboardX import RecordWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from vlm_jax.core import reading
from vlm_jax.core.errors import UserError
from vlm_jax.core.files import write_text

_MAX_BYTES = 2**32  # of metrics.jsonl
_FLUSH_SECS = 30.0  # of TensorBoard's file


class MetricWriter:
    """`write(step, make)` calls `make()` on the writer's thread; `close()` waits for pending writes.

    Lines after `step`, from which the run resumes, are dropped. After `close()`, `last` has the newest value of each
    metric, also of an earlier process. Raises `UserError` where a folder or a file is in the place of the other.
    """

    def __init__(self, workdir: Path, step: int | None = None):
        path, board = workdir / "metrics.jsonl", workdir / "tensorboard"
        try:
            board.mkdir(parents=True, exist_ok=True)
            if reading.kind(path) == "folder":  # a pipe would block, and is refused
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
            kept = [] if step is None else keep_until(path, step)
            self._lines = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        except (IsADirectoryError, FileExistsError, NotADirectoryError) as error:
            raise UserError(f"{error.filename}: metrics cannot be written here ({error.strerror}): move it") from error
        # Not SummaryWriter: its thread dies of a full disk, and `close` waits for it forever.
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._board = RecordWriter(str(board / name))
        self._write_event(file_version="brain.Event:2")
        if step is not None:
            self._write_event(step=step + 1, session_log=SessionLog(status=SessionLog.START))
        self._flushed = time.monotonic()
        self._thread = ThreadPoolExecutor(1, "metrics")
        self._outstanding: list[Future[None]] = []
        before = {name: value for line in kept for name, value in line.items() if name != "step"}
        numbers = {name: math.nan if value is None else value for name, value in before.items()}
        self.last = {name: float(value) for name, value in numbers.items() if isinstance(value, int | float)}

    def write(self, step: int, make: Callable[[], Mapping[str, float]]) -> None:
        """`make` returns numbers; values that are not finite are written as null."""
        self._outstanding = [f for f in self._outstanding if not f.done() or f.result()]
        self._outstanding.append(self._thread.submit(self._write, step, make))

    def _write(self, step: int, make: Callable[[], Mapping[str, float]]) -> None:
        values = dict(make())
        self.last |= values
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._lines.write(json.dumps({"step": step, **finite}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._write_event(step=step, summary=scalar(name, value))
        if time.monotonic() - self._flushed > _FLUSH_SECS:
            self._board.flush()
            self._flushed = time.monotonic()

    def _write_event(self, **fields: Any) -> None:
        self._board.write(Event(wall_time=time.time(), **fields).SerializeToString())

    def wait(self) -> None:
        """Waits for pending writes, as before a checkpoint: its steps are not logged again."""
        for future in self._outstanding:
            future.result()

    def close(self) -> None:
        """Closes the files, then raises what `make` or a full disk raised unless `write` or `wait` did."""
        self._thread.shutdown(wait=True)
        with contextlib.ExitStack() as stack:  # each is closed, whatever another raises
            stack.callback(self.wait)
            stack.callback(self._board.close)
            stack.callback(self._lines.close)


def keep_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Drops the lines of later steps and a truncated line. Returns the others."""
    if not reading.kind(path):
        return []
    kept = []
    for line in reading.read_bytes(path, _MAX_BYTES).decode(errors="replace").splitlines():
        try:
            values = reading.parse_json(line, "")
        except UserError:
            continue
        if _is_line(values) and values["step"] <= step:
            kept.append(values)
    write_text(path, "".join(json.dumps(values) + "\n" for values in kept))
    return kept


def _is_line(values: Any) -> bool:
    """Whether this is a step with numbers or nulls, or with lists (the ids of `skipped.jsonl`)."""
    if not isinstance(values, dict) or type(values.get("step")) is not int:
        return False
    return all(value is None or isinstance(value, int | float | list) for value in values.values())
