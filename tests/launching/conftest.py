"""Three cells of a grid, none of which is ever trained here, and rows made up for them."""

import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from result_rows import MODEL

from experiments.launching.cells import Cell, cells_of
from vlm_jax.core.rows import ResultRow

ROOT = Path(__file__).parents[2]
GRID = f"""
from vlm_jax.config.sweep import Grid, param, product

def get_grid(arg):
    cells = product(param("llm", "d24", "d48", "d96"), param("data", "rows4_tiny"), param("steps", 4))
    return Grid("{ROOT / "configs" / "vlm.py"}", cells)
"""


@pytest.fixture
def grid(tmp_path: Path) -> str:
    path = tmp_path / "grid.py"
    path.write_text(GRID)
    return str(path)


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    path = tmp_path / "work"
    path.mkdir()
    return path


@pytest.fixture
def cells(grid: str, workdir: Path) -> list[Cell]:
    cells = cells_of(grid, workdir)
    for cell in cells:
        cell.folder.mkdir(parents=True)
    return cells


def row(cell: Cell, train_flops: float = 3e12, train_secs: float = 60.0, device: str = "cpu") -> ResultRow:
    """A row as if the cell had been trained."""
    names = dict(encoder=MODEL.encoder.name, llm=MODEL.decoder.name, compressor=MODEL.compressor.name)
    texts = dict(family="ocr", task="t", encoder_sha256="", params_sha256="", **names)
    counts = dict.fromkeys(
        ("llm_params", "llm_params_total", "visual_tokens", "images", "questions", "train_steps", "seed"), 1
    )
    numbers = dict.fromkeys(
        (
            "question_tokens", "answer_tokens", "error", "stderr", "exact_error", "exact_stderr", "forced_error",
            "forced_stderr", "forced_nll", "encoder_flops", "compressor_flops", "question_flops", "prefill_flops",
            "decode_flops",
        ), 0.25,
    )  # fmt: skip
    return ResultRow(
        cell=cell.name, spec_hash=cell.spec_hash, version="0", device=device, train_flops=train_flops,
        train_secs=train_secs, model=MODEL, **texts, **counts, **numbers,
    )  # fmt: skip


# What the scripts under test and the fakes call, beside what bash has built in.
SHELL = ["bash", "cat", "cp", "date", "env", "head", "mkdir", "mktemp", "mv", "rm", "sed", "sleep", "touch", "wc"]


@pytest.fixture(autouse=True)
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on the PATH: the tools of a shell and what `program` puts there, and nothing of the host."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in SHELL:
        (folder / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(folder))
    return folder


@pytest.fixture
def program(path: Path, tmp_path: Path) -> Callable[[str, str], Path]:
    """`program("gcloud", body)` puts a shell script of that name on the PATH; its calls go to the returned file, one a
    line."""

    def make(name: str, body: str = "") -> Path:
        calls = tmp_path / f"{name}.calls"
        script = path / name
        script.write_text(f"#!/usr/bin/env bash\necho \"${{*//$'\\n'/ }}\" >>{calls}\n{body}\n")
        script.chmod(script.stat().st_mode | stat.S_IEXEC)
        return calls

    return make
