"""Weights from files: every difference named before anything is read, any placement, the same bytes on the way back."""

import dataclasses
import json
import math
import zipfile

import flax.linen as nn
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests import builders
from vlm_jax.checkpoints import inspection, tensor_files, tensor_tables
from vlm_jax.checkpoints.huggingface import hf_decoder
from vlm_jax.core import tree
from vlm_jax.core.errors import UserError
from vlm_jax.distributed import partitioning
from vlm_jax.models.decoder import unstack_layers

SPEC = dataclasses.replace(builders.DECODER, name="", tied_head=False, qkv_bias=True, context=64)
TABLE = hf_decoder.decoder_table(SPEC)
CONFIG = hf_decoder.hf_config(SPEC)


def drawn() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal(shape).astype(np.float32) for name, shape in tensor_tables.expected([TABLE]).items()
    }


def folder(path, arrays=None):
    path.mkdir(exist_ok=True)
    save_file(drawn() if arrays is None else arrays, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def test_kernels_are_those_of_torch(tmp_path) -> None:
    """torch multiplies x W^T with W [out, in]; heads are rows of W, one after the other."""
    arrays = drawn()
    params = inspection.load_parts(inspection.inspect(folder(tmp_path, arrays)))["decoder"]["blocks"]
    x = np.random.default_rng(1).standard_normal(SPEC.width).astype(np.float32)
    block = "model.layers.1."
    query = (arrays[block + "self_attn.q_proj.weight"] @ x + arrays[block + "self_attn.q_proj.bias"]).reshape(4, 8)
    ours = params["attention"]["query"]
    np.testing.assert_allclose(np.einsum("d,dnc->nc", x, ours["kernel"][1]) + ours["bias"][1], query, atol=1e-5)
    heads = np.random.default_rng(2).standard_normal((4, 8)).astype(np.float32)
    out = arrays[block + "self_attn.o_proj.weight"] @ heads.ravel()
    np.testing.assert_allclose(np.einsum("nc,ncd->d", heads, params["attention"]["out"]["kernel"][1]), out, atol=1e-5)


@pytest.mark.parametrize("strategy", ["replicated", "fsdp", "fsdp_tensor"])
def test_any_placement_holds_the_same_numbers(tmp_path, strategy: str) -> None:
    """Shards are read on their own; together they are the array of the file."""
    there = inspection.inspect(folder(tmp_path))
    plan = partitioning.make_plan(builders.compute(strategy=strategy, mesh=(2, 2, 2)))
    heard: list[int] = []
    spread = inspection.load_parts(there, plan=plan, on_tensor=heard.append)["decoder"]
    assert tree.sha256(spread) == tree.sha256(inspection.load_parts(there)["decoder"])
    assert sum(heard) == inspection.size_bytes(there)
    shards = jax.tree.map(lambda leaf: leaf.sharding, spread)
    assert tree.flatten(shards) == tree.flatten(plan.shardings(inspection.boxed(there, "decoder")))
    kernel = spread["blocks"]["mlp"]["up"]["kernel"]
    (local,) = {shard.data.size for shard in kernel.addressable_shards}
    assert (local < kernel.size) == (strategy != "replicated")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes_are_cast_as_they_are_read(tmp_path, dtype: str) -> None:
    arrays = {name: array.astype(ml_dtypes.bfloat16) for name, array in drawn().items()}
    there = inspection.inspect(folder(tmp_path / "bf16", arrays))
    assert {kind for _, kind in there.weights.shapes.values()} == {np.dtype(ml_dtypes.bfloat16)}
    params = inspection.load_parts(there, dtype=dtype)["decoder"]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(dtype)}
    wanted = arrays["model.layers.0.mlp.up_proj.weight"].T.astype(dtype)
    np.testing.assert_array_equal(params["blocks"]["mlp"]["up"]["kernel"][0], wanted)
    assert inspection.load_parts(there, dtype=None)["decoder"]["embedding"].dtype == "bfloat16"


def test_an_unknown_dtype_is_told(tmp_path) -> None:
    with pytest.raises(UserError, match="unknown dtype 'float31': did you mean 'float32'"):
        inspection.load_parts(inspection.inspect(folder(tmp_path)), dtype="float31")


@pytest.mark.parametrize("max_shard_bytes", [10**9, 5000, 1])
def test_written_and_read_is_the_same_bytes(tmp_path, max_shard_bytes: int) -> None:
    """In one file, in a few, and in one a tensor; the index names what the folder holds."""
    arrays, out = drawn(), tmp_path / "out"
    params = inspection.load_parts(inspection.inspect(folder(tmp_path / "in", arrays)))["decoder"]
    out.mkdir()
    tensor_tables.save_params(out, [(params, TABLE)], max_shard_bytes)
    again = tensor_files.open_weights(out)
    assert set(again.shapes) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(again.read(name), array)
    assert not list(out.glob("*.partial*"))
    assert (
        len(list(out.glob("*.safetensors"))) == {10**9: 1, 5000: len(set(_files(out))), 1: len(arrays)}[max_shard_bytes]
    )


def _files(path) -> list[str]:
    index = path / "model.safetensors.index.json"
    return list(json.loads(index.read_text())["weight_map"].values()) if index.exists() else ["model.safetensors"]


def test_parts_of_one_tensor_are_cut_and_joined(tmp_path) -> None:
    """A fused tensor of queries, keys and values, cut along the axis behind the stacked blocks."""
    fused = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)
    np.savez(tmp_path / "fused.npz", qkv=fused)
    table = {
        name: tensor_tables.Leaf("qkv", fused.shape, (2, 4, 5), (0, 2, 1), part=(1, k, 3))
        for k, name in enumerate("qkv")
    }
    boxed = {name: jax.ShapeDtypeStruct((2, 5, 4), "float32") for name in "qkv"}
    params = tensor_tables.load_params(tensor_files.open_weights(tmp_path / "fused.npz"), table, boxed, None)
    np.testing.assert_array_equal(params["k"], fused[:, 1].transpose(0, 2, 1))
    ((name, back),) = tensor_tables.tensors(params, table)
    assert name == "qkv"
    np.testing.assert_array_equal(back, fused)


def test_bfloat16_in_an_npz_is_known_by_its_two_bytes(tmp_path) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3).astype(ml_dtypes.bfloat16)
    np.savez(tmp_path / "a.npz", **{"params/x": array})
    there = tensor_files.open_weights(tmp_path / "a.npz")
    assert there.shapes == {"params/x": ((2, 3), np.dtype(ml_dtypes.bfloat16))}
    np.testing.assert_array_equal(there.read("params/x"), array)


def test_missing_misshapen_and_unknown_tensors_are_all_named(tmp_path) -> None:
    arrays = drawn()
    arrays["model.layers.1.mlp.up_projection.weight"] = arrays.pop("model.layers.1.mlp.up_proj.weight")
    arrays["model.norm.weight"] = np.ones(9, np.float32)
    with pytest.raises(UserError) as error:
        inspection.inspect(folder(tmp_path, arrays))
    told = str(error.value)
    assert "3 tensor(s) do not fit" in told
    assert "model.layers.1.mlp.up_proj.weight is missing (the file has model.layers.1.mlp.up_projection.weight)" in told
    assert "model.norm.weight: expected shape [16], got [9]" in told
    assert "model.layers.1.mlp.up_projection.weight is unexpected (expected model.layers.1.mlp.up_proj.weight)" in told


def test_many_differences_are_counted(tmp_path) -> None:
    (folder(tmp_path) / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": 5}))
    with pytest.raises(UserError, match=rf"{3 * 12} tensor\(s\).*layers\.2\..*; and {3 * 12 - 4} more"):
        inspection.inspect(tmp_path)


def test_what_writers_add_is_passed_over(tmp_path) -> None:
    arrays = {**drawn(), "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    assert inspection.inspect(folder(tmp_path, arrays)).decoder == dataclasses.replace(SPEC, name=tmp_path.name)


def _truncated(path) -> None:
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:-100])


def _of_noise(path) -> None:
    (path / "model.safetensors").write_bytes(bytes(range(256)) * 4)


def _shard_gone(path) -> None:
    (path / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def _shard_outside(path) -> None:
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../secret.safetensors"}}))


def _torch_alone(path) -> None:
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(b"no")


def _config(path, text: str) -> None:
    (path / "config.json").write_text(text)


def _index(path, text: str) -> None:
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(text)


def _whole_numbers(path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({**drawn(), name: drawn()[name].astype(np.int8)}, path / "model.safetensors")


NESTED = "[" * 10**5
BROKEN = {
    "q_proj.weight: expected floating-point weights, got int8": _whole_numbers,
    "config.json: not valid JSON (nested too deeply": lambda path: _config(path, NESTED),
    "index.json: not valid JSON (nested too deeply": lambda path: _index(path, NESTED),
    "expected names of files beside it, got 1": lambda path: _index(path, '{"weight_map": {"x": 1}}'),
    "expected names of files beside it, got None": lambda path: _index(path, '{"weight_map": {"x": null}}'),
    "num_hidden_layers=10000000, but": lambda path: _config(path, json.dumps({**CONFIG, "num_hidden_layers": 10**7})),
    "unknown architecture 'GPT2LMHeadModel': valid": lambda path: _config(
        path, json.dumps({**CONFIG, "architectures": ["GPT2LMHeadModel"]})
    ),
    "not a complete safetensors file": _truncated,
    "model.safetensors: not a complete": _of_noise,
    "model-00001-of-00002.safetensors does not exist": _shard_gone,
    "expected names of files beside it, got '../secret.safetensors'": _shard_outside,
    "torch": _torch_alone,
    "no weights": lambda path: (path / "model.safetensors").unlink(),
    "config.json: missing": lambda path: (path / "config.json").unlink(),
    "config.json: not valid JSON": lambda path: (path / "config.json").write_text("{"),
    "unknown architecture 'LlamaForCausalM': did you mean 'LlamaForCausalLM'": lambda path: (
        path / "config.json"
    ).write_text(json.dumps({**CONFIG, "architectures": ["LlamaForCausalM"]})),
    "no such file or folder": lambda path: path.rename(path.with_name("elsewhere")),
}


@pytest.mark.parametrize("told", BROKEN)
def test_broken_folders_are_told_in_one_line(tmp_path, told: str) -> None:
    path = folder(tmp_path / "model")
    BROKEN[told](path)
    with pytest.raises(UserError) as error:
        inspection.inspect(path)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_a_cut_npz_is_told(tmp_path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros(1000))
    data = (tmp_path / "a.npz").read_bytes()
    for size in (0, 100, len(data) - 30):
        (tmp_path / "a.npz").write_bytes(data[:size])
        with pytest.raises(UserError, match=r"a\.npz: not a readable \.npz"):
            tensor_files.open_weights(tmp_path / "a.npz")


@pytest.mark.parametrize("header", ["{'descr': (", "{'descr': [[]], 'shape': 1}", "(" * 9000, "{" + "1:" * 50])
def test_an_npz_with_a_strange_header_is_told(tmp_path, header: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode())
    with pytest.raises(UserError, match=r"a\.npz: not a readable \.npz"):
        tensor_files.open_weights(tmp_path / "a.npz")


def test_no_tensor_is_read_before_it_is_wanted(tmp_path, monkeypatch) -> None:
    """Opening and checking look at headers alone."""
    path = folder(tmp_path)
    monkeypatch.setattr(np, "memmap", None)
    there = inspection.inspect(path)
    assert inspection.size_bytes(there) == sum(
        math.prod(shape) * 4 for shape in tensor_tables.expected([TABLE]).values()
    )


@pytest.mark.parametrize("strategy", ["replicated", "fsdp_tensor"])
def test_unrolled_layers_are_the_rows_of_the_stack(tmp_path, strategy: str) -> None:
    there = inspection.inspect(folder(tmp_path))
    plan = partitioning.make_plan(builders.compute(strategy=strategy, mesh=(2, 2, 2)))
    unrolled = inspection.load_parts(there, plan=plan, scan_layers=False)["decoder"]
    wanted = unstack_layers(inspection.load_parts(there)["decoder"], SPEC.depth)
    assert tree.sha256(unrolled) == tree.sha256(wanted)
    assert jax.tree.structure(unrolled) == jax.tree.structure(wanted)
    shards = jax.tree.map(lambda leaf: leaf.sharding, unrolled)
    assert tree.flatten(shards) == tree.flatten(plan.shardings(inspection.boxed(there, "decoder", scan_layers=False)))


def test_layers_stacked_in_the_file_are_read_one_by_one(tmp_path) -> None:
    """Keys and values of two layers, fused and stacked in one tensor, come out layer by layer."""
    fused = np.arange(2 * 2 * 3 * 4, dtype=np.float32).reshape(2, 2, 3, 4)
    np.savez(tmp_path / "fused.npz", kv=fused)
    table = {
        f"blocks/{n}": tensor_tables.Leaf("kv", fused.shape, (2, 3, 4), (0, 2, 1), part=(1, k, 2))
        for k, n in enumerate("kv")
    }
    box = nn.LogicallyPartitioned(jax.ShapeDtypeStruct((4, 3), "float32"), ("embed", "mlp"))
    table, boxed = inspection.unstack_table(table, 2), {f"blocks_{i}": {"k": box, "v": box} for i in range(2)}
    params = tensor_tables.load_params(tensor_files.open_weights(tmp_path / "fused.npz"), table, boxed, None)
    np.testing.assert_array_equal(params["blocks_1"]["v"], fused[1, 1].T)
    np.testing.assert_array_equal(params["blocks_0"]["k"], fused[0, 0].T)
