"""The numbers of a run: metrics of a log, and `summary.json`."""

import math
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vlm_jax.build import Network
from vlm_jax.checkpoints.huggingface.fields import read_json
from vlm_jax.core import specs
from vlm_jax.core.errors import UserError
from vlm_jax.core.files import write_json
from vlm_jax.core.specs import RunSpec, StageSpec
from vlm_jax.core.structs import LossSums
from vlm_jax.data.pipeline import Batches
from vlm_jax.distributed.partitioning import Plan
from vlm_jax.evaluation import harness
from vlm_jax.sizing import chips, cost
from vlm_jax.training import loop, optim


def numbers(
    spec: RunSpec, stage: StageSpec, first_step: int, log: loop.Log, names: Sequence[str] = ()
) -> dict[str, float]:
    """The metrics of a log; waits for the device. `first_step` is that of the stage, `names` those of the sources."""
    sums, norms = jax.device_get((log.sums, log.norms))
    values = {
        "loss": float(sums.nll) / max(float(sums.count), 1.0),
        "accuracy": float(sums.hits) / max(float(sums.answers), 1.0),
        "token_error": 1 - float(sums.hits) / max(float(sums.answers), 1.0),
        "grad_norm": float(norms.grad),
        "update_norm": float(norms.update),
        "learning_rate": float(optim.learning_rate(spec.optim, stage)(log.step - first_step - 1)),
    }
    if sums.part_nll is not None:
        pairs = zip(names, sums.part_nll, sums.part_count, strict=True)
        values |= {f"loss/{name}": float(nll) / float(count) for name, nll, count in pairs if count}
    return values if norms.skipped is None else {**values, "skipped": float(norms.skipped)}


def evaluation_numbers(result: harness.Result) -> dict[str, float]:
    """The metrics of an evaluation during training."""
    return {
        "evaluation_accuracy": 1 - result.exact[0],
        "evaluation_error": result.error[0],
        "evaluation_stderr": result.error[1],
        "evaluation_forced_error": result.forced[0],
        "evaluation_forced_nll": result.forced_nll,
    }


def data_report(batches: Batches) -> dict[str, Any]:
    """What a stage trains on; ids of skipped items by reason."""
    parts, rows = batches.data.mixture.parts, batches.epoch(0)
    return {
        "name": batches.data.mixture.name,
        "kept": sum(part.items for part in parts),
        "skipped": {reason: ids for part in parts for reason, ids in part.skipped.items()},
        "unreadable": sorted(batches.data.bad.found.values()),
        "cut": batches.sizes.cut,
        "dropped": batches.sizes.dropped,
        "rows": len(rows),
    }


def log_sums_to_dict(log_sums: loop.LogSums) -> dict[str, Any]:
    """The sums since the last log, for a checkpoint; float32 passes through JSON unchanged."""
    if log_sums.sums is None:
        return {}
    sums = {name: np.asarray(total).tolist() for name, total in log_sums.sums._asdict().items() if total is not None}
    return sums | {"unlogged_steps": log_sums.steps}


def log_sums_from_dict(values: dict[str, Any]) -> loop.LogSums:
    """The inverse of `log_sums_to_dict`."""
    if "unlogged_steps" not in values:
        return loop.LogSums()
    sums = LossSums(**{name: np.float32(values[name]) for name in LossSums._fields if name in values})
    return loop.LogSums(sums, int(values["unlogged_steps"]))


def speed(spec: RunSpec, stage: StageSpec, plan: Plan, question_tokens: float, step_secs: float) -> dict[str, float]:
    """Seconds a step, examples and model FLOPs a second, and MFU on a known chip."""
    flops = cost.step_flops(spec, stage, question_tokens)
    values = {
        "step_secs": step_secs,
        "rows_per_sec": specs.data_of(spec, stage).batch_rows / step_secs,
        "model_flops_per_sec": flops / step_secs,
    }
    chip = chips.of_device(jax.devices()[0].device_kind)
    return values if chip is None else {**values, "mfu": flops / step_secs / (chip.peak_flops * plan.mesh.size)}


def write_summary(
    path: Path, network: Network, values: dict[str, float], params_sha256: str, secs: float, question_tokens: float
) -> None:
    """Writes `summary.json`. `values` are the last metrics; those that are not finite become null. `remat` is the
    policy of the model, which the spec may call "auto"."""
    spec = network.spec
    summary = {
        "step": specs.total_steps(spec),
        **{name: value if math.isfinite(value) else None for name, value in values.items()},
        "params_sha256": params_sha256,
        "secs": secs,
        "train_flops": cost.run_flops(spec, question_tokens),
        "remat": network.model.compute.remat,
        "spec_hash": specs.spec_hash(spec),
        "spec": specs.to_dict(spec),
    }
    write_json(path, summary)


def read_summary(path: Path) -> dict[str, Any]:
    """The contents of `summary.json`. Raises `UserError` where it is missing or damaged."""
    values = read_json(path)
    if values is None:
        raise UserError(f"{path.parent}: its training has not ended (no summary.json); run vlm_jax.train on it again")
    for name, kind in (("train_flops", float), ("secs", float), ("params_sha256", str)):
        value = values.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float if kind is float else kind):
            raise UserError(
                f"{path}: {name}: expected a {'number' if kind is float else 'text'}, got {reprlib.repr(value)} "
                "(delete the file and run vlm_jax.train again)"
            )
    return values
