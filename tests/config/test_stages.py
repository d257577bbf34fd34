"""Stages in a config: their length in steps, epochs or examples, warm-up, and data of their own."""

import dataclasses
from typing import Any

import pytest

from vlm_jax.config.arguments import load_config
from vlm_jax.config.resolve import resolve
from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import DataSpec, RunSpec, SourceSpec, StageDataSpec, data_of, spec_hash, views_of_row


def stages(**fields: Any) -> RunSpec:
    config = load_config("configs/vlm.py:llm=d24,tokens=2,stages=2")
    config.stages = tuple({**stage, **fields} for stage in config.stages)
    return resolve(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": 1.0}, "expected one of total_steps, epochs and examples above 0"),
        ({"total_steps": 0}, "got total_steps=0, epochs=0.0, examples=0"),
        ({"total_steps": 0, "epochs": 1.0, "examples": 10}, "epochs=1.0, examples=10"),
        ({"total_steps": -3, "epochs": 1.0}, "stages.0.total_steps: expected at least 0, got -3"),
        ({"warmup_steps": 10**6}, "warmup_steps from 0 to below its steps, got 1000000"),
        ({"warmup_steps": -1}, "got -1"),
        ({"warmup_steps": 0, "warmup_share": 1.5}, "stages.0.warmup_share: expected at most 1, got 1.5"),
        ({"warmup_steps": 2, "warmup_share": 0.1}, "expected warmup_steps or warmup_share, got both"),
        ({"data": {"resize": "padd"}}, "'padd': did you mean 'pad'"),
        ({"data": {"formt": "plain"}}, "stages.0.data.formt"),
        ({"data": {"train": ({"source": "llava", "pth": "x"},)}}, "did you mean 'path'"),
    ],
)
def test_bad_stages_are_one_line(fields: dict, message: str) -> None:
    with pytest.raises(UserError) as caught:
        stages(**fields)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"total_steps": 0, "epochs": 1.5, "warmup_steps": 0, "warmup_share": 0.03},
        {"total_steps": 0, "examples": 5000, "warmup_steps": 0, "warmup_share": 0.03},
        {"total_steps": 0, "epochs": 1.0},
        {"warmup_steps": 0, "warmup_share": 0.5},
    ],
)
def test_the_hash_stays_when_steps_are_resolved(fields: dict) -> None:
    """Steps that follow from the data are no choice; what they follow from is."""
    spec = stages(**fields)
    resolved = tuple(
        dataclasses.replace(
            stage,
            total_steps=stage.total_steps or 77,
            warmup_steps=9 if stage.warmup_share else stage.warmup_steps,
        )
        for stage in spec.stages
    )
    resolved = dataclasses.replace(spec, stages=resolved)
    assert resolved != spec
    assert spec_hash(resolved) == spec_hash(spec)
    for name, value in fields.items():
        if value:
            other = [dataclasses.replace(stage, **{name: 2 * value}) for stage in spec.stages]
            assert spec_hash(dataclasses.replace(spec, stages=tuple(other))) != spec_hash(spec), name


def test_a_stage_without_data_has_those_of_the_run() -> None:
    spec = stages()
    assert data_of(spec, spec.stages[0]) == spec.data


def test_a_stage_changes_the_fields_that_it_names() -> None:
    spec = stages(data={"train": ({"source": "llava", "path": "x.json"},), "format": "plain"})
    expected = dataclasses.replace(spec.data, train=(SourceSpec("llava", path="x.json"),), format="plain")
    assert data_of(spec, spec.stages[1]) == expected
    assert spec_hash(spec) != spec_hash(stages())
    assert spec.stages[0].data == StageDataSpec(train=expected.train, format="plain")


@pytest.mark.parametrize(
    ("pack", "questions", "reads_question", "views"),
    [("none", 3, True, 6), ("none", 0, True, 2), ("none", 3, False, 2), ("fit", 3, True, 2), ("fit", 0, False, 2)],
)
def test_views_of_a_row(pack: str, questions: int, reads_question: bool, views: int) -> None:
    """Unpacked rows have a view for each image and question that is read; packed rows at most `row_images`."""
    spec = DataSpec((), (), "prefix", pack, 4, 64, 2, questions, False)
    assert views_of_row(spec, reads_question) == views
