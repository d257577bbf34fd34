"""Tasks for SkyPilot: what they say, that its own parser takes them where it is installed, and who starts them."""

import dataclasses
import io
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from experiments.launching import states, tpu
from experiments.launching.cells import Cell, write_row
from tests.launching.conftest import ROOT, row
from vlm_jax.core.errors import UserError

WISHES = tpu.Wishes("v6e-16", "gs://bucket/studies/one", None, "spot", 2)
GRID = str(ROOT / "configs" / "grids" / "demo.py")


def test_accelerators() -> None:
    """v4 and v5p count two cores a chip, v5e and v6e chips: cloud.google.com/tpu/docs, each version's page."""
    known = {"v4-8": ("v4", 4), "v5p-16": ("v5p", 8), "v5litepod-16": ("v5e", 16), "tpu-v6e-256": ("v6e", 256)}
    assert {name: (tpu.parts(name)[0].name, tpu.parts(name)[1]) for name in known} == known
    with pytest.raises(UserError, match="v6e-16"):
        tpu.parts("v6-16")
    with pytest.raises(UserError, match="size"):
        tpu.parts("v6e")


def test_slices_share_the_work(cells: list[Cell]) -> None:
    dealt = tpu.shares(cells, 2)
    assert sorted(cell.index for share in dealt for cell in share) == [0, 1, 2]
    assert [cell.index for cell in dealt[0]] == [2]  # the dearest alone
    assert len(tpu.shares(cells, 9)) == 3


def test_a_task_runs_its_cells_on_every_host(cells: list[Cell]) -> None:
    task = tpu.task([cells[2], cells[0]], 1, GRID, WISHES)
    assert task["run"].split() == [
        ".venv/bin/python", "-m", "experiments.launch", "--grid", "configs/grids/demo.py", "--workdir",
        "/bucket/studies/one", "--index", "2,0", "--processes", "auto",
    ]  # fmt: skip
    assert task["resources"]["accelerators"] == "tpu-v6e-16"
    assert task["resources"]["use_spot"] is True
    assert task["file_mounts"]["/bucket"]["source"] == "gs://bucket"
    assert Path(task["workdir"], task["setup"].split()[1]).exists()
    on_demand = tpu.task(cells, 0, GRID, WISHES._replace(spot="on-demand", zone="us-east5-b"))["resources"]
    assert (on_demand["use_spot"], on_demand["infra"]) == (False, "gcp/*/us-east5-b")
    for bucket in ("", "bucket/one", "gs://bucket", "gs://bucket/"):
        with pytest.raises(UserError, match="gs://NAME/study"):
            tpu.task(cells, 0, GRID, WISHES._replace(bucket=bucket))
    with pytest.raises(UserError, match="has to lie in"):
        tpu.task(cells, 0, "/elsewhere/grid.py", WISHES)


@pytest.mark.parametrize(
    ("strategy", "mesh", "microbatches", "accelerator", "said"),
    [
        ("replicated", (-1, 1, 1), 1, "v6e-16", None),
        ("replicated", (-1, 1, 1), 4, "v6e-16", "= 64 parts: use 64"),
        ("replicated", (-1, 1, 1), 1, "v5p-1024", "= 512 parts: use 512"),
        ("fsdp_tensor", (1, -1, 16), 1, "v5p-1024", None),  # 32 groups
        ("auto", (-1, 1, 1), 1, "v5p-1024", "= 512 parts: use 512"),
        ("replicated", (4, 1, 1), 1, "v6e-16", "does not divide 16 device"),
    ],
)
def test_a_batch_that_a_slice_does_not_divide_is_refused_before_it_is_paid_for(
    cells: list[Cell], strategy: str, mesh: tuple, microbatches: int, accelerator: str, said: str | None
) -> None:
    assert (cells[0].spec.data.batch_examples, cells[0].spec.evaluation.batch_examples) == (32, 256)
    compute = dataclasses.replace(cells[0].spec.compute, strategy=strategy, mesh=mesh, microbatches=microbatches)
    cell = cells[0]._replace(spec=dataclasses.replace(cells[0].spec, compute=compute))
    if said is None:
        assert tpu.tasks_of([cell], GRID, WISHES._replace(accelerator=accelerator))
        return
    with pytest.raises(UserError, match=f"--accelerator {accelerator} .*{cell.name}: .*{said}"):
        tpu.tasks_of([cell], GRID, WISHES._replace(accelerator=accelerator))


@pytest.mark.parametrize("accelerator", ["v4-16", "v5litepod-16", "v5p-16", "v6e-16"])
def test_skypilots_own_parser_takes_the_task(cells: list[Cell], accelerator: str) -> None:
    sky = pytest.importorskip("sky")
    task = tpu.task(cells, 0, GRID, WISHES._replace(accelerator=accelerator))
    (resources,) = sky.Task.from_yaml_config(task).resources
    assert resources.use_spot
    assert dict(resources.accelerators) == {f"tpu-{accelerator}": 1}


class FakeSky(types.SimpleNamespace):
    """SkyPilot as far as the backend uses it: jobs end the second time that one asks."""

    def __init__(self, live: list[str]):
        launched: list[Any] = []
        asked = [[dict(job_name=name) for name in live], [], []]
        jobs = types.SimpleNamespace(
            launch=lambda task, name: launched.append((name, task)),
            queue_v2=lambda refresh, skip_finished: (asked.pop(0), 0, {}, 0),
        )
        super().__init__(
            jobs=jobs, launched=launched, get=lambda answer: answer, stream_and_get=lambda request: None,
            Task=types.SimpleNamespace(from_yaml_config=lambda config: config),
            exceptions=types.SimpleNamespace(ClusterNotUpError=KeyError),
        )  # fmt: skip


def test_jobs_are_started_followed_and_their_rows_fetched(
    cells: list[Cell], workdir: Path, program: Callable[..., Path]
) -> None:
    sky = FakeSky([])
    for cell in cells:
        write_row(cell, row(cell))
    bucket = workdir.parent / "bucket"
    (workdir / "cells").rename(bucket)
    gcloud = program("gcloud", f'cp -r {bucket}/* "${{@: -1}}"')
    tasks = tpu.tasks_of(cells, GRID, WISHES)
    tpu.run(cells, tasks, workdir, WISHES, sky, Console(file=io.StringIO()))
    assert [name for name, _ in sky.launched] == [f"{tpu.prefix(WISHES)}-{i}" for i in (0, 1)]
    assert f"gs://bucket/studies/one/cells {workdir}/cells" in gcloud.read_text()
    assert len((workdir / "rows.jsonl").read_text().splitlines()) == 3


def test_jobs_of_the_same_folder_are_not_started_twice(cells: list[Cell], workdir: Path) -> None:
    sky = FakeSky([f"{tpu.prefix(WISHES)}-0", "another"])
    with pytest.raises(UserError, match=f"{tpu.prefix(WISHES)}-0 are at work"):
        tpu.run(cells, tpu.tasks_of(cells, GRID, WISHES), workdir, WISHES, sky, Console(file=io.StringIO()))
    assert sky.launched == []


def test_what_is_missing_on_the_machine_is_said(
    cells: list[Cell], workdir: Path, program: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    program("gcloud", "echo ERROR: no such bucket >&2; exit 1")
    with pytest.raises(UserError, match="no such bucket"):
        tpu.fetch(WISHES.bucket, workdir)
    monkeypatch.setitem(sys.modules, "sky", None)
    with pytest.raises(UserError, match=r"vlm_jax\[tpu-launch\]"):
        tpu.load_sky()
    said = io.StringIO()
    tpu.show([tpu.task(cells, 0, GRID, WISHES)], Console(file=said, width=200))
    assert "use_spot: true" in said.getvalue()
    assert "not checked by SkyPilot" in said.getvalue()
    assert "vlm_jax[tpu-launch]" in said.getvalue()
    monkeypatch.setattr(tpu.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="needs gcloud"):
        tpu.fetch(WISHES.bucket, workdir)
    assert states.state_of(cells[0]).kind == "waiting"
