"""An interrupted run equals the uninterrupted one, bit for bit, through the composition root and real files."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from tests import builders
from vlm_jax import build, job
from vlm_jax.config.arguments import load_config
from vlm_jax.config.resolve import resolve
from vlm_jax.core import tree
from vlm_jax.core.specs import EncoderSpec, RunSpec
from vlm_jax.models.importers import big_vision
from vlm_jax.models.vlm import Vlm

# Two stages of three and four steps, the connector's first; every step is saved but the last of a stage.
OVERRIDES = {
    "data.config": "rows4_tiny",
    "stages.0.total_steps": "3",
    "stages.0.warmup_steps": "1",
    "stages.1.total_steps": "4",
    "stages.1.warmup_steps": "0",  # so that its first step moves
    "log_every_steps": "2",
    "save_every_steps": "1",
    "keep_checkpoints": "10",
}


def tiny_spec() -> RunSpec:
    """The study's recipe on a data set of 64 images, with a small encoder."""
    spec = resolve(load_config("configs/vlm.py:llm=d24,tokens=4,compressor=pool,stages=2", OVERRIDES))
    encoder = EncoderSpec("tiny", image_size=64, patch_size=16, width=16, depth=1, heads=2, mlp_width=16)
    compressor = dataclasses.replace(spec.model.compressor, grid=encoder.grid, encoder_width=16)
    return dataclasses.replace(spec, model=dataclasses.replace(spec.model, encoder=encoder, compressor=compressor))


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """A bit-for-bit comparison needs the same program twice, not a fast one."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> build.Run:
    folder, spec = tmp_path_factory.mktemp("cache"), tiny_spec()
    encoder = builders.params(Vlm(spec.model, spec.compute))["encoder"]
    big_vision.save_encoder(folder / "encoder.npz", encoder, spec.model.encoder)
    return build.open_run(dataclasses.replace(spec, encoder_checkpoint=str(folder / "encoder.npz")), folder)


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """The workdir of a run that nobody disturbed, with the checkpoints of all its steps."""
    workdir = tmp_path_factory.mktemp("whole")
    job.train(run, workdir, lambda log, values: None)
    return workdir


def summary(workdir) -> dict:
    return json.loads((workdir / "summary.json").read_text())


def cut(whole, workdir, step: int):
    """What is left of the run if it dies right after the checkpoint of that step."""
    shutil.copytree(whole, workdir, ignore=shutil.ignore_patterns("summary.json"))
    for folder in (workdir / "checkpoints").iterdir():
        if folder.name.isdigit() and int(folder.name) > step:
            shutil.rmtree(folder)
    return workdir


def test_a_run_writes_what_it_promises(run, whole) -> None:
    """Logs count over both stages, and each stage's last step has one; the summary's fingerprint is the parameters'."""
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3, 4, 6, 7]
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert sorted(int(p.name) for p in (whole / "checkpoints").iterdir()) == [1, 2, 4, 5, 6, 7]
    end = job.restore(run.network, whole)
    assert summary(whole)["params_sha256"] == tree.sha256(jax.device_get(end))
    assert summary(whole)["step"] == 7
    assert set(end) == {"connector", "decoder"}


def test_the_first_stage_moves_the_connector_alone(run, whole, tmp_path) -> None:
    """Between steps 1 and 2 the decoder stands still bit for bit; in the second stage it moves."""
    params = [job.restore(run.network, cut(whole, tmp_path / str(step), step)) for step in (1, 2, 4, 5)]
    prints = {part: [tree.sha256(jax.device_get(p[part])) for p in params] for part in ("connector", "decoder")}
    assert len(set(prints["connector"])) == 4
    assert prints["decoder"][0] == prints["decoder"][1]
    assert len(set(prints["decoder"])) == 3


@pytest.mark.parametrize(
    ("step", "logs"), [(2, [3, 4, 6, 7]), (5, [6, 7])], ids=["across_the_stages", "within_a_stage"]
)
def test_resumed_equals_uninterrupted(run, whole, tmp_path, step: int, logs: list[int]) -> None:
    workdir = cut(whole, tmp_path / "cut", step)
    heard = []
    job.train(run, workdir, lambda log, values: heard.append(log.step))
    assert heard == logs
    assert summary(workdir)["params_sha256"] == summary(whole)["params_sha256"]
    assert summary(workdir)["loss"] == summary(whole)["loss"]


def test_a_run_that_is_done_is_not_trained_again(run, whole) -> None:
    before = summary(whole)
    params = job.train(run, whole, lambda log, values: pytest.fail("a step was taken"))
    assert tree.sha256(jax.device_get(params)) == before["params_sha256"]
    assert summary(whole) == before


def test_a_run_that_fails_can_go_on(run, whole, tmp_path) -> None:
    """An error in the caller's `on_log` surfaces and leaves no file open; the next start completes what is missing.

    Here it strikes at the very last log: the last checkpoint may be there, the summary is not.
    """
    workdir = cut(whole, tmp_path / "cut", 6)

    def fails(log, values):
        raise RuntimeError("the terminal is gone")

    with pytest.raises(RuntimeError, match="the terminal is gone"):
        job.train(run, workdir, fails)
    assert not (workdir / "summary.json").exists()
    job.train(run, workdir, lambda log, values: None)
    assert summary(workdir)["params_sha256"] == summary(whole)["params_sha256"]
