"""Beside transformers itself, where it is installed: `pytest -m parity`. Elsewhere the golden file stands for it."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.checkpoints.test_importers_decoders import program
from tests.golden import peers_decoders as peers
from tests.golden.drawn import redrawn, weights
from tests.parity import MARKS, with_transformers
from vlm_jax import export
from vlm_jax.checkpoints import inspection
from vlm_jax.checkpoints.huggingface import hf_config
from vlm_jax.checkpoints.huggingface.fields import harmless
from vlm_jax.checkpoints.tensor_files import open_weights
from vlm_jax.core.errors import UserError

pytestmark = [*MARKS, with_transformers]
CASES = peers.read()


@pytest.mark.parametrize("name", peers.MODELS)
def test_the_golden_file_is_what_transformers_computes(name: str) -> None:
    case = peers.build(name)
    assert case.shapes == CASES[name].shapes
    np.testing.assert_allclose(case.logits, CASES[name].logits, atol=1e-5)
    np.testing.assert_array_equal(case.greedy, CASES[name].greedy)


@pytest.mark.parametrize("name", peers.MODELS)
def test_transformers_computes_the_same_from_what_we_export(name: str, tmp_path) -> None:
    """From our config.json and our shards, bit for bit."""
    import torch
    from safetensors.numpy import save_file
    from transformers import AutoModelForCausalLM

    case, source = CASES[name], tmp_path / "in"
    source.mkdir()
    save_file(weights(case.shapes), source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(case.config))
    export.main(["--model", str(source), "--out", str(tmp_path / "out"), "--max-shard-gb", "2e-5"])
    models = [
        AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32)
        for path in (source, tmp_path / "out")
    ]
    for ours, theirs in zip(*(peers.ask(model.eval()) for model in models), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_text_part_of_a_whole_gemma3_is_what_transformers_computes(tmp_path) -> None:
    """Of a folder that it wrote, with an image tower beside."""
    import transformers

    text = {name: value for name, value in CASES["gemma3"].config.items() if name != "architectures"}
    vision = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8)
    vision = transformers.SiglipVisionConfig(**vision, patch_size=4)
    text = transformers.Gemma3TextConfig(**text)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
    model = transformers.Gemma3ForConditionalGeneration(config)
    logits, greedy = peers.ask(redrawn(model, tmp_path, attn_implementation="eager")[0])
    loaded = inspection.inspect(tmp_path)
    ours, said = program(loaded.decoder)({"params": inspection.load_parts(loaded, scan_layers=False)["decoder"]})
    miss = np.abs(np.asarray(ours) * peers.prompts()[1][..., None] - logits).max()
    assert miss <= 1e-4 * logits.std()
    np.testing.assert_array_equal(said, greedy)


@pytest.mark.parametrize("kind", hf_config.FAMILIES)
def test_every_field_of_the_configuration_class_is_accounted_for(kind: str) -> None:
    """Read, fixed to one value, or known to be harmless; and its default is the one that we take."""
    from transformers import CONFIG_MAPPING

    fields = CONFIG_MAPPING[kind]().to_dict()
    known = {*hf_config.FAMILIES[kind].defaults, *hf_config.READ, *hf_config.FIXED}
    assert all(name in known or harmless(name) for name in fields)
    for name, value in hf_config.FAMILIES[kind].defaults.items():
        # Qwen's class empties its window when that is switched off; Gemma 2 and 3 have a field of their own.
        if value is not None and name != "sliding_window" and name in fields:
            assert fields[name] == value, name


def test_torch_files_hold_the_same_tensors(tmp_path) -> None:
    """Half of them in bfloat16, which numpy does not know of itself."""
    import torch

    arrays = weights(CASES["qwen2"].shapes)
    kinds = [torch.float32, torch.bfloat16]
    state = {name: torch.from_numpy(array).to(kinds[i % 2]) for i, (name, array) in enumerate(arrays.items())}
    torch.save(state, tmp_path / "pytorch_model.bin")
    there = open_weights(tmp_path)
    assert {name: list(shape) for name, (shape, _) in there.shapes.items()} == CASES["qwen2"].shapes
    for name, tensor in state.items():
        np.testing.assert_array_equal(there.read(name).astype(np.float32), tensor.float().numpy())


def test_torch_files_from_before_archives_are_read(tmp_path) -> None:
    import torch

    state = {"state_dict": {"x": torch.arange(6.0).reshape(2, 3).to(torch.bfloat16)}, "epoch": 3}
    torch.save(state, tmp_path / "a.bin", _use_new_zipfile_serialization=False)
    there = open_weights(tmp_path / "a.bin")
    np.testing.assert_array_equal(there.read("x").astype(np.float32), np.arange(6.0).reshape(2, 3))


@pytest.mark.parametrize("archive", [True, False])
def test_torch_files_that_are_no_plain_weights_are_told(tmp_path, archive: bool) -> None:
    """In words of our own: torch's advice to run what is in them."""
    import torch

    one = torch.ones(2, 2)
    for told, content in {
        "got Tensor": one,
        "got list": [one],
        "got NoneType": {"state_dict": None},
        "the key 3": {3: one},
        "x: .* got a torch.sparse_coo tensor": {"x": one.to_sparse()},
        "x: .* got a torch.strided tensor of torch.complex64": {"x": one.to(torch.complex64)},
        "objects that would have to run code": {"x": Path("a")},
    }.items():
        torch.save(content, tmp_path / "a.bin", _use_new_zipfile_serialization=archive)
        with pytest.raises(UserError, match=told) as error:
            open_weights(tmp_path / "a.bin")
        assert "weights_only" not in str(error.value)
        assert "\n" not in str(error.value)
