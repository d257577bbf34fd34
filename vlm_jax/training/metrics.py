"""Metrics to `metrics.jsonl` and TensorBoard, written by a thread that waits for the device."""

import json
import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from vlm_jax.core.files import write_text


class MetricWriter:
    """`write(step, make)` calls `make()` on the writer's thread; `close()` waits for pending writes.

    Lines after `step`, from which the run resumes, are dropped. After `close()`, `last` has the newest value of each
    metric, also of an earlier process.
    """

    def __init__(self, workdir: Path, step: int | None = None):
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "metrics.jsonl"
        kept = [] if step is None else keep_until(path, step)
        self._lines = open(path, "a")  # noqa: SIM115 - closed by close()
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=None if step is None else step + 1)
        self._thread = ThreadPoolExecutor(1, "metrics")
        self._outstanding: list[Future[None]] = []
        before = {name: value for line in kept for name, value in line.items() if name != "step"}
        self.last = {name: math.nan if value is None else float(value) for name, value in before.items()}

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
            self._board.add_scalar(name, value, step)

    def wait(self) -> None:
        """Waits for pending writes, as before a checkpoint: its steps are not logged again."""
        for future in self._outstanding:
            future.result()

    def close(self) -> None:
        """Closes the files, then raises what `make` raised unless `write` or `wait` did."""
        self._thread.shutdown(wait=True)
        self._lines.close()
        self._board.close()
        for future in self._outstanding:
            future.result()


def keep_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Drops the lines of later steps and a truncated line. Returns the others."""
    if not path.exists():
        return []
    kept = []
    for line in path.read_text().splitlines():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(values, dict) and values.get("step", math.inf) <= step:
            kept.append(values)
    write_text(path, "".join(json.dumps(values) + "\n" for values in kept))
    return kept
