"""`build.open_run`: stages with their data and steps, and sources of a user's own, on the tiny model of test_resume."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import vlm_jax
from tests.data.mixtures import png
from tests.training.test_resume import cache as cache  # a fixture
from tests.training.test_resume import tiny_spec
from vlm_jax import build, job
from vlm_jax.build import fitting
from vlm_jax.checkpoints.orbax import read_spec
from vlm_jax.compress import catalog
from vlm_jax.compress.contract import encoder_for
from vlm_jax.config.resolve import spec_from_dict
from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import RunSpec, SourceSpec, StageDataSpec, spec_hash, total_steps
from vlm_jax.data import pipeline
from vlm_jax.data.examples import Example, Source, Turn


class Pages(Source):
    """Sixteen questions, with an image each; of "broken" images every fourth is a truncated file."""

    def __init__(self, path: str):
        self.kind = path

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Example:
        question = "read row one" if self.kind == "text" else "<image>read row one"
        question += " red" * (100 if self.kind == "long" else 0)
        encoded = png(index, 64)[: 200 if self.kind == "broken" and index % 4 == 0 else None]
        images = () if self.kind == "text" else (encoded,)
        return Example(str(index), images, (Turn("user", question), Turn("assistant", "4 7")))


def pages(kind: str, **fields: Any) -> SourceSpec:
    return SourceSpec("tests.test_open_run:Pages", path=kind, name=kind, **fields)


def spec(cache: Path, stages: list[dict] | None = None, **data: Any) -> RunSpec:
    whole = tiny_spec()
    if stages is not None:
        pairs = zip(whole.stages, stages, strict=False)
        whole = dataclasses.replace(whole, stages=tuple(dataclasses.replace(s, **fields) for s, fields in pairs))
    return dataclasses.replace(
        whole, data=dataclasses.replace(whole.data, **data), encoder_checkpoint=str(cache / "encoder.npz")
    )


def test_steps_from_epochs_and_examples(cache: Path) -> None:
    """One epoch and a half has its rows one and a half times; so many examples have their share of an epoch's rows."""
    asked = spec(
        cache,
        [
            {"total_steps": 0, "epochs": 1.5, "warmup_steps": 0, "warmup_share": 0.3},
            {"total_steps": 0, "examples": 50, "warmup_steps": 0, "warmup_share": 1.0},
        ],
        batch_rows=8,
    )
    run = build.open_run(asked, cache)
    rows = run.train[0].epoch(0)
    assert rows.examples == 96
    steps = [math.ceil(1.5 * len(rows) / 8), math.ceil(50 / 96 * len(rows) / 8)]
    assert [stage.total_steps for stage in run.network.spec.stages] == steps
    assert [stage.warmup_steps for stage in run.network.spec.stages] == [round(0.3 * steps[0]), steps[1] - 1]
    assert spec_hash(run.network.spec) == spec_hash(asked)
    assert build.open_run(run.network.spec, cache).network.spec == run.network.spec


def test_warm_up_beyond_the_steps_that_the_data_give_is_an_error(cache: Path) -> None:
    asked = spec(cache, [{"total_steps": 0, "epochs": 0.1, "warmup_steps": 50}])
    with pytest.raises(UserError, match=r"^stage align: expected warmup_steps below its \d+ steps, got 50"):
        build.open_run(asked, cache)


def test_each_stage_trains_on_its_own_data_from_the_start(cache: Path, tmp_path: Path, monkeypatch) -> None:
    """A stage with data of its own begins with their first row, and so does the next one with those of the run."""
    own = StageDataSpec(train=(pages("good"),), batch_rows=8)
    asked = spec(cache, [{"total_steps": 2, "warmup_steps": 0, "data": own}, {"total_steps": 2}])
    run, taken, make = build.open_run(asked, cache), [], pipeline.train_batches
    assert [batches.data.mixture.names for batches in run.train] == [("good",), ("ocr", "facts")]
    assert [batches.data.spec.batch_rows for batches in run.train] == [8, 16]

    def train_batches(batches: pipeline.Batches, first: int, last: int):
        taken.append((batches.data.mixture.name, first, last))
        return make(batches, first, last)

    monkeypatch.setattr(pipeline, "train_batches", train_batches)
    job.train(run, tmp_path, lambda log, values: None)
    assert taken == [("good", 0, 2), ("ocr + facts", 0, 2)]


def test_text_only_sources_mix_with_stored_features(cache: Path) -> None:
    run = build.open_run(spec(cache, train=(pages("text"), pages("good")), pack="none", batch_rows=32), cache)
    inputs = run.train[0][0]
    features = inputs.views.features.tokens[:, 0]
    text = np.array([run.train[0].data.mixture.locate(plan.conversation[0])[0] == 0 for plan in run.train[0].rows(0)])
    assert text.sum() == 16
    assert not features[text].any()
    assert features[~text].any(axis=(1, 2)).all()
    assert not ((inputs.visual >= 0).any(axis=1) & text).any()
    only = build.open_run(spec(cache, train=(pages("text"),), pack="none", batch_rows=32), cache).train[0][0]
    assert only.views.features.tokens.shape == inputs.views.features.tokens.shape


@pytest.mark.parametrize("frozen", [True, False])
def test_broken_images_have_no_weight(cache: Path, frozen: bool) -> None:
    data = dict(train=(pages("broken"),), pack="none", batch_rows=16, frozen_features=frozen)
    (batches, _) = build.open_run(spec(cache, **data, max_bad_share=0.25), cache).train
    inputs, broken = batches[0], [int(plan.conversation[0]) % 4 == 0 for plan in batches.rows(0)]
    assert (inputs.weight.any(axis=1) == ~np.array(broken)).all()
    assert sorted(batches.data.bad.found) == [(0, n) for n in (0, 4, 8, 12)]
    with pytest.raises(UserError, match=r"data.max_bad_share=0.2 of unusable items, got 4 of 16: "):
        build.open_run(spec(cache, **data, max_bad_share=0.2), cache).train[0][0]


@pytest.mark.parametrize(("frozen", "name"), [(True, "quecc"), (False, "quecc"), (True, "vision_zip")])
def test_the_compiler_is_given_the_shapes_of_training_batches(cache: Path, frozen: bool, name: str) -> None:
    """Ahead of time, for each stage: its rows, views, questions, and the sources of a mixture."""
    own = StageDataSpec(train=(pages("good"),), batch_rows=8)
    asked = spec(cache, [{"data": own}, {}], frozen_features=frozen, question_tokens=2)
    compressor = dataclasses.replace(
        asked.model.compressor, name=name, width=16, heads=2, depth=1, mlp_width=16, taps=1
    )
    encoder = dataclasses.replace(encoder_for(catalog.row(name), asked.model.encoder), taps=(1,))
    asked = dataclasses.replace(asked, model=dataclasses.replace(asked.model, compressor=compressor, encoder=encoder))
    run = build.open_run(asked, cache)
    for batches, stage in zip(run.train, run.network.spec.stages, strict=True):
        batch, shapes = batches[0], fitting.train_inputs(run.network.spec, stage, run.network.plan)
        assert jax.tree.structure(batch) == jax.tree.structure(shapes)
        for array, shape in zip(jax.tree.leaves(batch), jax.tree.leaves(shapes), strict=True):
            assert (array.shape, array.dtype) == (shape.shape, shape.dtype)


def test_test_data_that_do_not_fit_are_an_error_before_training(cache: Path) -> None:
    with pytest.raises(UserError, match=r"^data.row_tokens: expected room for a conversation of long.* got 64"):
        build.open_run(spec(cache, test=(pages("long"),)), cache)


def test_sources_of_one_name_have_two_names(cache: Path) -> None:
    run = build.open_run(spec(cache, train=(pages("good"), pages("good"))), cache)
    assert run.train[0].data.mixture.names == ("good", "good 2")


def test_an_unknown_kind_of_source_names_the_nearest(cache: Path) -> None:
    with pytest.raises(UserError, match="unknown kind of source 'lava': did you mean 'llava'"):
        build.open_run(spec(cache, train=(SourceSpec("lava"),)), cache)


def test_a_run_in_epochs_is_read_again(cache: Path, tmp_path: Path) -> None:
    """What is stored with a checkpoint has steps beside epochs; it loads, and evaluates as before."""
    stages = [{"total_steps": 3}, {"total_steps": 0, "epochs": 0.2, "warmup_steps": 0, "warmup_share": 0.5}]
    run = build.open_run(spec(cache, stages), cache)
    params = job.train(run, tmp_path, lambda log, values: None)
    stored = spec_from_dict(read_spec(tmp_path))
    assert stored == run.network.spec
    assert spec_hash(stored) == spec_hash(spec(cache, stages))
    again = build.open_run(stored, cache)
    assert again.network.spec == stored
    restored = job.restore(again.network, tmp_path, least_step=total_steps(stored))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), jax.device_get(restored))
    assert vlm_jax.load(tmp_path).spec.compressor == stored.model.compressor
