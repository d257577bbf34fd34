"""Hugging Face's decoders: which of their tensors each parameter of `models.decoder` is, and the way back.

Llama 2 and 3, Vicuna, SmolLM2, Mistral, Qwen 1.5 to 3, Gemma 1 to 3 are one table: they differ in which rows it has.
"""

import dataclasses
from typing import Any

import numpy as np

from vlm_jax.checkpoints.huggingface import hf_rope
from vlm_jax.checkpoints.huggingface.hf_config import ACTIVATIONS, FAMILIES, decoder_spec
from vlm_jax.checkpoints.tensor_tables import Leaf, TensorFiles, TensorTable, linear, same
from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import DecoderSpec

__all__ = ["ARCHITECTURES", "decoder_spec", "decoder_table", "hf_config", "ignore", "prefixes"]

ARCHITECTURES = tuple(family.architecture for family in FAMILIES.values())
_EMBEDDING, _HEAD = "embed_tokens.weight", "lm_head.weight"
_ROWS = 4096  # compared at once


def prefixes(weights: TensorFiles) -> tuple[str, str]:
    """What stands before `embed_tokens.weight`, and the whole name of the head: writers of whole models differ in both.

    Raises `UserError` where there is not exactly one embedding table.
    """
    tables = [name for name in weights.shapes if name == _EMBEDDING or name.endswith("." + _EMBEDDING)]
    if len(tables) != 1:
        raise UserError(f"{weights.path}: {len(tables)} tensors are called {_EMBEDDING}; a language model has one")
    heads = [name for name in weights.shapes if name == _HEAD or name.endswith("." + _HEAD)]
    return tables[0].removesuffix(_EMBEDDING), heads[0] if len(heads) == 1 else _HEAD


def decoder_table(spec: DecoderSpec, prefix: str = "model.", head: str = _HEAD) -> TensorTable:
    """Our path in the decoder's parameters -> their tensor."""
    width, inner = (spec.width,), (spec.mlp_width,)
    heads, keys = (spec.heads, spec.head_dim), (spec.kv_heads, spec.head_dim)
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
    for part, hf_name, outputs in (("query", "q", heads), ("key", "k", keys), ("value", "v", keys)):
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
    """Regexes of tensors that writers add and nobody needs: tables of angles, and the copy of a tied head."""
    return (r".*rotary_emb\.inv_freq", *([r"(.*\.)?lm_head\.weight"] if spec.tied_head else []))


def check_tied(weights: TensorFiles, table: TensorTable) -> None:
    """Raises `UserError` where the file of a tied head holds a head beside the embedding, and they are not the same."""
    name = table["embedding"].hf_name
    for head in (one for one in weights.shapes if one == _HEAD or one.endswith("." + _HEAD)):
        embedding, other = weights.read(name), weights.read(head)
        pairs = (
            [a[i : i + _ROWS].astype("float32") for a in (embedding, other)] for i in range(0, len(embedding), _ROWS)
        )
        if embedding.shape != other.shape or not all(np.array_equal(one, other) for one, other in pairs):
            raise UserError(f"{weights.path}: {head} is not {name}, though config.json says tie_word_embeddings=true")


def family_of(spec: DecoderSpec) -> str:
    """The family that a spec's features belong to."""
    if spec.norm_plus_one:
        return "gemma" if not spec.sandwich_norm else "gemma3_text" if spec.qk_norm else "gemma2"
    if spec.qk_norm or spec.qkv_bias:
        return "qwen3" if spec.qk_norm else "qwen2"
    return "llama" if spec.window is None else "mistral"


def hf_config(spec: DecoderSpec) -> dict[str, Any]:
    """The config.json of a decoder, in the style that transformers 4 and 5 both read.

    Raises `UserError` that names the fields for which no architecture here has a place.
    """
    kind = family_of(spec)
    defaults = FAMILIES[kind].defaults
    config: dict[str, Any] = {
        "architectures": [FAMILIES[kind].architecture], "model_type": kind, "vocab_size": spec.vocab,
        "hidden_size": spec.width, "intermediate_size": spec.mlp_width, "num_hidden_layers": spec.depth,
        "num_attention_heads": spec.heads, "num_key_value_heads": spec.kv_heads, "head_dim": spec.head_dim,
        "rms_norm_eps": spec.norm_eps, "tie_word_embeddings": spec.tied_head, "rope_theta": spec.rope_theta,
        "max_position_embeddings": spec.context or defaults["max_position_embeddings"],
        "hidden_act": {part: hf_name for hf_name, part in reversed(ACTIVATIONS.items())}[spec.activation],
    }  # fmt: skip
    config |= hf_rope.scaling(spec, (_scale(spec) * spec.head_dim**0.5) ** 0.5)
    if "sliding_window" in defaults:
        config["sliding_window"] = spec.window
    if "use_sliding_window" in defaults:
        config |= {"use_sliding_window": spec.window is not None, "max_window_layers": 0}
    if "query_pre_attn_scalar" in defaults:
        config["hidden_activation"] = config.pop("hidden_act")
        channels = _scale(spec) ** -2
        config["query_pre_attn_scalar"] = round(channels) if abs(channels - round(channels)) < 1e-6 else channels
        config["final_logit_softcapping"] = spec.logit_softcap
    if kind == "gemma2":
        config["attn_logit_softcapping"] = spec.attention_softcap
    if kind == "gemma3_text":
        config["rope_local_base_freq"] = spec.local_rope_theta or spec.rope_theta
    if "sliding_window" in defaults and kind != "mistral":
        pattern = spec.window_pattern or spec.depth + 1 if spec.window else 1
        names = ("sliding_attention", "full_attention")
        config["layer_types"] = [names[i % pattern == 0] for i in range(1, spec.depth + 1)]
    _check_same(spec, config)
    return config


def _check_same(spec: DecoderSpec, config: dict[str, Any]) -> None:
    """Raises `UserError` unless the config says all that the spec does."""
    again = decoder_spec(config, "config.json")
    free = {"name", "context"} | ({"query_scale"} if abs(_scale(spec) - _scale(again)) < 1e-9 else set())
    free |= {"window_pattern", "local_rope_theta"} if spec.window is None else set()
    fields = [field.name for field in dataclasses.fields(spec) if field.name not in free]
    lost = [name for name in fields if getattr(spec, name) != getattr(again, name)]
    if lost:
        told = ", ".join(f"{name}={getattr(spec, name)}" for name in lost)
        raise UserError(f"decoder {spec.name}: no Hugging Face architecture has {told} beside its other fields")


def _scale(spec: DecoderSpec) -> float:
    return spec.head_dim**-0.5 if spec.query_scale is None else spec.query_scale
