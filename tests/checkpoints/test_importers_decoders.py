"""Decoders of Hugging Face folders: what transformers computes with the same weights, and every field accounted for."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests import builders
from tests.golden import peers_decoders as peers
from tests.golden.drawn import weights
from vlm_jax.checkpoints import inspection
from vlm_jax.checkpoints.huggingface import hf_decoder
from vlm_jax.checkpoints.huggingface.hf_config import FAMILIES
from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import DecoderSpec
from vlm_jax.core.structs import AttentionMetadata
from vlm_jax.models.cache import init_cache
from vlm_jax.models.decoder import Decoder
from vlm_jax.sizing import zoo

CASES = peers.read()


def folder(path, case: peers.Case):
    """A checkpoint as transformers writes it."""
    path.mkdir()
    save_file(weights(case.shapes), path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(case.config))
    return path


@functools.cache
def program(spec):
    """(logits of every position, greedy text behind left-padded prompts), with our decoder."""
    compute = builders.compute(scan_layers=False)
    module = Decoder(spec, compute)
    (tokens, real), (left, left_real) = (map(jnp.asarray, rows) for rows in (peers.prompts(), peers.left_padded()))
    length = left.shape[1]

    def step(params, token, place, cache):
        x = module.apply(params, token, method="embed")
        x, cache = module.apply(params, x, place, cache, method="hidden")
        return jnp.argmax(module.apply(params, x[:, -1:], method="logits"), -1), cache

    def run(params):
        logits = module.apply(params, tokens, builders.causal(real))
        cache = init_cache(spec, compute, left.shape[0], length + peers.NEW_TOKENS)
        token, cache = step(params, left, builders.causal(left_real), cache)
        first = left_real.sum(1)

        def decode_step(carry, offset):
            token, cache = carry
            at = (first + offset)[:, None]
            following, cache = step(params, token, AttentionMetadata(jnp.ones_like(at), at, at), cache)
            return (following, cache), following[:, 0]

        _, rest = jax.lax.scan(decode_step, (token, cache), jnp.arange(peers.NEW_TOKENS - 1))
        return logits, jnp.concatenate([token, rest.T], axis=1)

    return jax.jit(run)


@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_text_are_those_of_transformers(name: str, tmp_path) -> None:
    """Grouped heads, head_dim apart from width, rows longer than a window, padding on either side."""
    case = CASES[name]
    loaded = inspection.inspect(folder(tmp_path / name, case))
    params = {"params": inspection.load_parts(loaded, scan_layers=False)["decoder"]}
    logits, greedy = program(loaded.decoder)(params)
    miss = np.abs(np.asarray(logits) * peers.prompts()[1][..., None] - case.logits).max()
    assert miss <= 1e-4 * case.logits.std()
    np.testing.assert_array_equal(greedy, case.greedy)


@pytest.mark.parametrize("root", ["language_model.model.", "model.language_model."])
def test_the_text_part_of_a_whole_gemma3_is_the_references(root: str, tmp_path) -> None:
    """Beside its tower, under both names that transformers has given it."""
    case = CASES["gemma3"]
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": case.config}
    path = folder(tmp_path / "whole", case._replace(config=config))
    tensors = {root + name.removeprefix("model."): leaf for name, leaf in weights(case.shapes).items()}
    tower = {root.partition("language_model.")[0] + "vision_tower.x": np.ones(3, np.float32)}
    save_file({**tensors, **tower}, path / "model.safetensors")
    loaded = inspection.inspect(path)
    logits, greedy = program(loaded.decoder)({"params": inspection.load_parts(loaded, scan_layers=False)["decoder"]})
    miss = np.abs(np.asarray(logits) * peers.prompts()[1][..., None] - case.logits).max()
    assert miss <= 1e-4 * case.logits.std()
    np.testing.assert_array_equal(greedy, case.greedy)


PUBLISHED = json.loads((Path(__file__).parents[1] / "golden" / "published_configs.json").read_text())


@pytest.mark.parametrize("name", [name for name in PUBLISHED if PUBLISHED[name]["model_type"] in FAMILIES])
def test_published_configurations_are_the_models_of_the_zoo(name: str) -> None:
    """As the files stand, in the styles of transformers 4 and 5; the zoo was written from the reports."""
    spec = hf_decoder.decoder_spec(PUBLISHED[name], "there/config.json")
    assert spec.context == PUBLISHED[name].get("max_position_embeddings", 131072)
    known = name.partition("/")[0]
    if known.startswith("mistral"):
        wanted = DecoderSpec(
            known, 4096, 32, 32, 8, 128, 14336, spec.vocab, tied_head=False, norm_eps=1e-5,
            rope_theta=1e4 if known.endswith("1") else 1e6, window=4096 if known.endswith("1") else None,
        )  # fmt: skip
    else:
        wanted = zoo.decoder(known)
    assert dataclasses.replace(spec, name="", context=0) == dataclasses.replace(wanted, name="", context=0)


REFUSED = {
    "attention_bias": ("llama3.1-8b", {"attention_bias": True}),
    "hidden_activation='gelu' is not": ("gemma-2b", {"hidden_act": "gelu", "hidden_activation": "gelu"}),
    "use_sliding_window=True": ("llama3.1-8b", {"use_sliding_window": True}),
    "mlp_bias": ("llama3.1-8b", {"mlp_bias": True}),
    "hidden_act": ("llama3.1-8b", {"hidden_act": "relu"}),
    "rope_type='longrope'": ("qwen2.5-7b", {"rope_scaling": {"type": "longrope", "factor": 4.0}}),
    "rope_type='yarn'": ("gemma3-1b", {"rope_scaling": {"type": "yarn", "factor": 4.0}}),
    "supported for Gemma 2": ("gemma2-9b", {"rope_scaling": {"type": "yarn", "factor": 4.0}}),
    "factor is missing": ("qwen2.5-7b", {"rope_scaling": {"type": "yarn"}}),
    "beta_fast must be larger": ("qwen2.5-7b", {"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_slow": 32}}),
    "truncate=1": ("qwen2.5-7b", {"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": 1}}),
    "rope_theta=1.0": ("qwen2.5-7b", {"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_theta": 1.0}),
    "rope_type='dynamic'": ("vicuna-7b", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    "low_freq_factor is missing": ("llama3.1-8b", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}),
    "mrope_section": ("qwen2.5-7b", {"rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}}),
    "partial_rotary_factor": ("llama3.1-8b", {"partial_rotary_factor": 0.5}),
    "rope_interleaved": ("smollm2-135m", {"rope_interleaved": True}),
    "max_window_layers": ("qwen2.5-7b", {"use_sliding_window": True, "max_window_layers": 14}),
    "layer_types": ("qwen3-8b", {"use_sliding_window": True, "sliding_window": 64, "layer_types": ["full_attention"]}),
    "use_bidirectional_attention": ("gemma3-1b", {"use_bidirectional_attention": True}),
    "attn_logit_softcapping": ("gemma3-1b", {"attn_logit_softcapping": 50.0}),
    "quantization_config": ("vicuna-7b", {"quantization_config": {"bits": 4}}),
    "residual_multiplier": ("llama3.1-8b", {"residual_multiplier": 0.2}),
    "num_key_value_heads=5": ("llama3.1-8b", {"num_key_value_heads": 5}),
    "hidden_size='4096'": ("llama3.1-8b", {"hidden_size": "4096"}),
    "tie_word_embeddings='false'": ("llama3.1-8b", {"tie_word_embeddings": "false"}),
    "rope_theta belongs in one": ("gemma3-1b", {"rope_parameters": {"rope_theta": 1e6}}),
    "expected rope_type='default'": (
        "gemma3-1b",
        {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
    ),
    "rope_parameters={'full_attention'": ("gemma3-1b", {"rope_parameters": {"full_attention": "x"}}),
    "rope_parameters={'sliding_attention'": ("llama3.1-8b", {"rope_parameters": {"sliding_attention": [1]}}),
    "high_freq_factor must be larger": (
        "llama3.1-8b",
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4, "high_freq_factor": 4}},
    ),
    "max_position_embeddings=0": ("llama3.1-8b", {"max_position_embeddings": 0}),
    "clip_qkv=8": ("llama3.1-8b", {"clip_qkv": 8}),
    "alibi=True": ("llama3.1-8b", {"alibi": True}),
    "position_embedding_type='alibi'": ("llama3.1-8b", {"position_embedding_type": "alibi"}),
    "is_causal=False": ("llama3.1-8b", {"is_causal": False}),
    "use_qk_norm=False": ("qwen3-8b", {"use_qk_norm": False}),
    "output_multiplier=0.5": ("llama3.1-8b", {"output_multiplier": 0.5}),
    "a_new_scale=0": ("llama3.1-8b", {"a_new_scale": 0}),
    "model_type": ("llama3.1-8b", {"model_type": "qwen3_moe"}),
}


@pytest.mark.parametrize("told", REFUSED)
def test_a_field_that_changes_the_mathematics_is_refused_by_name(told: str) -> None:
    name, change = REFUSED[told]
    with pytest.raises(UserError, match=re.escape(told)) as error:
        hf_decoder.decoder_spec({**PUBLISHED[name], **change}, "there/config.json")
    assert str(error.value).startswith("there/config.json")


@pytest.mark.parametrize(
    ("told", "change"),
    {
        "quantization_config": {"quantization_config": {"bits": 4}},
        "mm_norm=True": {"mm_norm": True},
        "tie_word_embeddings=False": {"tie_word_embeddings": False},
        "text_config=[1]": {"text_config": [1]},
        "text_config=None": {"text_config": None},
        "only 93 tensors": {"text_config": {"num_hidden_layers": 10**7}},
    }.items(),
)
def test_the_whole_around_a_language_model_is_looked_at_too(told: str, change: dict, tmp_path) -> None:
    case = CASES["gemma3"]
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": case.config}
    config |= {"boi_token_index": 1, "mm_tokens_per_image": 4, "initializer_range": 0.02, "vision_config": {}}
    path = folder(tmp_path / "model", case._replace(config=config))
    assert inspection.inspect(path).decoder.depth == case.config["num_hidden_layers"]
    (path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=re.escape(told)):
        inspection.inspect(path)


def test_a_second_head_of_a_tied_model_is_the_embedding_or_refused(tmp_path) -> None:
    """Files that torch wrote may hold it twice; transformers takes one that differs for a head of its own."""
    case = CASES["qwen3"]
    path, tensors = folder(tmp_path / "model", case), weights(case.shapes)
    head = tensors["model.embed_tokens.weight"].copy()
    save_file({**tensors, "lm_head.weight": head}, path / "model.safetensors")
    inspection.load_parts(inspection.inspect(path), ["decoder"])
    head[-1, -1] += 1
    save_file({**tensors, "lm_head.weight": head}, path / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head\.weight is not model\.embed_tokens\.weight.*tie_word_embeddings"):
        inspection.load_parts(inspection.inspect(path), ["decoder"])
    (path / "config.json").write_text(json.dumps({**case.config, "tie_word_embeddings": False}))
    held = inspection.load_parts(inspection.inspect(path), ["decoder"])["decoder"]
    np.testing.assert_array_equal(held["head"]["kernel"], head.T)


def test_a_window_that_transformers_uses_whatever_a_file_says_beside() -> None:
    """`use_sliding_window` is a field of Qwen's classes alone."""
    for name in ("mistral-7b-v0.1", "gemma2-9b"):
        for use in (True, False):
            spec = hf_decoder.decoder_spec({**PUBLISHED[name], "use_sliding_window": use}, "x")
            assert spec.window == 4096


@pytest.mark.parametrize(
    ("says", "activation"),
    [
        ({"hidden_act": "gelu"}, "gelu_tanh"),
        ({"hidden_act": "gelu", "hidden_activation": None}, "gelu_tanh"),
        ({"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"}, "gelu_tanh"),
        ({"hidden_act": "silu", "hidden_activation": None}, "silu"),
    ],
)
def test_what_gemma_calls_gelu(says: dict, activation: str) -> None:
    """Its tanh form, in the files of the first Gemma and in later ones."""
    assert hf_decoder.decoder_spec({**PUBLISHED["gemma-2b"], **says}, "x").activation == activation


def test_fields_that_nobody_computes_with_are_passed_over() -> None:
    config = {**PUBLISHED["vicuna-7b"], "mm_vision_tower": "clip", "max_length": 20, "unsloth_fixed": True}
    config |= {"auto_map": {"a": "b"}, "cls_token_id": 3, "resid_pdrop": 0.1, "is_causal": True, "unheard_of": False}
    config |= {"position_embedding_type": None, "another": {}, "mrope": "", "output_router_logits": True}
    assert hf_decoder.decoder_spec(config, "x") == hf_decoder.decoder_spec(PUBLISHED["vicuna-7b"], "x")


@pytest.mark.parametrize("name", list(zoo.DECODERS))
def test_every_decoder_of_the_zoo_can_be_written_as_a_configuration(name: str) -> None:
    spec = zoo.decoder(name)
    config = json.loads(json.dumps(hf_decoder.hf_config(spec)))
    again = hf_decoder.decoder_spec(config, "x")
    assert again.query_scale == pytest.approx(spec.query_scale or again.query_scale)
    same = {"name": "", "context": 0, "query_scale": None}
    assert dataclasses.replace(again, **same) == dataclasses.replace(spec, **same)


@pytest.mark.parametrize(
    "group",
    [{}, {"attention_factor": 1.25}, {"mscale": 1.0, "mscale_all_dim": 0.5}, {"beta_fast": 16, "truncate": False}],
)
@pytest.mark.parametrize("name", ["qwen2.5-7b", "qwen3-8b", "gemma-2b"])
def test_a_context_that_yarn_stretches_is_read_and_written(name: str, group: dict) -> None:
    """As Qwen's pages tell to switch it on; max_position_embeddings may say what the model had without."""
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, **group}
    spec = hf_decoder.decoder_spec({**PUBLISHED[name], "rope_scaling": yarn}, "x")
    assert spec.context == 131072
    config = json.loads(json.dumps(hf_decoder.hf_config(spec)))
    again = hf_decoder.decoder_spec(config, "x")
    assert again.query_scale == pytest.approx(spec.query_scale, rel=1e-12)
    assert dataclasses.replace(again, query_scale=spec.query_scale) == spec
    assert ("attention_factor" in config["rope_scaling"]) == (group != {} and "truncate" not in group)


def test_what_no_architecture_has_is_named() -> None:
    spec = dataclasses.replace(zoo.decoder("llama2-7b"), logit_softcap=30.0)
    with pytest.raises(UserError, match=r"logit_softcap=30\.0"):
        hf_decoder.hf_config(spec)
