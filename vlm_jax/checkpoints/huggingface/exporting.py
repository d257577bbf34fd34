"""Exports a model as a folder that transformers loads (config.json, safetensors, the processor's and tokenizer's files)
or as a big_vision `.npz`.

A model that no class of transformers computes is rejected before anything is written; folders are written atomically.
"""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from vlm_jax.checkpoints import big_vision
from vlm_jax.checkpoints.huggingface import hf_decoder, hf_encoder, hf_vlm, processors
from vlm_jax.checkpoints.huggingface.fields import read_json
from vlm_jax.checkpoints.tensor_tables import MAX_SHARD_BYTES, OnTensor, TensorTable, noop, save_params, tensors
from vlm_jax.core import reading, tree
from vlm_jax.core.errors import UserError
from vlm_jax.core.files import atomic_write
from vlm_jax.core.specs import ModelSpec

# Files of the tokenizer, generation and image processor, which are copied.
_COMPANIONS = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "generation_config.json", "chat_template.json", "chat_template.jinja",
    "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
_MAX_COMPANION = 2**28  # bytes; tokenizers have some ten million
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def layout(spec: ModelSpec, image_token: int | None = None) -> tuple[dict[str, Any], dict[str, TensorTable]]:
    """(config.json, table of every part) of a whole model, a language model (no encoder) or a vision tower. Raises
    `UserError` for a model that no class of transformers computes.
    """
    if spec.encoder is None:
        return hf_decoder.hf_config(spec.decoder), {"decoder": hf_decoder.decoder_table(spec.decoder)}
    if spec.decoder is None:
        config = hf_encoder.encoder_config(spec.encoder)
        kind = "CLIPVisionModel" if spec.encoder.class_token else "SiglipVisionModel"
        return {"architectures": [kind], **config}, {"encoder": hf_encoder.encoder_table(spec.encoder, "vision_model.")}
    return hf_vlm.export_config(spec, image_token), hf_vlm.export_tables(spec)


def part_of(spec: ModelSpec, part: str) -> ModelSpec:
    """The spec of one part: "whole", "decoder" or "encoder"."""
    if part != "whole" and getattr(spec, part) is None:
        raise UserError(f"the model has no {part}")
    removed = {"whole": {}, "decoder": {"encoder": None}, "encoder": {"decoder": None}}[part]
    return dataclasses.replace(spec, **removed)


def save_folder(
    out: Path,
    spec: ModelSpec,
    params: Mapping[str, Any],
    image_token: int | None = None,
    source: Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_tensor: OnTensor = noop,
) -> None:
    """Writes the parts that `spec` has, in the dtype of their parameters.

    Args:
        source: a Hugging Face folder whose tokenizer and special token ids are copied.

    Raises `UserError` where `out` is not empty, or for a model that no class of transformers computes.
    """
    config, tables = layout(spec, image_token)
    check_vacant(out)
    parts = [(params[part], table) for part, table in tables.items()]
    if spec.encoder is not None and spec.encoder.feature_layer:
        parts.append(hf_encoder.identity_norm(tables["encoder"], params["encoder"]["position"]))
    kinds = {str(jnp.dtype(leaf.dtype)) for part, _ in parts for leaf in tree.flatten(part).values()}
    config["torch_dtype"] = kinds.pop() if len(kinds) == 1 else "float32"
    try:
        with atomic_write(out) as folder:
            folder.mkdir(parents=True)
            save_params(folder, parts, max_shard_bytes, on_tensor)
            if source is not None:
                config |= _companions(source, folder)
            if spec.encoder is not None and not any((folder / name).exists() for name in processors.NAMES):
                processor = processors.processor_config(spec.encoder)
                (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    except OSError as error:
        raise _cannot_write(out, error) from error


def _cannot_write(out: Path, error: OSError) -> UserError:
    return UserError(f"{out}: cannot be written ({error.strerror})")


def _companions(source: Path, out: Path) -> dict[str, Any]:
    """Copies the tokenizer's and processor's files; returns the special token ids of config.json."""
    config = read_json(source / "config.json") or {}
    text = config.get("text_config")
    config = {**(text if isinstance(text, dict) else {}), **config}
    for name in _COMPANIONS:
        if reading.kind(source / name):
            _check_inside(source / name)
            with reading.open_regular(source / name, _MAX_COMPANION) as file, (out / name).open("wb") as copy:
                shutil.copyfileobj(file, copy)
    return {name: config[name] for name in _TOKEN_IDS if name in config}


def _check_inside(path: Path) -> None:
    """Raises `UserError` for a link out of the folder (or, in the Hub's cache of a model, out of that cache): what it
    points to is not the model's to give away."""
    folder, target = path.parent.resolve(), path.resolve()
    cache = folder.parent.parent if folder.parent.name == "snapshots" else folder
    if not target.is_relative_to(cache):
        raise UserError(f"{path}: a link out of its folder, to {target}, which is not copied (remove the link)")


def save_npz(out: Path, spec: ModelSpec, params: Mapping[str, Any]) -> None:
    """Writes the vision tower, or a whole PaliGemma, as a big_vision checkpoint."""
    tables = big_vision.export_tables(spec)
    check_vacant(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        big_vision.write_npz(out, (pair for part, table in tables.items() for pair in tensors(params[part], table)))
    except OSError as error:
        raise _cannot_write(out, error) from error


def check(out: Path, spec: ModelSpec, image_token: int | None) -> None:
    """Raises `UserError` for a model that the format of `out` (a folder, or a `.npz`) cannot hold."""
    if out.suffix == ".npz":
        big_vision.export_tables(spec)
    else:
        layout(spec, image_token)


def check_vacant(out: Path) -> None:
    """Raises `UserError` where `out` is a file, a link or a folder that is not empty."""
    if out.is_symlink():
        raise UserError(f"{out}: is a symbolic link (choose a new folder)")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: already exists (choose a new folder)")
