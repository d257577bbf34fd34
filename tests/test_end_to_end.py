"""End to end on a small scale: train, evaluate, predict, a grid of two cells, and errors of bad input.

Everything runs as a user runs it, on the tiny data sets; what is meant to fail, and the launcher, whose workers train,
run in this process, to save their start.
"""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from experiments import launch
from vlm_jax.cli import run_main
from vlm_jax.evaluation import results

pytestmark = pytest.mark.xdist_group("end to end")  # of one training
ROOT = Path(__file__).parents[1]
CONFIG = "configs/vlm.py:llm=d24,tokens=2,data=rows4_tiny"
TINY = ("--config.stages.0.total_steps=6", "--config.stages.0.warmup_steps=1")
TWO_SAVED = ("--config.save_every_steps=3", "--config.keep_checkpoints=2")
GRID = """
from vlm_jax.config.sweep import Grid, param, product

def get_grid(arg):
    cells = product(param("llm", "d24"), param("tokens", 1, 0), param("data", "rows4_tiny"), param("steps", 4))
    return Grid("{config}", cells)
"""


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


def settings(home: Path) -> dict[str, str]:
    """Of every process."""
    return {"VLM_JAX_CACHE": str(home / "cache"), "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def run(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=ROOT,
        env={**os.environ, **settings(home)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.fixture(scope="session")
def trained(home: Path) -> Path:
    workdir = home / "run"
    done = run(home, "vlm_jax.train", "--config", CONFIG, *TINY, *TWO_SAVED, "--workdir", str(workdir))
    assert done.returncode == 0, done.stderr
    return workdir


def test_train_leaves_a_summary_and_metrics(trained: Path) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["step"] == 6
    assert summary["train_flops"] > 0
    assert len(summary["params_sha256"]) == 64
    steps = [json.loads(line)["step"] for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == 6
    assert any((trained / "tensorboard").iterdir())


def test_training_again_changes_nothing(home: Path, trained: Path) -> None:
    before = (trained / "summary.json").read_text()
    done = run(
        home,
        "vlm_jax.train",
        "--config",
        "configs/vlm.py:llm=d24,tokens=2,data=rows4_tiny",
        *TINY,
        "--workdir",
        str(trained),
    )
    assert done.returncode == 0, done.stderr
    assert (trained / "summary.json").read_text() == before


def test_evaluate_writes_one_row(home: Path, trained: Path) -> None:
    for _ in range(2):
        done = run(home, "vlm_jax.evaluate", "--workdir", str(trained))
        assert done.returncode == 0, done.stderr
    (row,) = results.read(trained / "rows.jsonl")
    assert (row.family, row.llm, row.visual_tokens, row.images, row.questions) == ("ocr", "d24", 2, 32, 64)
    assert 0 <= row.error <= 1
    assert row.encoder_flops > row.prefill_flops > 0


def test_predict_answers(home: Path, trained: Path) -> None:
    image = home / "page.png"
    Image.fromarray(np.zeros((50, 70, 3), np.uint8)).save(image)
    done = run(home, "vlm_jax.predict", "--model", str(trained), "--image", str(image), "--prompt", "read row two")
    assert done.returncode == 0, done.stderr
    bad = run(home, "vlm_jax.predict", "--model", str(trained), "--image", str(image), "--prompt", "read row twoo")
    assert bad.returncode == 2
    assert "'two'" in bad.stderr


def test_a_grid_runs_once_and_survives_a_failing_cell(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grid, workdir = home / "grid.py", home / "study"
    grid.write_text(GRID.format(config=ROOT / "configs" / "vlm.py"))
    words = ["--grid", str(grid), "--workdir", str(workdir), "--workers", "2"]
    monkeypatch.chdir(ROOT)
    for name, value in settings(home).items():
        monkeypatch.setenv(name, value)
    assert launch.main([*words, "--dry-run"]) == 0
    assert "2 cells, 2 to do" in capsys.readouterr().out
    assert not workdir.exists()
    # A file where the second cell wants its folder for checkpoints: that cell fails, the other one does not.
    blocked = workdir / "cells" / "llm=d24,tokens=0,data=rows4_tiny,steps=4"
    blocked.mkdir(parents=True)
    (blocked / "checkpoints").write_text("in the way")
    assert launch.main(words) == 1
    assert "failed" in capsys.readouterr().out
    assert [row.visual_tokens for row in results.read(workdir / "rows.jsonl")] == [1]
    (blocked / "checkpoints").unlink()
    assert launch.main(words) == 0
    assert sorted(row.visual_tokens for row in results.read(workdir / "rows.jsonl")) == [0, 1]
    assert launch.main(words) == 0
    assert "0 to do" in capsys.readouterr().out
    assert len(results.read(workdir / "rows.jsonl")) == 2


def test_bad_input_is_one_line_and_exit_code_2(
    home: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, workdir, run_spec = "configs/vlm.py:llm=d24", str(home / "nothing"), (trained / "spec.json").read_text()
    tiny, half = f"{config},data=rows4_tiny", home / "half"
    half.mkdir()
    (half / "rows.jsonl").write_text('{"cell": "a", "spec_ha')
    (home / "text.png").write_text("text")
    shutil.copytree(trained, home / "lost")
    shutil.rmtree(home / "lost" / "checkpoints" / "6" / "progress")
    (home / "lost" / "rows.jsonl").unlink(missing_ok=True)
    (home / "owned").mkdir()
    (home / "broken.py").write_text("def get_config(arg):\n    return arg.nothing\n")
    cases = {
        ("vlm_jax.train", "--config", tiny, "--workdir", f"{home}/owned"): "owned: another process (it holds ",
        ("vlm_jax.train", "--config", f"{home}/broken.py", "--workdir", workdir): "broken.py:2: AttributeError",
        ("vlm_jax.train", "--config", tiny, "--config.seed=-1", "--workdir", workdir): "seed: expected at least 0",
        ("vlm_jax.train", "--config", tiny, "--config.compute.mesh.0=7", "--workdir", workdir): "mesh [7, 1, 1]",
        ("vlm_jax.train", "--config", "configs/vlm.py:llm=d25", "--workdir", workdir): "d24",
        ("vlm_jax.train", "--config", tiny, "--workdir", str(trained)): "another spec",
        ("vlm_jax.train", "--config", config, "--config.compute.mesh=(3,1,1)", "--workdir", workdir): "compute.mesh",
        ("vlm_jax.train", "--config", config, "--config.encoder_checkpoint=no.npz", "--workdir", workdir): "no.npz",
        ("vlm_jax.train", "--config", tiny, "--config.data.row_tokens=5", "--workdir", workdir): "expected room for",
        ("vlm_jax.train", "--config", tiny, "--config.compute.attention=cudnn", "--workdir", workdir): "NVIDIA",
        ("vlm_jax.train", "--workdir", workdir): "--config",
        ("vlm_jax.evaluate", "--workdir", workdir): "spec.json",
        ("vlm_jax.evaluate", "--workdir", str(trained), "--rows", f"{home}/text.png/r"): "r: cannot write rows here",
        ("vlm_jax.evaluate", "--workdir", f"{home}/lost"): "checkpoint of step 6, the latest intact one is of step 3",
        ("vlm_jax.predict", "--model", str(trained), "--image", f"{home}/text.png", "--prompt", "x"): "text.png",
        ("experiments.launch", "--grid", "configs/grids/demo.py", "--workdir", str(half), "--dry-run"): "rows.jsonl:1",
        ("experiments.report", "--workdir", workdir): "rows.jsonl",
    }  # fmt: skip
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("VLM_JAX_CACHE", str(home / "cache"))
    for (module, *argv), expected in cases.items():
        monkeypatch.setattr(sys, "argv", [module, *argv])
        with pytest.raises(SystemExit) as stopped, FileLock(home / "owned" / "run.lock"):
            run_main(importlib.import_module(module).main)
        shown, errors = capsys.readouterr()
        assert "compiling" not in shown
        assert stopped.value.code == 2, (argv, errors)
        assert expected in errors
        assert len(errors.strip().splitlines()) == 1, errors
    assert (half / "rows.jsonl").read_text() == '{"cell": "a", "spec_ha'
    assert not Path(workdir).exists()
    assert not (home / "lost" / "rows.jsonl").exists()
    assert (trained / "spec.json").read_text() == run_spec
