"""What config.json of an image tower or of a whole model says, as published and as refused."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from tests.checkpoints.test_vision_import import write
from vlm_jax.checkpoints.huggingface import hf_encoder, hf_vlm
from vlm_jax.checkpoints.huggingface.hf_config import FAMILIES
from vlm_jax.checkpoints.info import CheckpointInfo
from vlm_jax.checkpoints.inspection import inspect, load_parts, model_spec
from vlm_jax.checkpoints.tensor_files import TensorFiles
from vlm_jax.checkpoints.tensor_tables import expected
from vlm_jax.core.errors import UserError
from vlm_jax.sizing import cost, zoo

PUBLISHED = json.loads((Path(__file__).parents[1] / "golden" / "published_configs.json").read_text())

# Folder of the hub whose config.json stands in the golden file -> tower, language model and published scalars.
TOWERS = {
    "clip-vit-large-patch14": "clip-l14-224",
    "clip-vit-large-patch14/tower": "clip-l14-224",
    "clip-vit-large-patch14-336": "clip-l14-336",
    "siglip-base-patch16-224": "siglip-b16-224",
    "siglip-so400m-patch14-384": "siglip-so400m14-384",
    "siglip2-base-patch16-224": "siglip2-b16-224",
    "siglip2-giant-opt-patch16-384": "siglip2-g16-384",
    "siglip2-so400m-patch14-384": "siglip2-so400m14-384",
}
WHOLE = {
    "llava-1.5-7b-hf": ("clip-l14-336", "llama2-7b", 7_063_427_072),
    "llava-1.5-7b-hf/newer": ("clip-l14-336", "llama2-7b", 7_063_427_072),
    "llava-1.5-7b-hf/tower in full": ("clip-l14-336", "llama2-7b", 7_063_427_072),
    "paligemma-3b-pt-224": ("siglip-so400m14-224", "gemma-2b", 2_923_466_480),
    "paligemma2-3b-pt-224": ("siglip-so400m14-224", "gemma2-2b", 3_032_242_416),
}


def published(path: Path, name: str) -> CheckpointInfo:
    """What a folder with that config.json is; of its tensors there are those alone that prefixes are read from."""
    config = PUBLISHED[name]
    first = ("vision_tower.vision_model.embeddings.patch_embedding.weight", "language_model.model.embed_tokens.weight")
    weights = TensorFiles(path / "model", dict.fromkeys(first, ((1,), np.dtype("float32"))), lambda _: np.zeros(1))
    return hf_vlm.ROWS[config["architectures"][0]](weights, config)


@pytest.mark.parametrize("name", WHOLE)
def test_a_published_model_is_read_with_its_published_size(tmp_path, name: str) -> None:
    tower, llm, scalars = WHOLE[name]
    found = published(tmp_path, name)
    held = sum(int(np.prod(shape)) for shape in expected(found.tables.values()).values())
    behind = dataclasses.replace(found.encoder, feature_layer=0)
    held += cost.encoder_params(behind) - cost.encoder_params(found.encoder)  # LLaVA's last block and norm
    assert held == scalars
    known, decoder = zoo.encoder(tower), zoo.decoder(llm)
    changed = {"name": known.name, "feature_layer": 0, "pooling_head": known.pooling_head}
    assert dataclasses.replace(found.encoder, **changed, interpolation=known.interpolation) == known
    assert dataclasses.replace(found.decoder, name=llm, vocab=decoder.vocab, context=decoder.context) == decoder
    assert (found.encoder.feature_layer, found.mask) == ((23, "causal") if "llava" in name else (0, "prefix"))
    assert found.image_token == (32000 if "llava" in name else 257152)


@pytest.mark.parametrize("name", TOWERS)
def test_a_published_tower_is_the_one_of_the_zoo(tmp_path, name: str) -> None:
    """Old files say every field that any model of transformers has."""
    spec = published(tmp_path, name).encoder
    assert spec.feature_layer == (spec.depth if "clip" in name else 0)
    known = zoo.encoder(TOWERS[name])
    assert spec.interpolation == "bicubic"  # of transformers' processors; big_vision, which SigLIP is from, is bilinear
    assert dataclasses.replace(spec, name=known.name, feature_layer=0, interpolation=known.interpolation) == known


def test_every_published_configuration_is_tested() -> None:
    assert {name for name in PUBLISHED if PUBLISHED[name]["model_type"] not in FAMILIES} == {*TOWERS, *WHOLE}


def test_a_published_configuration_leaves_out_what_is_default(tmp_path) -> None:
    """SigLIP B/16 as it is published, and LLaVA's tower, which is cut behind the last layer that is read."""
    config = {"model_type": "siglip", "vision_config": {"model_type": "siglip_vision_model"}}
    spec = hf_encoder.encoder_spec(hf_encoder.vision_config(config, "x"), "x")
    known = zoo.encoder("siglip-b16-224")
    assert dataclasses.replace(spec, name=known.name, interpolation=known.interpolation) == known
    found = inspect(write(tmp_path, "llava"))
    assert (found.encoder.depth, found.encoder.feature_layer, found.encoder.blocks) == (3, 2, 2)
    assert load_parts(found, ["encoder"])["encoder"]["blocks"]["mlp"]["up"]["bias"].shape == (2, 24)


VISION_TROUBLE = [
    ("siglip_vision", {"hidden_act": "relu"}, "hidden_act 'relu'.*gelu_pytorch_tanh"),
    ("siglip_vision", {"hidden_act": ["gelu"]}, "hidden_act"),
    ("siglip_vision", {"layer_norm_eps": None}, "layer_norm_eps=None"),
    ("siglip_vision", {"qkv_bias": False}, "qkv_bias=False"),
    ("clip_vision", {"attention_bias": False}, "attention_bias=False"),
    ("siglip_vision", {"use_registers": 4}, "use_registers=4"),
    ("siglip_vision", {"num_hidden_layers": 10**7}, "num_hidden_layers=10000000, but"),
    ("clip", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("clip", {"vision_config_dict": {"hidden_size": 99}}, "vision_config_dict"),
    ("llava", {"quantization_config": {"bits": 4}}, "quantization_config.*quantised"),
    ("llava", {"mm_norm": True}, "mm_norm=True"),
    ("llava", {"text_config": None}, "text_config is missing"),
    ("llava", {"text_config": [1]}, "text_config is missing"),
    ("paligemma", {"quantization_config": {"bits": 4}}, "quantization_config.*quantised"),
    ("paligemma", {"projector_hidden_act": "gelu"}, "projector_hidden_act='gelu'"),
    ("siglip_vision", {"num_channels": 4}, "num_channels=4"),
    ("siglip_vision", {"image_size": [18, 20]}, "image_size=.18, 20."),
    ("siglip_vision", {"num_attention_heads": 3}, "num_attention_heads=3"),
    ("siglip_vision", {"rope_theta": 1e4}, "rope_theta"),
    ("siglip_vision", {"architectures": ["Siglip2VisionModel"]}, "Siglip2VisionModel.*did you mean.*SiglipVisionModel"),
    ("siglip_vision", {"hidden_size": 32}, "expected shape"),
    ("siglip_vision", {"num_hidden_layers": 4}, r"encoder\.layers\.3.* is missing"),
    ("siglip_vision", {"num_hidden_layers": 2}, r"encoder\.layers\.2.* is unexpected"),
    ("siglip", {"vision_config": None}, "vision_config is missing"),
    ("llava", {"projector_hidden_act": "silu"}, "projector_hidden_act='silu'"),
    ("llava", {"multimodal_projector_bias": False}, "multimodal_projector_bias"),
    ("llava", {"vision_feature_layer": [-2, -1]}, "vision_feature_layer"),
    ("llava", {"vision_feature_layer": -9}, "vision_feature_layer=-9"),
    ("llava", {"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy='full' keeps"),
    ("llava_siglip", {"vision_feature_select_strategy": "default"}, "drops a patch"),
    ("llava", {"text_config": "llama"}, "text_config is missing"),
    ("llava", {"image_token_index": "<image>"}, "image_token_index='<image>'"),
    ("paligemma", {"projection_dim": 20}, "projection_dim=20"),
]


@pytest.mark.parametrize(("name", "changes", "told"), VISION_TROUBLE)
def test_what_is_not_supported_is_named_in_one_line(tmp_path, name: str, changes: dict, told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        inspect(write(tmp_path, name, **changes))
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_an_archive_without_an_image_tower_is_told(tmp_path) -> None:
    np.savez(tmp_path / "model.npz", **{"params/txt/x": np.zeros(3)})
    with pytest.raises(UserError, match=r"model\.npz: no image tower"):
        inspect(tmp_path / "model.npz")


def test_a_tower_without_a_language_model_is_no_whole_model(tmp_path) -> None:
    with pytest.raises(UserError, match="expected a whole model, got SiglipVisionModel"):
        model_spec(inspect(write(tmp_path, "siglip_vision")))
