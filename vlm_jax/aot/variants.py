"""One run on several topologies, strategies and meshes."""

import dataclasses
import itertools
import math
from typing import Any

from vlm_jax import build
from vlm_jax.aot import programs, report
from vlm_jax.build import fitting
from vlm_jax.core.errors import UserError, unknown
from vlm_jax.core.specs import RunSpec, StageSpec, spec_hash
from vlm_jax.distributed.partitioning import make_plan
from vlm_jax.sizing import chips


def variants(
    spec: RunSpec, topologies: list[str], strategies: list[str], meshes: list[str]
) -> list[tuple[str, RunSpec]]:
    """(topology, spec) of every combination. Raises `UserError` for a mesh that is not three integers."""
    shapes = []
    for text in map(str.strip, meshes) if meshes else [",".join(map(str, spec.compute.mesh))]:
        try:
            data, fsdp, tensor = (int(size) for size in text.split(","))
        except ValueError as error:
            raise UserError(f"--mesh {text}: expected three integers data,fsdp,tensor, such as 1,-1,16") from error
        shapes.append((data, fsdp, tensor))
    return [
        (topology, dataclasses.replace(spec, compute=dataclasses.replace(spec.compute, strategy=strategy, mesh=mesh)))
        for topology, strategy, mesh in itertools.product(topologies, strategies or [spec.compute.strategy], shapes)
    ]


def name(topology: str, spec: RunSpec) -> str:
    """Label of a variant."""
    return f"{topology} {spec.compute.strategy} {','.join(map(str, spec.compute.mesh))}"


def compile_row(spec: RunSpec, stage: StageSpec, topology: str, mode: str) -> tuple[dict[str, Any], str]:
    """The `report.row` of a variant, and its HLO text. Its `remat` is the policy that "auto" has found."""
    if mode not in programs.MODES:
        raise unknown("mode", mode, programs.MODES)
    plan, identity = make_plan(spec.compute, programs.devices(topology, spec.compute.slices)), spec_hash(spec)
    if mode != "train":
        program = programs.compile_mode(spec, plan, mode)
    elif spec.compute.remat == fitting.AUTO:
        usable = chips.device(report.chip_of(topology).name).usable_bytes
        choice = fitting.choose(build.lay_out(spec, plan), [stage], usable)
        program = choice.programs[-1]
        spec = dataclasses.replace(spec, compute=dataclasses.replace(spec.compute, remat=choice.policy))
    else:
        program = fitting.compile_step(build.lay_out(spec, plan), stage)
    return {**report.row(spec, stage, plan, topology, mode, program), "spec_hash": identity}, program.text


def ranking(rows: list[dict[str, Any]]) -> str:
    """Table of the rows, the one that fits with the fewest chip-seconds per row of the batch first."""
    batches = {row.get("batch_examples") for row in rows}

    def price(row: dict[str, Any]) -> float:
        return row["chips"] * row["step_secs"] / row.get("batch_examples", 1) if row["fits"] else math.inf

    def sized(row: dict[str, Any]) -> str:
        return f"{row['batch_examples']} rows, remat {row['remat']}" if len(batches) > 1 else ""

    lines = [
        f"{'topology':12s} {'strategy':12s} {'mesh':>16s} {'peak GiB':>9s} {'ms':>9s} {'MFU':>6s} {'chip-s/row':>10s}"
    ]
    ranked = sorted(rows, key=price)
    for row in ranked:
        time = f"{1e3 * row['step_secs']:9.1f} {row['mfu']:6.1%}" if "step_secs" in row else f"{'-':>9s} {'-':>6s}"
        cost = f"{price(row):10.4g}" if row["fits"] else "does not fit"
        lines.append(f"{row['topology']:12s} {row['strategy']:12s} {row['mesh']!s:>16s} "
                     f"{row['peak_bytes'] / report.GIB:9.2f} {time} {cost}   {sized(row)}".rstrip())  # fmt: skip
    best = ranked[0]
    if best["fits"]:
        size = f", {sized(best)}" if sized(best) else ""
        lines.append(f"cheapest that fits: {best['topology']}, {best['strategy']}, mesh {tuple(best['mesh'])}{size}")
    return "\n".join(lines)
