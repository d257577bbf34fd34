"""An interrupted run equals the uninterrupted one, bit for bit, through the composition root and real files."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from tests import builders
from vlm_jax import build, job
from vlm_jax.build import fitting
from vlm_jax.checkpoints import big_vision
from vlm_jax.config.arguments import load_config
from vlm_jax.config.resolve import resolve
from vlm_jax.core import tree
from vlm_jax.core.errors import RunStopped
from vlm_jax.core.specs import BadStepSpec, EncoderSpec, RunSpec, StageSpec
from vlm_jax.core.structs import Visual
from vlm_jax.data import pipeline
from vlm_jax.models.vlm import Vlm

pytestmark = pytest.mark.xdist_group("resume")  # of one training
# Two stages of three and four steps, the connector's first; every step is saved but the last of a stage.
OVERRIDES = {
    "stages.0.total_steps": "3",
    "stages.0.warmup_steps": "1",
    "stages.1.total_steps": "4",
    "stages.1.warmup_steps": "0",  # so that its first step moves
    "log_every_steps": "2",
    "save_every_steps": "1",
    "keep_checkpoints": "10",
}


def tiny_spec() -> RunSpec:
    """A mixture of two sources of 64 images, packed into rows of which an epoch has fewer than the run; and a small
    encoder.
    """
    spec = resolve(load_config("configs/vlm.py:llm=d24,tokens=4,compressor=pool,stages=2,data=rows4_tiny", OVERRIDES))
    (ocr,) = spec.data.train
    facts = dataclasses.replace(ocr, path="facts", config="facts_tiny", name="facts", weight=0.5)
    data = dict(train=(ocr, facts), pack="fit", row_tokens=64, questions_per_example=2, row_images=3)
    spec = dataclasses.replace(spec, data=dataclasses.replace(spec.data, **data))
    encoder = EncoderSpec("tiny", image_size=64, patch_size=16, width=16, depth=1, heads=2, mlp_width=16)
    compressor = dataclasses.replace(spec.model.compressor, grid=encoder.grid, encoder_width=16)
    return dataclasses.replace(spec, model=dataclasses.replace(spec.model, encoder=encoder, compressor=compressor))


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Every run of a spec takes the steps that the first one compiled: what differs is where it starts."""
    made, make = {}, build.train_step

    def train_step(network: build.Network, stage: StageSpec) -> build.TrainStep:
        key = (dataclasses.replace(network.spec, save_every_steps=0, evaluate_every_steps=0), stage)
        return made[key] if key in made else made.setdefault(key, make(network, stage))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "train_step", train_step)
        yield


def open_tiny(folder: Path) -> build.Run:
    """The run, with its data, features and encoder in `folder`."""
    return build.open_run(dataclasses.replace(tiny_spec(), encoder_checkpoint=str(folder / "encoder.npz")), folder)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    folder, spec = tmp_path_factory.mktemp("cache"), tiny_spec()
    encoder = builders.params(Vlm(spec.model, spec.compute))["encoder"]
    big_vision.save_encoder(folder / "encoder.npz", encoder, spec.model.encoder)
    return folder


@pytest.fixture(scope="module")
def run(cache: Path) -> build.Run:
    return open_tiny(cache)


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """The workdir of a run that nobody disturbed, with the checkpoints of all its steps."""
    workdir = tmp_path_factory.mktemp("whole")
    job.train(run, workdir, lambda log, values: None)
    return workdir


def summary(workdir) -> dict:
    return json.loads((workdir / "summary.json").read_text())


def logged(workdir) -> list[dict]:
    """The lines of metrics.jsonl, without the speeds."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "sec" not in k} for line in lines]


def cut(whole, workdir, step: int):
    """What is left of the run if it dies right after the checkpoint of that step."""
    shutil.copytree(whole, workdir, ignore=shutil.ignore_patterns("summary.json"))
    for folder in (workdir / "checkpoints").iterdir():
        if folder.name.isdigit() and int(folder.name) > step:
            shutil.rmtree(folder)
    return workdir


def test_the_run_passes_the_end_of_an_epoch(run) -> None:
    for batches in run.train:
        rows = batches.epoch(0)
        assert len(rows) < 4 * 32
        assert rows.examples == 64 + 32
        assert len(rows) < rows.examples  # several examples share a row
    assert len(run.train[0].data.mixture.parts) == 2


def test_a_run_writes_what_it_promises(run, whole) -> None:
    """Logs count over both stages, and each stage's last step has one; the summary's fingerprint is the parameters'."""
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3, 4, 6, 7]
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert all({"loss/ocr", "loss/facts", "accuracy"} <= set(line) for line in lines)
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
    assert logged(workdir) == logged(whole)


def test_evaluations_in_training_make_one_curve_across_an_interruption(run, tmp_path) -> None:
    """Every two steps and at a stage's last, once each, with the same numbers; their time is not that of the steps."""
    network = run.network._replace(spec=dataclasses.replace(run.network.spec, evaluate_every_steps=2))
    evaluated = run._replace(network=network)
    job.train(evaluated, tmp_path / "whole", lambda log, values: None)
    with pytest.raises(RunStopped):
        job.train(evaluated, tmp_path / "cut", lambda log, values: None, stop=lambda step: step == 4)
    job.train(evaluated, tmp_path / "cut", lambda log, values: None)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "evaluation_error" in line] == [2, 3, 4, 6, 7]
    assert all(line["step_secs"] > 0 for line in lines if "step_secs" in line)
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")
    assert summary(tmp_path / "whole")["evaluation_error"] == lines[-1]["evaluation_error"]


def killed_at_log(step: int, cache: Path, workdir: Path) -> None:
    """What a process of its own does: trains, and gets kill -9 while that step is logged and later ones are saved."""

    def on_log(log, values) -> None:
        if log.step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    job.train(open_tiny(cache), workdir, on_log)


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(run, whole, cache, tmp_path) -> None:
    """Whatever the kill left half-written; here the process is killed in the second stage, with a save under way."""
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }  # fmt: skip
    words = [sys.executable, "-m", "tests.training.test_resume", "4", cache, tmp_path / "killed"]
    assert subprocess.run(words, env=environment, check=False, timeout=300).returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "summary.json").exists()
    assert any((tmp_path / "killed" / "checkpoints").iterdir())
    job.train(run, tmp_path / "killed", lambda log, values: None)
    assert summary(tmp_path / "killed")["params_sha256"] == summary(whole)["params_sha256"]
    assert logged(tmp_path / "killed") == logged(whole)


def test_a_run_that_is_done_is_not_trained_again(run, whole) -> None:
    before = summary(whole)
    params = job.train(run, whole, lambda log, values: pytest.fail("a step was taken"))
    assert tree.sha256(jax.device_get(params)) == before["params_sha256"]
    assert summary(whole) == before


def test_only_the_stages_that_are_left_must_fit(run, whole, tmp_path, monkeypatch) -> None:
    asked = []

    def fitted(network: build.Network, limit: float | None, stages: list[StageSpec]) -> tuple[build.Network, None]:
        asked.append(tuple(stages))
        return network, None

    monkeypatch.setattr(fitting, "fitted", fitted)
    job.train(run, whole, lambda log, values: None)
    assert asked == []
    cut(whole, tmp_path / "cut", 5)
    job.train(run, tmp_path / "cut", lambda log, values: None)
    assert asked == [run.network.spec.stages[1:]]


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


def test_a_run_that_is_stopped_saves_and_goes_on(run, whole, tmp_path) -> None:
    """Where no checkpoint is due, at the end of the first stage."""
    workdir = tmp_path / "stopped"
    rare = run._replace(network=run.network._replace(spec=dataclasses.replace(run.network.spec, save_every_steps=0)))
    with pytest.raises(RunStopped, match="saved step 3 of 7; the same command resumes") as ended:
        job.train(rare, workdir, lambda log, values: None, stop=lambda step: step == 3)
    assert ended.value.code == 143
    assert not (workdir / "summary.json").exists()
    job.train(rare, workdir, lambda log, values: None)
    assert sorted(int(p.name) for p in (workdir / "checkpoints").iterdir()) == [3, 7]
    assert logged(workdir) == logged(whole)
    assert summary(workdir)["params_sha256"] == summary(whole)["params_sha256"]


def test_a_damaged_checkpoint_is_named_and_skipped(run, whole, tmp_path) -> None:
    workdir, notices = cut(whole, tmp_path / "cut", 5), []
    (data, *_) = (workdir / "checkpoints" / "5" / "state" / "d").iterdir()
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 4
    data.write_bytes(content)
    job.train(run, workdir, lambda log, values: None, on_notice=notices.append, on_start=lambda: notices.append("go"))
    (notice, start) = notices
    assert start == "go"
    assert f"checkpoint 5 is damaged (state/d/{data.name} has changed since it was written)" in notice
    assert "resuming from step 4" in notice
    assert (workdir / "damaged" / "5").is_dir()
    assert summary(workdir)["params_sha256"] == summary(whole)["params_sha256"]


def poisoned(run: build.Run, **fields: object) -> tuple[build.Run, str, list[int]]:
    """A run of the second stage alone, with features that are not numbers for one image; the id of its item, and its
    steps.
    """
    spec, (_, batches) = dataclasses.replace(run.network.spec, stages=run.network.spec.stages[1:], **fields), run.train
    mixture = batches.data.mixture
    items = {
        step: {mixture.locate(n) for plan in batches.rows(step - 1) for n in plan.conversation} for step in range(1, 5)
    }
    items = {step: {(part, mixture.parts[part].item[i]) for part, i in there} for step, there in items.items()}
    part, item = min(items[2] - items[1])
    dataset, read = mixture.parts[part], batches.data.features[part]
    index = int(np.flatnonzero(dataset.item == item)[0])

    def features(numbers: np.ndarray) -> Visual:
        visual, poison = read(numbers), (numbers == dataset.first_image[index])[:, None, None]
        return visual._replace(tokens=np.where(poison, np.float16(np.nan), visual.tokens))

    replaced = tuple(features if number == part else f for number, f in enumerate(batches.data.features))
    data = batches.data._replace(features=replaced)
    bad = run._replace(
        network=run.network._replace(spec=spec), train=(pipeline.Batches(data, batches.seed, batches.slots),)
    )
    return bad, dataset.id_of(index), [step for step, there in items.items() if (part, item) in there]


def test_a_bad_step_stops_the_run(run, tmp_path) -> None:
    """With the ids of its batch and the state; no checkpoint holds what it spoilt."""
    bad, name, hit = poisoned(run)
    with pytest.raises(RunStopped, match=f"step {hit[0]}: loss nan, gradient norm nan") as ended:
        job.train(bad, tmp_path, lambda log, values: None)
    assert ended.value.code == 4
    report = json.loads((tmp_path / "bad_step" / "report.json").read_text())
    assert report["step"] == hit[0]
    assert name in report["examples"]
    assert (tmp_path / "bad_step" / "state").is_dir()
    assert all(int(path.name) < hit[0] for path in (tmp_path / "checkpoints").iterdir())


def test_a_bad_step_is_left_out(run, tmp_path) -> None:
    """Counted, with the ids of its batch, and the run reaches its end with finite numbers."""
    bad, name, hit = poisoned(run, bad_step=BadStepSpec("skip_update", 0.0, 4))
    params = job.train(bad, tmp_path, lambda log, values: None)
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == hit
    assert all(name in line["examples"] for line in lines)
    assert logged(tmp_path)[-1]["skipped"] == len(hit)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(params)))


if __name__ == "__main__":
    killed_at_log(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
