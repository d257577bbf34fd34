"""Division of a machine between workers, and workers that die."""

import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from experiments.launching import local, states
from experiments.launching.cells import Cell
from experiments.launching.local import Devices
from vlm_jax.core.errors import UserError


def dev(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_gpus_are_divided_between_the_workers(tmp_path: Path) -> None:
    four = dev(tmp_path / "four", "nvidia0", "nvidia1", "nvidia2", "nvidia3", "nvidiactl", "nvidia-uvm")
    here = local.devices({}, four)
    assert here.gpus == ("0", "1", "2", "3")
    shares = lambda n, h=here: [local.share_of(i, n, h)[0]["CUDA_VISIBLE_DEVICES"] for i in range(n)]  # noqa: E731
    assert shares(4) == ["0", "1", "2", "3"]
    assert shares(2) == ["0,2", "1,3"]
    assert shares(6) == ["0", "1", "2", "3", "0", "1"]
    assert "XLA_PYTHON_CLIENT_PREALLOCATE" not in local.share_of(0, 4, here)[0]
    assert local.share_of(5, 6, here)[0]["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    assert local.devices({"CUDA_VISIBLE_DEVICES": "3,1"}, four).gpus == ("3", "1")
    assert local.devices({"CUDA_VISIBLE_DEVICES": ""}, four).gpus == ()
    assert local.devices({"JAX_PLATFORMS": "cpu"}, four).gpus == ()


def test_a_tpu_host_has_one_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cells: list[Cell]) -> None:
    here = local.devices({}, dev(tmp_path / "dev", "accel0", "accel1"))
    assert here.tpu
    assert local.devices({}, dev(tmp_path / "vfio", "vfio/0")).tpu
    assert not local.devices({"JAX_PLATFORMS": "cpu"}, tmp_path / "dev").tpu
    monkeypatch.setattr(local, "devices", lambda: here)
    assert local.default_workers() == 1
    with pytest.raises(UserError, match="--workers: expected 1 on a TPU host, got 2"):
        local.run(cells, "grid.py", tmp_path, 2, Console(file=io.StringIO()))


def test_cores_are_divided_between_the_workers(program: Callable[..., Path]) -> None:
    """Where there is a taskset to do it."""
    here = Devices((), False, (0, 1, 2, 3))
    assert [local.share_of(i, 2, here)[1] for i in range(2)] == [[], []]
    program("taskset")
    assert [local.share_of(i, 2, here)[1] for i in range(2)] == [["taskset", "-c", "0,2"], ["taskset", "-c", "1,3"]]
    assert "xla_backend_optimization_level" in local.share_of(0, 2, here)[0]["XLA_FLAGS"]


def test_a_worker_that_dies_at_a_cell_is_replaced_and_the_cell_blamed(
    grid: str, cells: list[Cell], workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its replacement ends at once: nothing is left that it could do."""
    die = """
import os, pathlib, sys
from experiments.launching import cells, states
cell = cells.cells_of(sys.argv[5], pathlib.Path(sys.argv[7]))[1]
if not states.error_of(cell):
    (cell.folder / "log.txt").write_text("out of memory")
    states.reporter(cell)("training", 0.5)
    os.kill(os.getpid(), 9)
"""
    monkeypatch.setattr(local, "devices", lambda: Devices((), False, (0,)))
    monkeypatch.setattr(local, "share_of", lambda index, workers, here: ({}, [sys.executable, "-c", die]))
    said = io.StringIO()
    local.run(cells, grid, workdir, 1, Console(file=said, width=200))
    assert states.error_of(cells[1]) == ["out of memory", "its process ended with -9"]
    assert states.state_of(cells[1]).kind == "failed"
    assert f"failed {cells[1].name}" in said.getvalue()
