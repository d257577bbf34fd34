"""Every number of a run has a range, and a run outside it is refused before anything is built."""

import dataclasses
import re
import time
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from vlm_jax.config import ranges
from vlm_jax.config.arguments import load_config
from vlm_jax.config.resolve import resolve, spec_from_dict
from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import RunSpec, to_dict

VLM = str(Path(__file__).parents[2] / "configs" / "vlm.py")


def numeric(hint: Any, where: str = "") -> Iterator[str]:
    """The dotted names of the numbers of a spec, as its annotations say; "*" is an index of a tuple."""
    args = [arg for arg in typing.get_args(hint) if arg not in (Ellipsis, type(None))]
    if dataclasses.is_dataclass(hint):
        for name, inner in typing.get_type_hints(hint).items():
            yield from numeric(inner, f"{where}.{name}" if where else name)
    elif typing.get_origin(hint) in (typing.Union, types.UnionType):
        yield from numeric(args[0], where)
    elif typing.get_origin(hint) is tuple:
        for i, arg in enumerate(args):
            yield from numeric(arg, f"{where}.{'*' if len(set(args)) == 1 else i}")
    elif hint in (int, float):
        yield where


def test_every_number_of_a_run_has_a_range() -> None:
    assert set(numeric(RunSpec)) == set(ranges.RANGES)


BAD = {
    "seed": ("-1", str(2**32)),
    "optim.peak_lr": ("-1e-3", "1e400", "nan", "1e9"),
    "stages.0.lr_factor": ("-1.0", "1e400", "-1e400"),
    "optim.weight_decay": ("-0.1", "1e400"),
    "optim.clip_norm": ("0.0", "-1.0", "1e400"),
    "optim.b1": ("1.0", "-0.1", "1.5"),
    "optim.b2": ("1.0", "-0.1"),
    "optim.final_lr_share": ("-0.1", "1.1"),
    "optim.lr_scale.0.1": ("-1.0", "1e400"),
    "optim.lr_scale.0.0": ("", "(", "[", "*a", "(a+)+$", "(.*)*x", "(a|a)*b", "(?:x+x+)+y", "(a?){30}a{30}",
                           "(a{1,9}){1,9}", ".*.*.*.*.*.*.*.*=", ".?" * 40 + "=", "(ab|a)" * 40, "a{99999999999}",
                           "(" * 5000, "(?=(a+)+)", "(?>(a*)*)", "a\n"),
    "optim.lr_scale": ("[('a',)]", "[('a', 'b')]", "[3]", "[('a', -1.0)]", "[('a', 1.0, 2.0)]"),
    "evaluation.examples": ("-5",),
    "evaluation.questions_per_example": ("0",),
    "evaluation.batch_examples": ("0", "-256", str(2**31)),
    "evaluation.max_new_tokens": ("0", "-1"),
    "evaluation.subset_examples": ("0",),
    "data.batch_examples": ("0", "-32"),
    "data.text_tokens": ("0", "-1"),
    "data.dataset": ("",),
    "data.config": ("", "a\0b", "\x1b[31m"),
    "data.train_split": ("",),
    "stages.0.name": ("",),
    "stages.0.train": ("()", "[1]", "['nothing']"),
    "stages.0.warmup_steps": ("-1", "99999"),
    "stages.0.total_steps": ("0", "-4", str(2**31)),
    "compute.mesh": ("(0, 1, 1)", "(-2, 1, 1)", "(1, 1)", "('a', 1, 1)"),
    "compute.microbatches": ("0", "-1"),
    "compute.slices": ("0",),
    "bad_step.spike_factor": ("-1.0", "0.5", "1.0", "1e400"),
    "log_every_steps": ("0",),
    "keep_checkpoints": ("0", "-1"),
    "model.projector": ("", "mlp2"),
    "model.vocab": ("-1", str(2**31)),
    "model.taps": ("('a',)", "(1.0,)", "(True,)"),
    "model.compressor.heads": ("0", "-16"),
    "model.compressor.width": ("0", "-64"),
    "model.compressor.depth": ("0",),
}  # fmt: skip


@pytest.mark.parametrize(("field", "text"), [(field, text) for field, texts in BAD.items() for text in texts])
def test_a_value_outside_its_range_is_refused_by_name(field: str, text: str) -> None:
    with pytest.raises(UserError) as error:
        resolve(load_config(VLM, {field: text}))
    name = field.removeprefix("stages.0.").removeprefix("model.compressor.").rpartition(".0.")[0] or field
    assert field in str(error.value) or name.rpartition(".")[2] in str(error.value)
    assert len(str(error.value)) < 400
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "pattern",
    [
        "^decoder/",
        ".*kernel$",
        "blocks/.*/(attention|mlp)/.*kernel",
        r"layer_\d+/",
        "(encoder|decoder)",
        "a{2,3}",
        "a?b",
    ],
)
def test_usual_patterns_are_accepted(pattern: str) -> None:
    assert resolve(load_config(VLM, {"optim.lr_scale.0.0": pattern})).optim.lr_scale[0][0] == pattern


def test_accepted_patterns_are_fast() -> None:
    """The slowest kind of pattern that is accepted, on names that it almost matches."""
    ranges.check_regex("pattern", ".*.*.*.*=")
    begin = time.monotonic()
    re.search(".*.*.*.*=", "decoder/blocks/attention/query/kernel" * 2)
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "seed: expected at least 0, got -1"),
        ({"model": None}, "model: expected a group of fields, got None"),
        ({"stages": []}, "at least one stage"),
        ({"stages": 3}, "stages: expected"),
        ({"seed": 1e400}, "seed: expected int, got inf"),
        ({"compute": []}, "compute: expected a group of fields"),
    ],
)
def test_a_damaged_stored_spec_is_refused_too(change: dict[str, Any], message: str) -> None:
    values = to_dict(resolve(load_config(VLM)))
    with pytest.raises(UserError, match=message):
        spec_from_dict({**values, **change})
    with pytest.raises(UserError, match=r"model\.encoder is missing"):
        spec_from_dict({**values, "model": {**values["model"], "encoder": None}})


GROUPS = {
    "model": (None, 3, "x", (), {"encoder": "glyph-64"}),
    "optim": (None, 3, (1, 2)),
    "stages": (None, 3, "both", (3,), ({},), (None,), ()),
    "data": (None, 3, ()),
    "seed": (None, "1", (), 1.5, True),
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in GROUPS.items() for value in values])
def test_a_group_of_another_type_is_refused(field: str, value: object) -> None:
    values = load_config(VLM).to_dict()
    with pytest.raises(UserError, match=field):
        resolve(ConfigDict({**values, field: value}))
    del values[field]
    with pytest.raises(UserError, match=field):
        resolve(ConfigDict(values))


@pytest.mark.parametrize(
    "field", ["encoder", "llm", "compressor", "projector", "mask", "taps", "feature_layer", "vocab"]
)
@pytest.mark.parametrize("value", [None, 3.5, {"a": 1}, True, [[]]])
def test_a_part_of_the_model_of_another_type_is_refused(field: str, value: object) -> None:
    values = load_config(VLM).to_dict()
    with pytest.raises(UserError, match=field):
        resolve(ConfigDict({**values, "model": {**values["model"], field: value}}))
