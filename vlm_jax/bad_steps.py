"""Bad steps of a run: a record of skipped updates, and a report when the run stops."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from vlm_jax.checkpoints import orbax
from vlm_jax.core.errors import BAD_STEP, RunStopped
from vlm_jax.core.files import write_json
from vlm_jax.core.specs import RunSpec
from vlm_jax.core.structs import TrainState
from vlm_jax.data.pipeline import Batches
from vlm_jax.distributed import processes
from vlm_jax.training import guard, metrics

_SKIPPED = "skipped.jsonl"


def forget_after(workdir: Path, step: int) -> None:
    """Drops the records of steps after `step`, from which the run resumes."""
    if processes.is_primary():
        metrics.keep_until(workdir / _SKIPPED, step)


def make_check(
    workdir: Path, batches: Batches, first_step: int, spec: RunSpec, skipped: int
) -> Callable[[Sequence[guard.StepRecord], TrainState], None]:
    """`check(steps, state)` for the loop; `first_step` is the number of the step before the first batch, `skipped` that
    of the updates that the stage has skipped before.

    Each skipped step is a line of `skipped.jsonl` with the ids of its examples. Raises `RunStopped` where the policy
    stops the run, after writing the reason, the ids and the state to `bad_step/`.
    """

    def ids(step: int) -> list[str]:
        return list(batches.ids(step - first_step - 1))

    def check(steps: Sequence[guard.StepRecord], state: TrainState) -> None:
        nonlocal skipped
        steps = jax.device_get(list(steps))
        for step in steps:
            if step.norms.skipped is not None and step.norms.skipped > skipped:
                skipped = int(step.norms.skipped)
                if processes.is_primary():
                    with open(workdir / _SKIPPED, "a") as file:
                        file.write(json.dumps({"step": step.number, "examples": ids(step.number)}) + "\n")
        if bad := guard.find_stop(steps, spec.bad_step):
            _stop(workdir, bad, ids(bad[0]), batches.data.mixture.name, state)

    return check


def _stop(workdir: Path, bad: tuple[int, str], ids: list[str], split: str, state: Any) -> None:
    step, why = bad
    folder = workdir / "bad_step"
    orbax.save_state(folder / "state", state)
    if processes.is_primary():
        noticed = int(jax.device_get(state.step))
        report = {"step": step, "why": why, "noticed_at_step": noticed, "split": split, "examples": ids}
        write_json(folder / "report.json", report)
    raise RunStopped(
        f"step {step}: {why}. The ids of its batch and the state are in {folder}; checkpoints are of earlier steps. To "
        "skip such steps, start a run with bad_step.policy=skip_update in a new workdir",
        BAD_STEP,
    )
