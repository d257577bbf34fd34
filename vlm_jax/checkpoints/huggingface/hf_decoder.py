"""Hugging Face's decoders: the tensor of each parameter of `models.decoder`, and config.json from a `DecoderSpec`.

Llama 2 and 3, Vicuna, SmolLM2, Mistral, Qwen 1.5 to 3, Gemma 1 to 3 share one table and differ in the rows it has.
"""

import dataclasses
from typing import Any

import numpy as np

from vlm_jax.checkpoints.huggingface import hf_rope
from vlm_jax.checkpoints.huggingface.hf_config import ACTIVATIONS, FAMILIES, decoder_spec
from vlm_jax.checkpoints.tensor_files import TensorFiles
from vlm_jax.checkpoints.tensor_tables import Leaf, TensorTable, linear, same
from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import DecoderSpec

ARCHITECTURES = tuple(family.architecture for family in FAMILIES.values())
_EMBEDDING, _HEAD = "embed_tokens.weight", "lm_head.weight"
_ROWS = 4096  # of the embedding, compared at once


def prefixes(weights: TensorFiles) -> tuple[str, str]:
    """The prefix of `embed_tokens.weight` and the name of the head, which depend on the version of transformers. Raises
    `UserError` where there is not exactly one embedding.
    """
    tables = [name for name in weights.shapes if name == _EMBEDDING or name.endswith("." + _EMBEDDING)]
    if len(tables) != 1:
        raise UserError(f"{weights.path}: expected one tensor {_EMBEDDING}, got {len(tables)}")
    heads = [name for name in weights.shapes if name == _HEAD or name.endswith("." + _HEAD)]
    return tables[0].removesuffix(_EMBEDDING), heads[0] if len(heads) == 1 else _HEAD


def decoder_table(spec: DecoderSpec, prefix: str = "model.", head: str = _HEAD) -> TensorTable:
    """Every parameter of `models.decoder.Decoder` under Hugging Face's names."""
    width, inner = (spec.width,), (spec.mlp_width,)
    heads, kv_heads = (spec.heads, spec.head_dim), (spec.kv_heads, spec.head_dim)
    block, blocks = prefix + "layers.{i}.", spec.depth

    def norm(name: str) -> Leaf:
        return same(f"{block}{name}.weight", width, blocks)

    table = {
        "embedding": same(prefix + _EMBEDDING, (spec.vocab, spec.width)),
        "norm/scale": same(prefix + "norm.weight", width),
        "blocks/attention_norm/scale": norm("input_layernorm"),
        "blocks/attention/out/kernel": linear(block + "self_attn.o_proj.weight", heads, width, blocks),
        "blocks/mlp/gate/kernel": linear(block + "mlp.gate_proj.weight", width, inner, blocks),
        "blocks/mlp/up/kernel": linear(block + "mlp.up_proj.weight", width, inner, blocks),
        "blocks/mlp/down/kernel": linear(block + "mlp.down_proj.weight", inner, width, blocks),
    }
    for part, hf_name, outputs in (("query", "q", heads), ("key", "k", kv_heads), ("value", "v", kv_heads)):
        name = f"{block}self_attn.{hf_name}_proj"
        table[f"blocks/attention/{part}/kernel"] = linear(name + ".weight", width, outputs, blocks)
        if spec.qkv_bias:
            flat = (outputs[0] * outputs[1],)
            table[f"blocks/attention/{part}/bias"] = Leaf(name + ".bias", flat, outputs, (0, 1), blocks)
        if spec.qk_norm and part != "value":
            scale = same(f"{block}self_attn.{hf_name}_norm.weight", (spec.head_dim,), blocks)
            table[f"blocks/attention/{part}_norm/scale"] = scale
    if spec.sandwich_norm:
        table["blocks/attention_post_norm/scale"] = norm("post_attention_layernorm")
        table["blocks/mlp_norm/scale"] = norm("pre_feedforward_layernorm")
        table["blocks/mlp_post_norm/scale"] = norm("post_feedforward_layernorm")
    else:
        table["blocks/mlp_norm/scale"] = norm("post_attention_layernorm")
    if not spec.tied_head:
        table["head/kernel"] = linear(head, width, (spec.vocab,))
    return table


def ignore(spec: DecoderSpec) -> tuple[str, ...]:
    """Regexes of tensors that are not read: rotary frequencies, and the copy of a tied head."""
    return (r".*rotary_emb\.inv_freq", *([r"(.*\.)?lm_head\.weight"] if spec.tied_head else []))


def check_tied(weights: TensorFiles, table: TensorTable) -> None:
    """Raises `UserError` where a tied decoder's file has a head that differs from the embedding."""
    name = table["embedding"].hf_name
    for head_name in (one for one in weights.shapes if one == _HEAD or one.endswith("." + _HEAD)):
        embedding, head = weights.read(name), weights.read(head_name)
        slices = [slice(i, i + _ROWS) for i in range(0, len(embedding), _ROWS)]
        if embedding.shape != head.shape or not all(
            np.array_equal(embedding[rows].astype("float32"), head[rows].astype("float32")) for rows in slices
        ):
            raise UserError(f"{weights.path}: {head_name} is not {name}, but config.json has tie_word_embeddings=true")


def family_of(spec: DecoderSpec) -> str:
    """The key of `FAMILIES` for a spec."""
    if spec.norm_plus_one:
        return "gemma" if not spec.sandwich_norm else "gemma3_text" if spec.qk_norm else "gemma2"
    if spec.qk_norm or spec.qkv_bias:
        return "qwen3" if spec.qk_norm else "qwen2"
    return "llama" if spec.window is None else "mistral"


def hf_config(spec: DecoderSpec) -> dict[str, Any]:
    """The config.json of a decoder, for transformers 4 and 5. Raises `UserError` with the fields that no supported
    architecture has.
    """
    kind = family_of(spec)
    defaults = FAMILIES[kind].defaults
    config: dict[str, Any] = {
        "architectures": [FAMILIES[kind].architecture], "model_type": kind, "vocab_size": spec.vocab,
        "hidden_size": spec.width, "intermediate_size": spec.mlp_width, "num_hidden_layers": spec.depth,
        "num_attention_heads": spec.heads, "num_key_value_heads": spec.kv_heads, "head_dim": spec.head_dim,
        "rms_norm_eps": spec.norm_eps, "tie_word_embeddings": spec.tied_head, "rope_theta": spec.rope_theta,
        "max_position_embeddings": spec.context or defaults["max_position_embeddings"],
        "hidden_act": {name: hf_name for hf_name, name in reversed(ACTIVATIONS.items())}[spec.activation],
    }  # fmt: skip
    config |= hf_rope.scaling(spec, (_scale(spec) * spec.head_dim**0.5) ** 0.5)
    if "sliding_window" in defaults:
        config["sliding_window"] = spec.window
    if "use_sliding_window" in defaults:
        config |= {"use_sliding_window": spec.window is not None, "max_window_layers": 0}
    if "query_pre_attn_scalar" in defaults:
        config["hidden_activation"] = config.pop("hidden_act")
        scalar = _scale(spec) ** -2
        config["query_pre_attn_scalar"] = round(scalar) if abs(scalar - round(scalar)) < 1e-6 else scalar
        config["final_logit_softcapping"] = spec.logit_softcap
    if kind == "gemma2":
        config["attn_logit_softcapping"] = spec.attention_softcap
    if kind == "gemma3_text":
        config["rope_local_base_freq"] = spec.local_rope_theta or spec.rope_theta
    if "sliding_window" in defaults and kind != "mistral":
        pattern = spec.window_pattern or spec.depth + 1 if spec.window else 1
        names = ("sliding_attention", "full_attention")
        config["layer_types"] = [names[i % pattern == 0] for i in range(1, spec.depth + 1)]
    _check_round_trip(spec, config)
    return config


def _check_round_trip(spec: DecoderSpec, config: dict[str, Any]) -> None:
    """Raises `UserError` with the fields of the spec that the config does not hold."""
    again = decoder_spec(config, "config.json")
    ignored = {"name", "context"} | ({"query_scale"} if abs(_scale(spec) - _scale(again)) < 1e-9 else set())
    ignored |= {"window_pattern", "local_rope_theta"} if spec.window is None else set()
    before, after = dataclasses.asdict(spec), dataclasses.asdict(again)
    lost = [f"{name}={before[name]}" for name in before if name not in ignored and before[name] != after[name]]
    if lost:
        raise UserError(
            f"decoder {spec.name}: no Hugging Face architecture has {', '.join(lost)} with the other fields"
        )


def _scale(spec: DecoderSpec) -> float:
    return spec.head_dim**-0.5 if spec.query_scale is None else spec.query_scale
