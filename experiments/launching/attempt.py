"""One attempt at one cell, in this process: train or resume it, evaluate it, write its row.

The caller holds the lock of the cell. The hosts of a TPU slice, which train a cell together, all make the attempt; the
primary alone reports progress and writes the row.
"""

import dataclasses
import traceback
from collections.abc import Callable

from experiments.launching import states
from experiments.launching.cells import Cell, write_row
from vlm_jax.core.errors import LOST, STOPPED, RunStopped
from vlm_jax.core.specs import RunSpec, at_every_v, total_steps

_TRAINING_SHARE = 0.95  # of a cell; the rest is its evaluation
_CHECKPOINTS = 10


def attempt(cell: Cell, report: states.Report, stop: Callable[[int], bool]) -> None:
    """Runs the cell. An error is written to its `error.txt`, then raised.

    `stop(step)` asks to save and end, which raises `RunStopped`; that is no failure.
    """
    (cell.folder / "error.txt").unlink(missing_ok=True)
    try:
        _run(cell, report, stop)
    except Exception as error:
        stopped = isinstance(error, RunStopped) and error.code in (LOST, STOPPED)
        if not stopped and not states.error_of(cell):  # of several processes, the first to fail knows why
            states.fail(cell, traceback.format_exc())
        raise
    (cell.folder / "progress.json").unlink(missing_ok=True)


def _run(cell: Cell, report: states.Report, stop: Callable[[int], bool]) -> None:
    report("starting", 0.0)
    from vlm_jax import build, job
    from vlm_jax.distributed import processes

    cache = build.default_cache()
    build.use_compilation_cache(cache)
    report("data and features", 0.0)
    run = build.open_run(cell.spec, cache)
    steps = total_steps(run.network.spec)
    report("first program", 0.0)
    on_log = lambda log, values: report("training", _TRAINING_SHARE * log.step / steps)  # noqa: E731
    params = job.train(run, cell.folder, on_log, stop)
    report("evaluating", _TRAINING_SHARE)
    batches, done = job.evaluation_batches(run) * len(at_every_v(cell.spec)), 0

    def on_batch(rows: int) -> None:
        nonlocal done
        done += 1
        report("evaluating", _TRAINING_SHARE + (1 - _TRAINING_SHARE) * min(done / batches, 1))

    rows = [job.evaluate(at, params, cell.name, cell.folder, on_batch) for at in build.runs_at_every_v(run, cache)]
    if processes.is_primary():
        write_row(cell, *rows)


def with_checkpoints(spec: RunSpec) -> RunSpec:
    """The same experiment on a machine that may be preempted: a spec that saves only at its end saves in between."""
    steps = max(total_steps(spec) // _CHECKPOINTS, 1) if total_steps(spec) else 500  # unknown: stages in epochs
    return dataclasses.replace(spec, save_every_steps=spec.save_every_steps or steps)
