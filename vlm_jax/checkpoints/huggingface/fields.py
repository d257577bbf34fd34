"""Fields of a config.json: each is read, has a supported value, is harmless, or raises an error with its name."""

import re
import reprlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from vlm_jax.core import reading
from vlm_jax.core.errors import UserError

Fixed = Mapping[str, tuple[Any, ...]]  # field -> its supported values
_MAX = 1e30  # of a number

# Fields that no output of a forward pass depends on: bookkeeping, training, file names, and generation (older files).
HARMLESS = {
    "architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "use_cache", "pretraining_tp",
    "_name_or_path", "name_or_path", "_commit_hash", "_from_model_config", "auto_map", "custom_pipelines", "revision",
    "cache_implementation", "_attn_implementation", "attn_implementation", "_attn_implementation_autoset",
    "_attn_implementation_internal", "_flash_attn_2_enabled", "use_flash_attention", "use_flash_attention_2",
    "use_flash_attn", "_output_attentions", "cross_attention_hidden_size", "return_dict", "return_dict_in_generate",
    "return_loss", "id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params",
    "chunk_size_feed_forward", "is_decoder", "tokenizer_class", "tokenizer_model_max_length", "model_max_length",
    "tokenizer_padding_side", "padding_side", "prefix", "bos_token", "eos_token", "pad_token", "add_bos_token",
    "add_eos_token", "gradient_checkpointing", "use_reentrant", "experts_implementation", "_experts_implementation",
    "_experts_implementation_internal", "_sliding_window_pattern", "sliding_window_size", "torchscript",
    "use_bfloat16", "tf_legacy_loss", "tie_encoder_decoder", "is_llama_config", "transformers.js_config",
    "max_sequence_length", "max_seq_len", "max_seq_length", "seq_length", "_vocab_size", "ignore_index",
    "num_logits_to_keep", "mm_vision_tower", "neftune_noise_alpha", "z_loss_coefficient", "generation_config",
    "unsloth_fixed", "unsloth_version", "num_image_tokens", "library_name", "license", "model_name", "tags",
    # Fields of generation_config.json in older files.
    "max_length", "max_new_tokens", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
    "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty",
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences",
    "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
}  # fmt: skip
_HARMLESS_KINDS = re.compile(
    r"\w+_token_ids?|\w+_token_index|initializer_\w+|(\w+_)?dropout(_\w+)?|\w+_pdrop|drop_path(_rate)?|"
    r"output_(attentions|hidden_states|scores|logits|router_logits|past)"
)


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, None where there is no such file. Raises `UserError` for anything else."""
    return reading.read_object(path) if reading.kind(path) else None


def config_path(path: Path) -> Path:
    """config.json of a folder, or beside a file."""
    return (path if path.is_dir() else path.parent) / "config.json"


def harmless(name: str) -> bool:
    """Whether no output of a forward pass depends on the field."""
    return name in HARMLESS or _HARMLESS_KINDS.fullmatch(name) is not None


def check(config: Mapping[str, Any], where: str, read: Collection[str], fixed: Fixed) -> None:
    """Raises `UserError` for a field that is neither read nor harmless nor has a value of `fixed`. An unknown field may
    be empty, null or false.
    """
    for name, value in config.items():
        if name in read:
            continue
        if name in fixed:
            if value is not None and value not in fixed[name]:
                reason = " (the weights are quantised)" if name == "quantization_config" else ""
                raise UserError(
                    f"{where}: {name}={reprlib.repr(value)} is not supported{reason}: expected {fixed[name][0]!r}"
                )
        elif not harmless(name) and not (value is None or value is False or value in ("", [], {})):
            raise UserError(f"{where}: unknown field {name}={reprlib.repr(value)}, which may change the outputs")


def check_depth(config: Mapping[str, Any], tensors: int, where: str) -> None:
    """Raises `UserError` for more layers than tensors, before a table of that size is built."""
    for part in (config, config.get("text_config"), config.get("vision_config")):
        depth = part.get("num_hidden_layers") if isinstance(part, Mapping) else None
        if isinstance(depth, int | float) and depth > tensors:
            raise UserError(f"{where}: num_hidden_layers={depth}, but there are only {tensors} tensors")


def number(config: Mapping[str, Any], name: str, where: str, kind: type = int) -> Any:
    """A positive `int` or `float`. Raises `UserError` with the field's name."""
    value = config[name]
    fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < _MAX
    if not fits or (kind is int and value != int(value)):
        raise UserError(f"{where}: {name}={value!r}: expected a positive {'number' if kind is float else 'integer'}")
    return kind(value)


def flag(config: Mapping[str, Any], name: str, where: str) -> bool:
    """True or false. Raises `UserError` with the field's name."""
    if not isinstance(config[name], bool):
        raise UserError(f"{where}: {name}={config[name]!r}: expected true or false")
    return config[name]
