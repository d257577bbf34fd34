"""Properties of a TPU slice, from its name."""

import dataclasses
from pathlib import Path

import pytest

from experiments import launch
from experiments.launching import slices
from experiments.launching.cells import Cell
from vlm_jax.core.errors import UserError


def test_accelerators() -> None:
    """v4 and v5p count two cores a chip, v5e and v6e chips: cloud.google.com/tpu/docs, each version's page."""
    known = {"v4-8": ("v4", 4), "v5p-16": ("v5p", 8), "v5litepod-16": ("v5e", 16), "v6e-256": ("v6e", 256)}
    assert {name: (slices.parse(name)[0].name, slices.parse(name)[1]) for name in known} == known
    with pytest.raises(UserError, match="v6e-16"):
        slices.parse("v6-16")
    with pytest.raises(UserError, match="size"):
        slices.parse("v6e")


@pytest.mark.parametrize(
    ("strategy", "mesh", "microbatches", "accelerator", "said"),
    [
        ("replicated", (-1, 1, 1), 1, "v6e-16", None),
        ("replicated", (-1, 1, 1), 4, "v6e-16", "= 64 parts: use 64"),
        ("replicated", (-1, 1, 1), 1, "v5p-1024", "= 512 parts: use 512"),
        ("fsdp_tensor", (1, -1, 16), 1, "v5p-512", None),  # 16 groups
        ("auto", (-1, 1, 1), 1, "v5p-1024", "= 512 parts: use 512"),
        ("replicated", (4, 1, 1), 1, "v6e-16", "does not divide 16 device"),
    ],
)
def test_a_batch_that_a_slice_does_not_divide_is_refused(
    cells: list[Cell], strategy: str, mesh: tuple, microbatches: int, accelerator: str, said: str | None
) -> None:
    assert (cells[0].spec.data.batch_rows, cells[0].spec.evaluation.batch_examples) == (16, 256)
    compute = dataclasses.replace(cells[0].spec.compute, strategy=strategy, mesh=mesh, microbatches=microbatches)
    cell = cells[0]._replace(spec=dataclasses.replace(cells[0].spec, compute=compute))
    if said is None:
        slices.check_batches([cell], accelerator)
        return
    with pytest.raises(UserError, match=f"--accelerator {accelerator} .*{cell.name}: .*{said}"):
        slices.check_batches([cell], accelerator)


def test_a_dry_run_predicts_minutes_and_checks_batches(
    grid: str, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--grid", grid, "--workdir", str(workdir), "--dry-run", "--accelerator"]
    assert launch.main([*words, "v6e-16"]) == 0
    assert "60% of the peak of 16 x v6e, an assumption" in capsys.readouterr().out
    with pytest.raises(UserError, match="--accelerator v5p-1024"):
        launch.main([*words, "v5p-1024"])
