"""What config.json of an image tower or of a whole model says, as published and as refused."""

import dataclasses

import numpy as np
import pytest

from tests.models.test_vision_import import write
from vlm_jax.core.errors import UserError
from vlm_jax.models.importers import hf_encoder, hf_vlm
from vlm_jax.models.importers.found import find, found_params, model_spec
from vlm_jax.models.importers.weights import Weights, expected
from vlm_jax.sizing import cost, zoo

# config.json as published (what is at its default is left out there), and the scalars of the published weights.
PUBLISHED = {
    "llava-1.5-7b": (
        {
            "architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100, "image_token_index": 32000,
            "model_type": "llava", "pad_token_id": 32001, "projector_hidden_act": "gelu",
            "text_config": {
                "_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"],
                "max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-05, "torch_dtype": "float16",
                "vocab_size": 32064,
            },
            "tie_word_embeddings": False, "torch_dtype": "float16",
            "vision_config": {
                "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
                "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
                "vocab_size": 32000,
            },
            "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "vocab_size": 32064,
        },
        7_063_427_072, "clip-l14-336", "llama2-7b",
    ),
    "paligemma-3b-224": (
        {
            "architectures": ["PaliGemmaForConditionalGeneration"], "bos_token_id": 2, "eos_token_id": 1,
            "hidden_size": 2048, "ignore_index": -100, "image_token_index": 257152, "model_type": "paligemma",
            "pad_token_id": 0, "projection_dim": 2048,
            "text_config": {
                "hidden_size": 2048, "intermediate_size": 16384, "model_type": "gemma", "num_attention_heads": 8,
                "num_hidden_layers": 18, "num_image_tokens": 256, "num_key_value_heads": 1, "torch_dtype": "float32",
                "vocab_size": 257216,
            },
            "torch_dtype": "float32",
            "vision_config": {
                "hidden_size": 1152, "intermediate_size": 4304, "model_type": "siglip_vision_model",
                "num_attention_heads": 16, "num_hidden_layers": 27, "num_image_tokens": 256, "patch_size": 14,
                "projection_dim": 2048, "projector_hidden_act": "gelu_fast", "vision_use_head": False,
            },
        },
        2_923_466_480, "siglip-so400m14-224", "gemma-2b",
    ),
    "paligemma2-3b-224": (
        {
            "architectures": ["PaliGemmaForConditionalGeneration"], "bos_token_id": 2, "eos_token_id": 1,
            "hidden_size": 2048, "image_token_index": 257152, "model_type": "paligemma", "pad_token_id": 0,
            "num_hidden_layers": 26, "projection_dim": 2304, "torch_dtype": "bfloat16",
            "text_config": {
                "architectures": ["Gemma2ForCausalLM"], "attn_logit_softcapping": 50.0,
                "cache_implementation": "hybrid",
                "eos_token_id": [1, 107], "final_logit_softcapping": 30.0, "hidden_act": "gelu_pytorch_tanh",
                "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304, "intermediate_size": 9216,
                "model_type": "gemma2", "num_hidden_layers": 26, "num_image_tokens": 256, "num_key_value_heads": 4,
                "query_pre_attn_scalar": 256, "sliding_window": 4096, "torch_dtype": "bfloat16", "vocab_size": 257216,
            },
            "vision_config": {
                "hidden_size": 1152, "intermediate_size": 4304, "model_type": "siglip_vision_model",
                "num_attention_heads": 16, "num_hidden_layers": 27, "num_image_tokens": 256, "num_positions": 256,
                "patch_size": 14, "projection_dim": 2304, "torch_dtype": "bfloat16", "vision_use_head": False,
            },
        },
        3_032_242_416, "siglip-so400m14-224", "gemma2-2b",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_is_read_with_its_published_size(tmp_path, name: str) -> None:
    config, scalars, tower, llm = PUBLISHED[name]
    first = ("vision_tower.vision_model.embeddings.patch_embedding.weight", "language_model.model.embed_tokens.weight")
    weights = Weights(tmp_path / name, dict.fromkeys(first, ((1,), np.dtype("float32"))), lambda _: np.zeros(1))
    found = hf_vlm.ROWS[config["architectures"][0]](weights, config)
    held = sum(int(np.prod(shape)) for shape in expected(found.tables.values()).values())
    behind = dataclasses.replace(found.encoder, feature_layer=0)
    held += cost.encoder_params(behind) - cost.encoder_params(found.encoder)  # LLaVA's last block and norm
    assert held == scalars
    known, decoder = zoo.encoder(tower), zoo.decoder(llm)
    changed = {"name": known.name, "feature_layer": 0, "pooling_head": known.pooling_head}
    assert dataclasses.replace(found.encoder, **changed) == known
    assert dataclasses.replace(found.decoder, name=llm, vocab=decoder.vocab, context=decoder.context) == decoder


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (
            {"model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
             "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768},
            "clip-l14-336",
        ),
        (
            {"model_type": "siglip_vision_model", "hidden_size": 1152, "image_size": 384, "intermediate_size": 4304,
             "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14},
            "siglip-so400m14-384",
        ),
        ({"model_type": "siglip_vision_model", "hidden_size": 1536, "image_size": 384, "intermediate_size": 6144,
          "num_attention_heads": 16, "num_hidden_layers": 40, "patch_size": 16}, "siglip2-g16-384"),
    ],
)  # fmt: skip
def test_a_published_tower_is_the_one_of_the_zoo(config: dict, name: str) -> None:
    spec = hf_encoder.encoder_spec(config, "x")
    assert dataclasses.replace(spec, name=name, feature_layer=0) == zoo.encoder(name)


def test_a_published_configuration_leaves_out_what_is_default(tmp_path) -> None:
    """SigLIP B/16 as it is published, and LLaVA's tower, which is cut behind the last layer that is read."""
    config = {"model_type": "siglip", "vision_config": {"model_type": "siglip_vision_model"}}
    spec = hf_encoder.encoder_spec(hf_encoder.vision_config(config, "x"), "x")
    assert dataclasses.replace(spec, name="") == dataclasses.replace(zoo.encoder("siglip-b16-224"), name="")
    found = find(write(tmp_path, "llava"))
    assert (found.encoder.depth, found.encoder.feature_layer, found.encoder.blocks) == (3, 2, 2)
    assert found_params(found, ["encoder"])["encoder"]["blocks"]["mlp"]["up"]["bias"].shape == (2, 24)


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
    ("siglip_vision", {"hidden_size": 32}, "has shape"),
    ("siglip_vision", {"num_hidden_layers": 4}, r"encoder\.layers\.3.* is missing"),
    ("siglip_vision", {"num_hidden_layers": 2}, r"encoder\.layers\.2.* is not known"),
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
        find(write(tmp_path, name, **changes))
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_an_archive_without_an_image_tower_is_told(tmp_path) -> None:
    np.savez(tmp_path / "model.npz", **{"params/txt/x": np.zeros(3)})
    with pytest.raises(UserError, match=r"model\.npz: no image tower"):
        find(tmp_path / "model.npz")


def test_a_tower_without_a_language_model_is_no_whole_model(tmp_path) -> None:
    with pytest.raises(UserError, match="SiglipVisionModel is no whole model: it has encoder"):
        model_spec(find(write(tmp_path, "siglip_vision")))
