"""Weights in a form that is not read: errors that name what is there and the way to a form that is.

the name of a model on the Hub, a Hub cache, a Git LFS pointer, an unfinished download      download it
a PEFT adapter, tensors under `base_model.model.`                                           merge and save
GGUF, GPTQ, AWQ, bitsandbytes, fp8, MLX                                                     download the original
.pth, .h5, .msgpack, .onnx, shards without their index                                      convert, or complete
"""

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from vlm_jax.core import reading
from vlm_jax.core.errors import UserError

_ORIGINAL = "download the original model's folder with its .safetensors"
_CONVERT = "convert it: load it in its library and save_pretrained it as .safetensors"
_MERGE = (
    "merge it into its base model and save that: AutoPeftModel.from_pretrained(FOLDER).merge_and_unload()"
    ".save_pretrained(OUT)"
)
_FILES = (".safetensors", ".npz", ".bin", ".pt", ".pth", ".gguf", ".json")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_URL = re.compile(r"(?:https?:/+(?:www\.)?(?:huggingface\.co|hf\.co)/+|hf:/+)([\w.-]+/[\w.-]+).*")
_LFS = b"version https://git-lfs"
# What a folder without our files may hold instead, the most telling first: (glob, what it is, the way out).
_CONTENTS = (
    ("adapter_config.json", "a PEFT adapter", _MERGE),
    ("adapter_model.*", "a PEFT adapter", _MERGE),
    ("snapshots/*", "the Hub's cache of a model", "name the folder snapshots/REVISION in it"),
    ("*.gguf", "GGUF weights", _ORIGINAL),
    ("*-of-*.safetensors", "shards without their index", "download model.safetensors.index.json too"),
    ("*-of-*.bin", "shards without their index", "download pytorch_model.bin.index.json too"),
    ("*.incomplete", "an unfinished download", "download it again"),
    ("*.crdownload", "an unfinished download", "download it again"),
    ("consolidated*", "weights in their authors' own format", _ORIGINAL),
    ("tf_model.h5", "TensorFlow weights", _CONVERT),
    ("*.msgpack", "Flax weights", _CONVERT),
    ("*.onnx", "an ONNX graph", _ORIGINAL),
    ("*.npz", "a big_vision checkpoint", "name that file"),
    ("*.safetensors", "weights under another name", "name that file, or rename it to model.safetensors"),
    ("*.pth", "torch weights under another name", _CONVERT),
    ("*.pt", "torch weights under another name", _CONVERT),
    ("*.ckpt", "torch weights under another name", _CONVERT),
    ("*/model.safetensors", "a model in a folder of this one", "name that folder"),
)
_SUFFIXES = {
    ".gguf": ("GGUF weights", _ORIGINAL), ".ggml": ("GGML weights", _ORIGINAL), ".h5": ("Keras weights", _CONVERT),
    ".msgpack": ("Flax weights", _CONVERT), ".onnx": ("an ONNX graph", _ORIGINAL),
    ".ckpt": ("a training checkpoint", _CONVERT), ".json": ("a file of settings", "name its folder"),
    ".tflite": ("a TFLite graph", _ORIGINAL), ".zip": ("an archive", "unpack it, and name the folder"),
    ".gz": ("an archive", "unpack it, and name the folder"), ".tar": ("an archive", "unpack it, and name the folder"),
}  # fmt: skip
# Prefixes that a wrapper puts in front of all tensor names.
_WRAPPERS = {
    "base_model.model.": ("a PEFT model that was not merged", "merge_and_unload() it and save_pretrained the result"),
    "_orig_mod.": ("a model saved from torch.compile", "save_pretrained model._orig_mod"),
    "_fsdp_wrapped_module.": ("a model saved from FSDP", "save_pretrained its full state dict"),
    "module.": ("a model saved from DataParallel", "save_pretrained model.module"),
}
# Ends of tensor names that quantisation adds.
_QUANTISED = re.compile(
    r"\.(qweight|qzeros|g_idx|weight_scale(_inv)?|SCB|absmax|quant_map|quant_state|weight_packed|scales)(\.|$)"
)
_CONFIG_FIELDS = ("quantization_config", "compression_config", "quantization")
_DEQUANTISE = "download the original model, or with transformers load it, model.dequantize() and save_pretrained(OUT)"


def missing(path: Path) -> UserError:
    """The error for a path that does not exist, which may be the name of a model on the Hub."""
    name, url = str(path), _HUB_URL.fullmatch(str(path))
    if url or (_HUB_NAME.fullmatch(name) and path.suffix not in _FILES and not path.parent.exists()):
        model = url[1] if url else name
        folder = model.rpartition("/")[2]
        return UserError(
            f"{name}: no such folder; a model of the Hugging Face Hub must be downloaded first: "
            f"hf download {model} --local-dir {folder}"
        )
    return UserError(f"{name}: no such file or folder")


def no_weights(folder: Path, expected: Iterable[str]) -> UserError:
    """The error for a folder without one of the `expected` files."""
    names = ", ".join(expected)
    for pattern, what, way_out in _CONTENTS:
        found = next(iter(sorted(folder.glob(pattern))), None)
        if found is not None:
            base = f" of {_base_model(folder)}" if pattern.startswith("adapter") else ""
            return UserError(f"{folder}: {what}{base} ({found.relative_to(folder)}), expected {names}: {way_out}")
    return UserError(f"{folder}: no weights, expected {names}: name the folder that holds them")


def _base_model(folder: Path) -> str:
    """The base model that an adapter names."""
    try:
        name = reading.read_object(folder / "adapter_config.json").get("base_model_name_or_path")
    except UserError:
        name = None
    return name[:80] if isinstance(name, str) and name else "an unknown base model"


def unknown_format(path: Path) -> UserError:
    """The error for a file with another suffix than those that are read."""
    what, way_out = _SUFFIXES.get(path.suffix.lower(), (path.suffix or "no suffix", "name a model's folder"))
    return UserError(f"{path}: expected .safetensors, .npz or .bin, got {what}: {way_out}")


def check_content(path: Path) -> None:
    """Raises `UserError` for a Git LFS pointer, which only stands for weights."""
    with reading.open_regular(path) as file:
        start = file.read(len(_LFS))
    if start == _LFS:
        raise UserError(f"{path}: a Git LFS pointer, not the weights: run `git lfs pull` in its folder")


def unknown_dtype(path: Path, name: str, kind: str, expected: Collection[str]) -> UserError:
    """The error for a tensor of a dtype that is not read."""
    quantised = f" (quantised weights): {_DEQUANTISE}" if kind.startswith(("F8", "F4", "F6", "I4", "U4")) else ""
    return UserError(f"{path}: {name}: expected a dtype of {', '.join(expected)}, got {kind}{quantised}")


def check_config(config: Mapping[str, Any], where: Path) -> None:
    """Raises `UserError` for the config.json of quantised weights, or of an adapter."""
    for part in (config, *(one for one in config.values() if isinstance(one, Mapping))):
        for name in _CONFIG_FIELDS:
            settings = part.get(name)
            if settings:
                how = settings.get("quant_method") if isinstance(settings, Mapping) else None
                how = f"{name}.quant_method={how}" if isinstance(how, str) else name
                raise UserError(f"{where}: {how}: expected weights that are not quantised: {_DEQUANTISE}")
    if "peft_type" in config:
        raise UserError(f"{where}: expected a model, got a PEFT adapter: {_MERGE}")


def check_names(names: Iterable[str], where: Path) -> None:
    """Raises `UserError` for tensor names of a wrapped model or of quantised weights."""
    names = list(names)
    for prefix, (what, way_out) in _WRAPPERS.items():
        if wrapped := [name for name in names if name.startswith(prefix)]:
            raise UserError(f"{where}: {what} ({wrapped[0]}): {way_out}")
    if adapters := [name for name in names if ".lora_A." in name or ".lora_B." in name]:
        raise UserError(f"{where}: a PEFT adapter ({adapters[0]}): {_MERGE}")
    if quantised := [name for name in names if _QUANTISED.search(name)]:
        raise UserError(f"{where}: quantised weights ({quantised[0]}): {_DEQUANTISE}")
