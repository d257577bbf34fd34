"""Weights in a form that is not read: the error names what is there and the way out."""

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests import builders
from vlm_jax.checkpoints import inspection, tensor_files, tensor_tables
from vlm_jax.checkpoints.huggingface import exporting, hf_decoder
from vlm_jax.core.errors import UserError

CONFIG = hf_decoder.hf_config(builders.DECODER)
ARRAYS = {
    name: np.ones(shape, np.float32)
    for name, shape in tensor_tables.expected([hf_decoder.decoder_table(builders.DECODER)]).items()
}


def model(folder: Path, arrays: dict[str, np.ndarray] | None = None, **config: object) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(ARRAYS if arrays is None else arrays, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    return folder


def refusal(path: Path | str) -> str:
    with pytest.raises(UserError) as error:
        inspection.inspect(path)
    return str(error.value)


def test_the_model_of_these_tests_loads(tmp_path: Path) -> None:
    assert inspection.inspect(model(tmp_path)).decoder is not None


@pytest.mark.parametrize(
    "name",
    ["google/siglip-so400m", "Qwen/Qwen1.5-0.5B", "https://huggingface.co/google/siglip-so400m", "hf://a/b.c"],
)
def test_a_name_of_the_hub_must_be_downloaded_first(name: str) -> None:
    found = "/".join(name.replace("hf://", "").split("/")[-2:])
    assert f"hf download {found} --local-dir {found.partition('/')[2]}" in refusal(name)


def test_a_missing_file_is_no_name_of_the_hub(tmp_path: Path) -> None:
    for name in (tmp_path / "a", "weights/a.safetensors", "a/b/c", "llava"):
        assert refusal(name).endswith("no such file or folder")


@pytest.mark.parametrize(
    ("files", "what", "way_out"),
    [
        (("model.Q4_K_M.gguf",), "GGUF weights (model.Q4_K_M.gguf)", "download the original model"),
        (("adapter_model.safetensors", "adapter_config.json"), "a PEFT adapter of org/base", "merge_and_unload()"),
        (("model-00001-of-00002.safetensors",), "shards without their index", "model.safetensors.index.json"),
        (("tf_model.h5",), "TensorFlow weights", "save_pretrained"),
        (("flax_model.msgpack",), "Flax weights", "save_pretrained"),
        (("consolidated.00.pth",), "their authors' own format", "download the original model"),
        (("weights.safetensors",), "weights under another name", "name that file"),
        (("refs/main", "snapshots/abc/model.safetensors"), "the Hub's cache", "snapshots/REVISION"),
        (("checkpoint-100/model.safetensors",), "a model in a folder of this one", "name that folder"),
        (("README.md",), "no weights", "name the folder that holds them"),
    ],
)
def test_a_folder_of_something_else(tmp_path: Path, files: tuple[str, ...], what: str, way_out: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    message = refusal(tmp_path)
    assert what in message
    assert way_out in message


def test_an_adapter_beside_whole_weights_does_not_hide_them(tmp_path: Path) -> None:
    (model(tmp_path) / "adapter_config.json").write_text("{}")
    assert inspection.inspect(tmp_path).decoder is not None


@pytest.mark.parametrize(
    ("prefix", "suffix", "what", "way_out"),
    [
        ("base_model.model.", "", "a PEFT model that was not merged", "merge_and_unload()"),
        ("_orig_mod.", "", "torch.compile", "model._orig_mod"),
        ("module.", "", "DataParallel", "model.module"),
        ("", ".lora_A.default.weight", "a PEFT adapter", "merge_and_unload()"),
        ("", ".qweight", "quantised weights", "dequantize()"),
        ("", ".weight_scale_inv", "quantised weights", "dequantize()"),
        ("", ".weight.absmax", "quantised weights", "dequantize()"),
    ],
)
def test_tensor_names_tell_what_was_saved(tmp_path: Path, prefix: str, suffix: str, what: str, way_out: str) -> None:
    message = refusal(model(tmp_path, {f"{prefix}{name}{suffix}": array for name, array in ARRAYS.items()}))
    assert what in message
    assert way_out in message


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config.quant_method=gptq"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "quantization"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "quantization_config.quant_method=fp8"),
    ],
)
def test_quantised_weights_by_their_config(tmp_path: Path, config: dict[str, object], field: str) -> None:
    message = refusal(model(tmp_path, **config))
    assert f"config.json: {field}: expected weights that are not quantised" in message
    assert "dequantize()" in message


def test_a_pointer_of_git_lfs_is_no_weights(tmp_path: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (model(tmp_path) / "model.safetensors").write_text(text)
    assert "git lfs pull" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "what"), [("a.gguf", "GGUF weights"), ("a.zip", "an archive"), ("config.json", "name its")]
)
def test_files_of_other_formats(tmp_path: Path, name: str, what: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    assert what in refusal(tmp_path / name)


def put_pipe(path: Path) -> None:
    os.mkfifo(path)


def put_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("put", [put_pipe, put_device, Path.mkdir])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "model.safetensors.index.json"])
def test_what_is_no_file_is_not_opened(tmp_path: Path, name: str, put: Callable[[Path], None]) -> None:
    model(tmp_path)
    for file in {name, "model.safetensors"} if "index" in name else {name}:
        (tmp_path / file).unlink(missing_ok=True)
    put(tmp_path / name)
    assert name in refusal(tmp_path)


def npy(shape: str, kind: str, body: bytes) -> bytes:
    header = f"{{'descr': {kind}, 'fortran_order': False, 'shape': {shape}}}".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + body


@pytest.mark.parametrize(
    ("shape", "kind", "body"),
    [
        ("(1000000000000,)", "'<f4'", b""),
        ("(0, 1000000000000000000000)", "'<f4'", b""),
        ("(-1,)", "'<f4'", bytes(4)),
        ("(-2, -2)", "'<f4'", bytes(16)),
        ("(3,)", "'<f4'", bytes(16)),
        ("(1,)", "'|O'", bytes(8)),
        ("(9223372036854775807, 4)", "'|V0'", b""),
    ],
)
def test_an_array_that_is_not_its_entrys_size(tmp_path: Path, shape: str, kind: str, body: bytes) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", npy(shape, kind, body))
    with pytest.raises(UserError, match=r"a\.npz: not a readable \.npz"):
        tensor_files.open_weights(tmp_path / "a.npz")


def test_an_archive_that_claims_too_much_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """40 KB of compressed zeros claim 40 MB: a thousand times the file."""
    content = io.BytesIO()
    np.save(content, np.zeros(10**7, np.float32))
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", content.getvalue())
    monkeypatch.setattr(zipfile.ZipFile, "open", None)
    with pytest.raises(UserError, match=r"claim to hold 40,000,128: expected at most 64 times"):
        tensor_files.open_weights(tmp_path / "a.npz")


def test_ordinary_compression_is_read(tmp_path: Path) -> None:
    array = np.random.default_rng(0).standard_normal((50, 60)).astype(np.float32)
    np.savez_compressed(tmp_path / "a.npz", x=array, zeros=np.zeros(10**6, np.float32), empty=np.zeros((0, 3)), one=1.0)
    opened = tensor_files.open_weights(tmp_path / "a.npz")
    np.testing.assert_array_equal(opened.read("x"), array)
    assert {name: shape for name, (shape, _) in opened.shapes.items()} == {
        "x": (50, 60), "zeros": (10**6,), "empty": (0, 3), "one": (),
    }  # fmt: skip


def test_export_does_not_copy_what_a_link_points_to_outside(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    source = model(tmp_path / "model")
    (source / "tokenizer.json").symlink_to("../secret")
    params = inspection.load_parts(inspection.inspect(source))
    spec = inspection.ModelSpec(None, None, None, builders.DECODER, "causal")
    with pytest.raises(UserError, match=r"tokenizer\.json: a link out of its folder"):
        exporting.save_folder(tmp_path / "out", spec, params, source=source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "secret"]


def test_export_copies_files_of_the_hubs_cache(tmp_path: Path) -> None:
    """Where the files of a snapshot are links to blobs beside it."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "1a").write_text("{}")
    (tmp_path / "snapshots").mkdir()
    source = model(tmp_path / "snapshots" / "abc")
    (source / "tokenizer.json").symlink_to("../../blobs/1a")
    exporting._companions(source, tmp_path)
    assert (tmp_path / "tokenizer.json").read_text() == "{}"
