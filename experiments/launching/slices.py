"""A TPU slice before it is paid for: how fast cells train on it, and whether it can run them at all."""

import re

from experiments.launching.cells import Cell
from vlm_jax.core.errors import UserError, unknown
from vlm_jax.distributed import partitioning
from vlm_jax.sizing import chips

# Name in Google's accelerator types -> chip, how many of the type's count make one chip.
_KINDS = {"v4": ("v4", 2), "v5litepod": ("v5e", 1), "v5p": ("v5p", 2), "v6e": ("v6e", 1)}


def parse(accelerator: str) -> tuple[chips.Chip, int]:
    """`"v5p-16"` -> its chip, and 8 of them. Raises `UserError` for another name."""
    kind, _, count = accelerator.partition("-")
    if kind not in _KINDS:
        raise unknown("accelerator", accelerator, [f"{name}-16" for name in _KINDS])
    chip, cores = _KINDS[kind]
    if not re.fullmatch("[0-9]{1,6}", count) or int(count) < cores:
        raise UserError(f"--accelerator: expected a type with its size, such as {kind}-16, got {accelerator[:80]}")
    return chips.chip(chip), int(count) // cores


def check_batches(left: list[Cell], accelerator: str) -> None:
    """Raises `UserError` for a cell that training would refuse on that slice."""
    _, devices = parse(accelerator)  # JAX sees the two cores of a v4 or v5p as one device
    for cell in left:
        compute, data = cell.spec.compute, cell.spec.data
        try:
            plan = partitioning.outline(compute, "tpu", devices)
            partitioning.check_batch(plan, "data.batch_rows", data.batch_rows, compute.microbatches)
            partitioning.check_batch(plan, "evaluation.batch_examples", cell.spec.evaluation.batch_examples)
        except UserError as error:
            raise UserError(f"--accelerator {accelerator} ({devices} chips), cell {cell.name}: {error}") from error
