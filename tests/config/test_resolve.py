"""A config is strict both ways, its errors name the fix, and what it resolves to is written down."""

import dataclasses
import json
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from vlm_jax.config.arguments import load_config, parse_arg, split_overrides
from vlm_jax.config.resolve import resolve, spec_from_dict
from vlm_jax.config.sweep import cell_name, load_grid, param, product
from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import spec_hash, to_dict

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
GROUPS = ("data", "optim", "compute", "evaluation", "bad_step")
VLM = str(ROOT / "configs" / "vlm.py")


def golden(name: str, text: str) -> None:
    """Equal to the file. To renew after an intended change: delete the file and run this test, which fails once."""
    path = GOLDEN / name
    if not path.exists():
        path.write_text(text)
        pytest.fail(f"{path} was missing and has been written: look at it, commit it, run again")
    assert text == path.read_text(), f"{path} differs; if the change is intended, delete it and run again"


@pytest.mark.parametrize("arg", ["", "smoke", "compressor=quecc", "stages=2,llm=d96,tokens=0"])
def test_golden_resolved_config(arg: str) -> None:
    spec = resolve(load_config(f"{VLM}:{arg}"))
    golden(
        f"vlm_{arg.replace('=', '-').replace(',', '_') or 'default'}.json", json.dumps(to_dict(spec), indent=1) + "\n"
    )


@pytest.mark.parametrize("name", ["demo", "size_by_tokens"])
def test_golden_cell_names(name: str) -> None:
    """Every cell of a grid by name, with the hash of what it resolves to; no two cells are one experiment."""
    grid = load_grid(str(ROOT / "configs" / "grids" / f"{name}.py"))
    names = [cell_name(cell) for cell in grid.cells]
    hashes = [spec_hash(resolve(load_config(f"{ROOT / grid.config}:{name}"))) for name in names]
    assert len(set(hashes)) == len(names)
    golden(f"grid_{name}.txt", "".join(f"{h} {n}\n" for h, n in zip(hashes, names, strict=True)))


def test_a_spec_survives_json() -> None:
    spec = resolve(load_config(VLM))
    assert spec_from_dict(json.loads(json.dumps(to_dict(spec)))) == spec


def test_a_saved_spec_whose_stages_have_no_place_is_refused() -> None:
    """spec.json of a run, edited by hand."""
    values = to_dict(resolve(load_config(f"{VLM}:compressor=fastv,tokens=4")))
    assert spec_from_dict(values).model.compressor.name == "fastv"
    depth = values["model"]["decoder"]["depth"]
    values["model"]["compressor"]["depth"] = depth
    with pytest.raises(UserError, match=rf"nearest possible: compressor\.depth={depth - 1}\)"):
        spec_from_dict(values)


def test_the_hash_ignores_how_often_a_run_saves() -> None:
    plain = resolve(load_config(VLM))
    assert spec_hash(resolve(load_config(VLM, {"save_every_steps": "7", "log_every_steps": "3"}))) == spec_hash(plain)
    assert spec_hash(resolve(load_config(VLM, {"optim.clip_norm": "0.5"}))) != spec_hash(plain)


def test_a_field_inside_an_optional_group_leaves_old_hashes_as_they_were() -> None:
    """Of a decoder with bands, in which `rope_bands.ramp` does not appear at its former value."""
    spec = resolve(load_config(f"{VLM}:llm=llama3.2-1b"))
    bands = dataclasses.replace(spec.model.decoder.rope_bands, ramp="channels")
    decoder = dataclasses.replace(spec.model.decoder, rope_bands=bands)
    other = dataclasses.replace(spec, model=dataclasses.replace(spec.model, decoder=decoder))
    assert spec_hash(spec) == "4fa47f8fa76e" != spec_hash(other)


@pytest.mark.parametrize(
    ("location", "overrides", "parts"),
    [
        (f"{VLM}:lm=d48", {}, ("'lm'", "llm")),
        (f"{VLM}:llm=d47", {}, ("'d47'", "d4")),
        (f"{VLM}:tokens=four", {}, ("tokens", "int")),
        (f"{VLM}:tokens=65", {}, ("tokens=65", "8 x 8")),
        (f"{VLM}:compressor=tokenpacker,tokens=3", {}, ("tokens=3", "possible", "4")),
        (f"{VLM}:compressor=poool", {}, ("'poool'", "'pool'")),
        (f"{VLM}:family=orc", {}, ("'orc'", "'ocr'")),
        (VLM.replace("vlm.py", "vml.py"), {}, ("vml.py", "vlm.py")),
        (VLM, {"optim.clipnorm": "1"}, ("clipnorm", "clip_norm")),
        (VLM, {"optimiser.clip_norm": "1"}, ("optimiser", "optim")),
        (VLM, {"optim.clip_norm": "much"}, ("optim.clip_norm", "float")),
        (VLM, {"model.taps": "(9,)"}, ("model.taps", "1 to 4")),
        (VLM, {"model.taps": "(3, 3)"}, ("model.taps", "distinct")),
        (VLM, {"model.feature_layer": "5"}, ("model.feature_layer", "0 to 4")),
        (VLM, {"model.mask": "causall"}, ("model.mask", "causal")),
        (VLM, {"compute.remat": "blok"}, ("compute.remat", "did you mean 'block'")),
        (
            VLM,
            {"compute.attention": "splash", "model.mask": "prefix", "data.questions_per_example": "1"},
            ("splash", "model.mask=causal", "prefix", "attention=xla"),
        ),
        (VLM, {"stages.0.warmup_steps": "99999"}, ("warmup_steps",)),
        (
            VLM,
            {"stages.0.total_steps": "0"},
            ("one of total_steps, epochs and examples above 0", "total_steps=0"),
        ),
        (VLM, {"compute.microbatches": "0"}, ("compute.microbatches", "at least 1, got 0")),
        (VLM, {"optim.peaklr": "1.0"}, ("peaklr", "peak_lr")),
        (f"{VLM}:stages=3", {}, ("stages", "2")),
        (VLM, {"model.encoder.taps": "1,2"}, ("model.encoder.taps", "'glyph-64'")),
        (VLM, {"evaluate_every_steps": "-1"}, ("evaluate_every_steps", "at least 0, got -1")),
    ],
)
def test_bad_input_names_the_fix(location: str, overrides: dict[str, str], parts: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as error:
        resolve(load_config(location, overrides))
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_a_missing_file_suggests_config_files(tmp_path: Path) -> None:
    (tmp_path / "setup.py").write_text("from setuptools import setup\n")
    with pytest.raises(UserError, match=r"^no config file .*vml\.py$"):
        load_config(str(tmp_path / "vml.py"))
    (tmp_path / "vlm.py").write_text("def get_config(arg=''):\n    pass\n")
    with pytest.raises(UserError) as error:
        load_config(str(tmp_path / "vml.py"))
    assert str(error.value) == (
        f"unknown config file '{tmp_path}/vml.py': did you mean '{tmp_path}/vlm.py'? valid: {tmp_path}/vlm.py"
    )


@pytest.mark.parametrize("name", ["vlm", "llava"])
def test_every_field_can_be_set_from_the_command_line(name: str) -> None:
    config = load_config(str(ROOT / "configs" / f"{name}.py"))
    spec = resolve(config)
    for values, there in ((spec, config), *((getattr(spec, group), config[group]) for group in GROUPS)):
        assert {field.name for field in dataclasses.fields(values)} <= set(there)
    changed = resolve(load_config(str(ROOT / "configs" / f"{name}.py"), {"compute.moments": "bfloat16"}))
    assert changed.compute.moments == "bfloat16"


def test_missing_and_unknown_fields() -> None:
    config = load_config(VLM)
    del config.optim["b2"]
    with pytest.raises(UserError, match=r"optim\.b2 is missing"):
        resolve(config)
    config = load_config(VLM)
    config.data.batch_size = 3
    with pytest.raises(UserError, match="batch_rows"):
        resolve(config)
    with pytest.raises(UserError, match="model"):
        resolve(ConfigDict({"seed": 0}))


def test_override_without_a_value() -> None:
    assert split_overrides(["--a", "--config.x.y=1=2"]) == (["--a"], {"x.y": "1=2"})
    with pytest.raises(UserError, match="=VALUE"):
        split_overrides(["--config.x"])


def test_arguments() -> None:
    assert parse_arg("a=2,b", a=1, b=False, c="x").to_dict() == {"a": 2, "b": True, "c": "x"}
    assert parse_arg("a=2", a=1.5).a == 2.0
    with pytest.raises(UserError, match="float"):
        parse_arg("a=os.remove", a=1.5)


def test_grid_algebra() -> None:
    grid = product(param("llm", "a", "b"), param("tokens", 1, 2)) + param("llm", "c")
    assert [cell_name(cell) for cell in grid] == [
        "llm=a,tokens=1",
        "llm=a,tokens=2",
        "llm=b,tokens=1",
        "llm=b,tokens=2",
        "llm=c",
    ]
