"""A model of ours as a folder that transformers loads: config.json, safetensors, how images are prepared, and the
tokenizer's files as given.

What no public class computes is refused before anything is written; a folder appears when it is complete.
"""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from vlm_jax.checkpoints import big_vision
from vlm_jax.checkpoints import tensor_tables as w
from vlm_jax.checkpoints.huggingface import hf_decoder, hf_encoder, hf_vlm, processors
from vlm_jax.checkpoints.inspection import read_config
from vlm_jax.checkpoints.tensor_tables import TensorTable
from vlm_jax.core import tree
from vlm_jax.core.errors import UserError
from vlm_jax.core.files import atomic_write
from vlm_jax.core.specs import ModelSpec

# Files beside the weights that belong to the words and the pictures, not to the parameters.
COMPANIONS = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "generation_config.json", "chat_template.json", "chat_template.jinja",
    "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def layout(spec: ModelSpec, image_token: int | None = None) -> tuple[dict[str, Any], dict[str, TensorTable]]:
    """config.json, and the table of every part. A spec without encoder is a language model, one without decoder a
    tower.

    Raises `UserError` for what no architecture of transformers computes.
    """
    if spec.encoder is None:
        return hf_decoder.hf_config(spec.decoder), {"decoder": hf_decoder.decoder_table(spec.decoder)}
    if spec.decoder is None:
        config = hf_encoder.encoder_config(spec.encoder)
        kind = "CLIPVisionModel" if spec.encoder.class_token else "SiglipVisionModel"
        return {"architectures": [kind], **config}, {"encoder": hf_encoder.encoder_table(spec.encoder, "vision_model.")}
    hf_vlm.export_kind(spec)
    if image_token is None:
        raise UserError("no token of the model's vocabulary stands for an image: export its decoder or encoder alone")
    return hf_vlm.export_config(spec, image_token), hf_vlm.export_tables(spec)


def part_of(spec: ModelSpec, part: str) -> ModelSpec:
    """The spec of one part alone: "whole", "decoder" or "encoder"."""
    if part == "whole":
        return spec
    if getattr(spec, part) is None:
        raise UserError(f"the model has no {part}")
    other = {"decoder": "encoder", "encoder": "decoder"}[part]
    return dataclasses.replace(spec, **{other: None})


def save_folder(
    out: Path,
    spec: ModelSpec,
    params: Mapping[str, Any],
    image_token: int | None = None,
    source: Path | None = None,
    max_shard_bytes: int = w.MAX_SHARD_BYTES,
    wrote: w.OnTensor = w.noop,
) -> None:
    """Writes the parts that `spec` has, in the dtype of their parameters.

    Args:
        source: a Hugging Face folder whose tokenizer, and the ids of its special tokens, go along.

    Raises `UserError` where `out` holds something already, or where no architecture of transformers fits.
    """
    config, tables = layout(spec, image_token)
    check_vacant(out)
    parts = [(params[part], table) for part, table in tables.items()]
    if spec.encoder is not None and spec.encoder.feature_layer:
        parts.append(hf_encoder.idle_norm(tables["encoder"], params["encoder"]["position"]))
    kinds = {str(jnp.dtype(leaf.dtype)) for part, _ in parts for leaf in tree.flatten(part).values()}
    config["torch_dtype"] = kinds.pop() if len(kinds) == 1 else "float32"
    try:
        with atomic_write(out) as folder:
            folder.mkdir(parents=True)
            w.save_params(folder, parts, max_shard_bytes, wrote)
            if source is not None:
                config |= _companions(source, folder)
            if spec.encoder is not None and not any((folder / name).exists() for name in processors.NAMES):
                prepared = processors.processor_config(spec.encoder)
                (folder / "preprocessor_config.json").write_text(json.dumps(prepared, indent=2) + "\n")
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from error


def _companions(source: Path, out: Path) -> dict[str, Any]:
    """Copies the files of words and pictures; returns the special tokens that config.json names."""
    config = read_config(source) if (source / "config.json").exists() else {}
    text = config.get("text_config")
    config = {**(text if isinstance(text, dict) else {}), **config}
    for name in COMPANIONS:
        if (source / name).exists():
            shutil.copyfile(source / name, out / name)
    return {name: config[name] for name in _TOKENS if name in config}


def save_npz(out: Path, spec: ModelSpec, params: Mapping[str, Any]) -> None:
    """The image tower, or a whole PaliGemma, as a big_vision checkpoint."""
    check_npz(out, spec)
    check_vacant(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if spec.decoder is None:
            big_vision.save_encoder(out, params["encoder"], spec.encoder)
        else:
            big_vision.save_model(out, params, spec)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from error


def check(out: Path, spec: ModelSpec, image_token: int | None) -> None:
    """Raises `UserError` for what the format of `out` (a folder, or a `.npz`) cannot hold."""
    if out.suffix == ".npz":
        check_npz(out, spec)
    else:
        layout(spec, image_token)


def check_npz(out: Path, spec: ModelSpec) -> None:
    """Raises `UserError` for what a checkpoint of big_vision cannot hold."""
    if spec.encoder is None:
        raise UserError(f"{out}: a .npz holds an image tower, and the model has none")
    if spec.decoder is None:
        big_vision.encoder_table(spec.encoder, "", big_vision.APART)
    else:
        big_vision.model_tables(spec)


def check_vacant(out: Path) -> None:
    """Raises `UserError` where a file or a folder with something in it stands at `out`."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: there is something already; name a new folder")
