"""The command that writes a model as a folder for others (beside transformers: tests/checkpoints/test_parity_*)."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests import builders
from tests.golden import peers_decoders as peers
from tests.golden.drawn import weights
from vlm_jax import build, export, job
from vlm_jax.checkpoints import inspection, orbax
from vlm_jax.checkpoints.tensor_files import open_weights
from vlm_jax.core.errors import UserError
from vlm_jax.models.vlm import Vlm

CASE = peers.read()["qwen2"]


@pytest.fixture
def published(tmp_path: Path) -> Path:
    path = tmp_path / "in"
    path.mkdir()
    save_file(weights(CASE.shapes), path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(CASE.config))
    (path / "tokenizer.json").write_text('{"words": 1}')
    (path / "notes.txt").write_text("mine")
    return path


def test_an_exported_folder_has_the_same_tensors_and_tokenizer(tmp_path, published: Path, capsys) -> None:
    out = tmp_path / "out"
    export.main(["--model", str(published), "--out", str(out)])
    assert capsys.readouterr() == (f"{out}\n", "")
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    there = load_file(out / "model.safetensors")
    for name, array in weights(CASE.shapes).items():
        np.testing.assert_array_equal(there.pop(name), array)
    assert not there
    assert (out / "tokenizer.json").read_text() == '{"words": 1}'
    config = json.loads((out / "config.json").read_text())
    assert {name: config[name] for name in ("bos_token_id", "torch_dtype")} == {
        "bos_token_id": 1,
        "torch_dtype": "float32",
    }
    ours, theirs = inspection.inspect(out).decoder, inspection.inspect(published).decoder
    assert dataclasses.replace(ours, name="") == dataclasses.replace(theirs, name="")


def test_large_models_are_split_and_cast(tmp_path, published: Path) -> None:
    out = tmp_path / "out"
    export.main(["--model", str(published), "--out", str(out), "--dtype", "bfloat16", "--max-shard-gb", "2e-5"])
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 1
    assert {str(kind) for _, kind in open_weights(out).shapes.values()} == {"bfloat16"}
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_export_never_overwrites_and_never_leaves_partial_files(tmp_path, published: Path) -> None:
    for message, flags in {
        "already exists": ["--out", str(published)],
        "the model has no encoder": ["--out", str(tmp_path / "a"), "--part", "encoder"],
        "expected a model with an encoder for a .npz": ["--out", str(tmp_path / "a.npz")],
        "cannot be written": ["--out", str(published / "config.json" / "a")],
        "expected a positive": ["--out", str(tmp_path / "a"), "--max-shard-gb", "0"],
        "expected a positive, finite size, got nan": ["--out", str(tmp_path / "a"), "--max-shard-gb", "nan"],
        "expected a positive, finite size, got inf": ["--out", str(tmp_path / "a"), "--max-shard-gb", "inf"],
    }.items():
        with pytest.raises(UserError, match=message):
            export.main(["--model", str(published), *flags])
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_export_touches_nothing_beside_its_target(tmp_path, published: Path) -> None:
    """Folders with names like temporary ones stay; a link is refused, and what it points to stays empty."""
    for name in ("X.partial", "X.tmp", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "X.partial" / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("link", "dangling"):
        with pytest.raises(UserError, match=f"{name}: is a symbolic link"):
            export.main(["--model", str(published), "--out", str(tmp_path / name)])
    export.main(["--model", str(published), "--out", str(tmp_path / "X")])
    assert (tmp_path / "X.partial" / "notes.txt").read_text() == "mine"
    assert not list((tmp_path / "elsewhere").iterdir())
    names = {"X", "X.partial", "X.tmp", "dangling", "elsewhere", "in", "link"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_run_gives_its_decoder_and_its_encoder(tmp_path, monkeypatch) -> None:
    """The whole model has a compressor, which no class of transformers has."""
    model = builders.model()
    params = builders.params(Vlm(model, builders.COMPUTE))
    network = SimpleNamespace(model=Vlm(model, builders.COMPUTE), encoder=params.pop("encoder"))
    monkeypatch.setattr(orbax, "read_spec", lambda workdir: {})
    monkeypatch.setattr("vlm_jax.config.resolve.spec_from_dict", lambda values: None)
    monkeypatch.setattr(build, "open_network", lambda spec: network)
    monkeypatch.setattr(job, "restore", lambda network, workdir: params)
    run = tmp_path / "run"
    run.mkdir()
    (run / "spec.json").write_text("{}")
    with pytest.raises(UserError, match="compressor resampler"):
        export.main(["--model", str(run), "--out", str(tmp_path / "whole")])
    export.main(["--model", str(run), "--out", str(tmp_path / "text"), "--part", "decoder"])
    there = inspection.inspect(tmp_path / "text")
    assert there.kind == "LlamaForCausalLM"
    up = inspection.load_parts(there)["decoder"]["blocks"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(up, params["decoder"]["blocks"]["mlp"]["up"]["kernel"])
    export.main(["--model", str(run), "--out", str(tmp_path / "eye"), "--part", "encoder"])
    patch = inspection.load_parts(inspection.inspect(tmp_path / "eye"))["encoder"]["patch"]["kernel"]
    np.testing.assert_array_equal(patch, network.encoder["patch"]["kernel"])
    named = ["--model", str(run), "--part", "encoder", "--out"]
    export.main([*named, str(tmp_path / "new" / "eye.npz")])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["eye.npz"]
    with pytest.raises(UserError, match=r"x\.npz: cannot be written"):
        export.main([*named, str(run / "spec.json" / "x.npz")])


def test_a_source_with_an_empty_text_config_gives_its_tokens(tmp_path, published: Path) -> None:
    (published / "config.json").write_text(json.dumps({**CASE.config, "text_config": None}))
    export.main(["--model", str(published), "--out", str(tmp_path / "out")])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["bos_token_id"] == 1


def test_help_keeps_its_lines(capsys) -> None:
    with pytest.raises(SystemExit):
        export.main(["--help"])
    assert export.__doc__ in capsys.readouterr().out
