"""The rows of a train step that a topology is best at: the fewest whose predicted MFU is within `NEAR` of the highest,
confirmed by compiling."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from vlm_jax.aot import programs, report, variants
from vlm_jax.build import fitting
from vlm_jax.core import axes
from vlm_jax.core.specs import RunSpec, StageSpec
from vlm_jax.distributed.partitioning import Plan, make_plan
from vlm_jax.sizing import chips, hlo, remat, roofline

NEAR = 0.01  # of the highest MFU: of the batches this near to it, the smallest is taken
_COMPILED = 3  # at most, beside the batch of the config
_MOST = 64  # rows of a device and microbatch

Compiled = tuple[dict[str, Any], str]  # the row and the HLO text


class Estimate(NamedTuple):
    """A batch and policy with what they are expected to take."""

    rows: int
    policy: str
    peak_bytes: float
    mfu: float


def with_rows(spec: RunSpec, stage: StageSpec, rows: int) -> tuple[RunSpec, StageSpec]:
    """The run and its stage with that many rows a step."""
    if stage.data is None or not stage.data.batch_rows:
        return dataclasses.replace(spec, data=dataclasses.replace(spec.data, batch_rows=rows)), stage
    changed = dataclasses.replace(stage, data=dataclasses.replace(stage.data, batch_rows=rows))
    stages = tuple(changed if each == stage else each for each in spec.stages)
    return dataclasses.replace(spec, stages=stages), changed


def best(spec: RunSpec, stage: StageSpec, topology: str) -> list[Compiled]:
    """The compiled train step at the config's rows and, where another batch is better, that at the best rows. Policies
    other than the config's are tried if that is "auto"."""
    plan = make_plan(spec.compute, programs.devices(topology, spec.compute.slices))
    usable = chips.device(report.chip_of(topology).name).usable_bytes * (1 - fitting.MARGIN)
    own = variants.compile_row(spec, stage, topology, "train")
    tried = [own]
    for _ in range(_COMPILED):
        found = list(estimates(spec, stage, plan, topology, [row for row, _ in tried]))
        known = {(row["batch_examples"], row["remat"]) for row, _ in tried}
        chosen = choose(found, usable)
        if chosen is None or (chosen.rows, chosen.policy) in known:
            break
        sized = with_rows(with_policy(spec, chosen.policy), stage, chosen.rows)
        tried.append(variants.compile_row(*sized, topology, "train"))
    fits = [each for each in tried if each[0]["peak_bytes"] <= usable and each[1]]
    found_best = max(fits, key=lambda each: each[0]["mfu"], default=own)
    return [own] if found_best is own else [own, found_best]


def choose(found: list[Estimate], usable: float) -> Estimate | None:
    """The smallest batch whose MFU is within `NEAR` of the highest among those that fit; None if none fits."""
    fits = [each for each in found if each.peak_bytes <= usable]
    highest = max((each.mfu for each in fits), default=0.0)
    near = [each for each in fits if each.mfu >= (1 - NEAR) * highest]
    return min(near, key=lambda each: (each.rows, -each.mfu), default=None)


def with_policy(spec: RunSpec, policy: str) -> RunSpec:
    """The run with another rematerialisation policy."""
    return dataclasses.replace(spec, compute=dataclasses.replace(spec.compute, remat=policy))


def estimates(
    spec: RunSpec, stage: StageSpec, plan: Plan, topology: str, tried: Sequence[dict[str, Any]]
) -> Iterator[Estimate]:
    """Every batch and policy, by memory and network of compiled programs: state, gradients and traffic are the same at
    every batch, what the blocks keep is known, and the rest of the memory is proportional to the rows. Of the compiled
    rows, the last with that policy counts, else the last.
    """
    chip, count = chips.device(report.chip_of(topology).name), plan.mesh.size
    shards = report.kernel_shards(plan)
    unit = plan.axis_size(axes.BATCH) * spec.compute.microbatches
    policies = remat.POLICIES if spec.compute.remat == fitting.AUTO else (spec.compute.remat,)

    def kept(rows: int, policy: str) -> float:
        return fitting.kept_bytes(*with_rows(spec, stage, rows), plan, policy)

    first = tried[0].get("collectives", [])  # a program that does not fit has none

    def reference(policy: str) -> tuple[list[hlo.Collective], float, float]:
        """The network, the memory of state and gradients, and the rest for each row."""
        row = next((row for row in reversed(tried) if row["remat"] == policy), tried[-1])
        network = [
            hlo.Collective(each["kind"], tuple(each["axes"]), 0, each["count"], (), each["wire_bytes"],
                           each["beside_products"], "") for each in row.get("collectives", first)
        ]  # fmt: skip
        gradients = min(row["params_bytes"], row["temporaries_bytes"])
        fixed = row["params_bytes"] + row["optimiser_bytes"] + gradients
        rest = max(row["peak_bytes"] - fixed - kept(row["batch_examples"], row["remat"]), 0.0)
        return network, fixed, rest / row["batch_examples"]

    references = {policy: reference(policy) for policy in policies}
    for rows in range(unit, unit * _MOST + 1, unit):
        for policy, (network, fixed, rest) in references.items():
            sized, part = with_rows(with_policy(spec, policy), stage, rows)
            work = roofline.train_work(sized, part, count, *shards)
            predicted = roofline.predict(work, network, chip, count, lambda on: report.link_share(plan, chip, on))
            peak = fixed + kept(rows, policy) + rest * rows
            yield Estimate(rows, policy, peak, predicted.mfu)
        if peak > chip.usable_bytes:  # under the last policy
            return
