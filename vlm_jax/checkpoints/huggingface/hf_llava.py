"""Checkpoints of LLaVA's own code, and of the projects that build on it: Llama and a connector in one folder, the
vision tower in another.

    config.json               Llama's fields, and `mm_*` about the rest; `mm_vision_tower` is the tower's folder
    model.layers.*, ...       Llama
    model.mm_projector.*      the connector (`hf_llava_connector`)
    model.vision_tower.*      the tower, where it was trained too; else CLIP's own weights are read

`mm_projector.bin` (or .safetensors) alone is the result of a first stage, which trains the connector only.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.checkpoints.huggingface import fields, hf_decoder, hf_encoder, hf_llava_connector, hf_vlm, processors
from vlm_jax.checkpoints.info import CheckpointInfo
from vlm_jax.checkpoints.tensor_files import FOLDER_FILES, TensorFiles, open_weights
from vlm_jax.checkpoints.tensor_tables import check
from vlm_jax.core import reading
from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import EncoderSpec

ARCHITECTURE = "LlavaLlamaForCausalLM"
PROJECTOR = "mm_projector"
_MARK, _TOWER, _TOWER_MODEL = f"{PROJECTOR}.", "model.vision_tower.", "model.vision_tower.vision_tower.vision_model."
_READ = {
    *hf_llava_connector.READ, "mm_hidden_size", "mm_vision_tower", "mm_vision_select_layer", "image_aspect_ratio",
    "unfreeze_mm_vision_tower",
    # Of training, and tokens that prompts do not use.
    "mm_use_im_patch_token", "image_grid_pinpoints", "image_crop_resolution", "image_split_resolution", "patch_num",
    "tune_mm_mlp_adapter", "freeze_mm_mlp_adapter", "tune_mm_vision_resampler", "freeze_mm_vision_resampler",
    "mm_projector_lr", "mm_vision_tower_lr", "s2_scales", "mm_vision_output_combined_token_count",
}  # fmt: skip
_FIXED: dict[str, tuple[Any, ...]] = {
    **hf_llava_connector.FIXED,
    "mm_vision_select_feature": ("patch",),
    "mm_use_im_start_end": (False,),
    "mm_patch_merge_type": ("flat",),
    "mm_resampler_type": (None,),
    "use_mm_proj": (True,),
    "s2": (False,),
}
_ASPECTS = ("pad", "square")


def is_projector(weights: TensorFiles) -> bool:
    """Whether the files hold a connector alone."""
    return any(_MARK in name for name in weights.shapes) and not any(".layers." in name for name in weights.shapes)


def llava(weights: TensorFiles, config: dict[str, Any], vision: Path | None) -> CheckpointInfo:
    """A row of `inspection.architectures`. `vision`: the tower's folder, instead of the one that config.json names.
    Where there is no such folder, the encoder is None and `missing` says what was looked for.
    """
    where, mm = str(fields.config_path(weights.path)), _mm_fields(config)
    text = {name: value for name, value in config.items() if name not in mm}
    decoder = hf_decoder.decoder_spec({**text, "model_type": "llama"}, where)
    tables = {"decoder": hf_decoder.decoder_table(decoder, *hf_decoder.prefixes(weights))}
    info = CheckpointInfo(ARCHITECTURE, None, None, decoder, "causal", None, tables, weights, config)
    info = info._replace(ignore=hf_decoder.ignore(decoder))
    return _with_vision(info, mm, decoder.width, vision)


def projector(weights: TensorFiles, config: dict[str, Any], vision: Path | None) -> CheckpointInfo:
    """A connector alone, with the tower that it was trained for, if a config.json beside it names one."""
    info = CheckpointInfo(PROJECTOR, None, None, None, "causal", None, {}, weights, config)
    where, mm = str(fields.config_path(weights.path)), _mm_fields(config)
    width = fields.number(config, "hidden_size", where) if mm and "hidden_size" in config else None
    return _with_vision(info, mm, width, vision)


def _mm_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields about images."""
    names = {*_READ, *_FIXED}
    return {name: value for name, value in config.items() if name in names or name.startswith("mm_")}


def _with_vision(info: CheckpointInfo, mm: dict[str, Any], width: int | None, vision: Path | None) -> CheckpointInfo:
    """The checkpoint with its connector and, where its folder is found, the tower."""
    weights, where = info.weights, str(fields.config_path(info.weights.path))
    fields.check(mm, where, _READ, _FIXED)
    prefix = _prefix(weights)
    method, layers = hf_llava_connector.find(weights, prefix, mm, where)
    outer = weights.shapes[f"{prefix}{layers[0]}weight"][0]
    if len(outer) != 2:
        raise UserError(f"{weights.path}: {prefix}{layers[0]}weight: expected two axes, got {list(outer)}")
    inputs, width = fields.number({"mm_hidden_size": outer[1], **mm}, "mm_hidden_size", where), width or outer[0]
    table = hf_vlm.projector_table(tuple(f"{prefix}{name}" for name in layers), inputs, width)
    info = info._replace(projector="mlp" if len(layers) > 1 else "linear", tables={**info.tables, "connector": table})
    folder = vision or _find_tower(weights.path, mm)
    if folder is None:
        # A compressor cannot be described without the patches of its tower.
        tables = {name: table for name, table in info.tables.items() if name != "connector" or method == "none"}
        ignore = (*info.ignore, r"model\.vision_tower\..*", *(() if method == "none" else (rf".*{PROJECTOR}\..*",)))
        return info._replace(tables=tables, ignore=ignore, missing=_not_found(weights.path, mm))
    encoder, weights = _tower(weights, mm, folder, inputs, where)
    compressor = hf_llava_connector.compressor_spec(method, encoder, width, mm, where)
    if compressor is not None:
        encoder = dataclasses.replace(encoder, taps=hf_llava_connector.taps(encoder))
        table = table | hf_llava_connector.compressor_table(prefix, compressor)
    tower = hf_encoder.prefix_of(weights)
    tables = {**info.tables, "encoder": hf_encoder.encoder_table(encoder, tower), "connector": table}
    ignore = (*info.ignore, *hf_encoder.IGNORED, *hf_encoder.unused(encoder, tower))
    return info._replace(
        encoder=encoder, compressor=compressor, tables=tables, weights=weights, ignore=ignore, prepared=True
    )


def _prefix(weights: TensorFiles) -> str:
    """What is in front of the connector's names: "model.mm_projector."."""
    found = {name.partition(_MARK)[0] + _MARK for name in weights.shapes if _MARK in name}
    if len(found) != 1:
        raise UserError(f"{weights.path}: expected tensors model.{_MARK}*, got {', '.join(sorted(found)) or 'none'}")
    return found.pop()


def _places(path: Path, mm: Mapping[str, Any]) -> list[tuple[str, Path]]:
    """Where the tower may be, (name, folder): `mm_vision_tower` in the working directory or, as the Hub has them, two
    folders above the checkpoint; its last name in the checkpoint's folder and beside it."""
    name, folder = mm.get("mm_vision_tower"), fields.config_path(path).parent.absolute()
    if not isinstance(name, str) or not name:
        return []
    last = Path(name).name
    places = [(name, Path()), (last, folder), (last, folder.parent), (name, folder.parent.parent)]
    return [(name, Path())] if not last else places


def _find_tower(path: Path, mm: Mapping[str, Any]) -> Path | None:
    found = (folder / name for name, folder in _places(path, mm))
    return next((one for one in found if reading.kind(one) == "folder" and reading.kind(one / "config.json")), None)


def _not_found(path: Path, mm: Mapping[str, Any]) -> str:
    looked = ", ".join(name if folder == Path() else f"{name} in {folder}" for name, folder in _places(path, mm))
    return (
        f"{fields.config_path(path)}: mm_vision_tower: expected the folder of a CLIP tower, looked for "
        f"{looked or 'none'}: name it with vision=FOLDER (--vision FOLDER)"
    )


def _tower(
    weights: TensorFiles, mm: Mapping[str, Any], folder: Path, width: int, where: str
) -> tuple[EncoderSpec, TensorFiles]:
    """The tower's spec, with the image preparation of the checkpoint, and all weights as one."""
    spec, weights = _join(weights, folder, is_trained=bool(mm.get("unfreeze_mm_vision_tower")))
    if not spec.class_token or spec.width != width:
        got = f"{spec.name} of width {spec.width}"
        raise UserError(f"{folder}: expected a CLIP tower of mm_hidden_size={width} ({where}), got {got}")
    layer = hf_vlm.feature_layer(spec, mm.get("mm_vision_select_layer", -2), f"{where}: mm_vision_select_layer")
    aspect = mm.get("image_aspect_ratio") or "square"
    if aspect not in _ASPECTS:
        raise UserError(
            f"{where}: image_aspect_ratio={aspect!r}, which cuts an image into tiles, is not supported: expected "
            f"{' or '.join(_ASPECTS)}"
        )
    spec = processors.with_processor_files(spec, folder)
    resize = "pad" if aspect == "pad" else spec.resize
    return dataclasses.replace(spec, feature_layer=layer, pooling_head=False, resize=resize), weights


def _join(weights: TensorFiles, folder: Path, is_trained: bool) -> tuple[EncoderSpec, TensorFiles]:
    """The spec in the tower's folder, and its tensors among those of the checkpoint. As in LLaVA, a tower in the
    checkpoint counts only where it was trained, or where the folder has no weights."""
    file = folder / "config.json"
    config = fields.read_json(file)
    if config is None:
        raise UserError(f"{file}: missing (it describes the vision tower of {weights.path})")
    saved = any(name.startswith(_TOWER) for name in weights.shapes)
    if is_trained or (saved and not _has_weights(folder)):
        fields.check_depth(config, len(weights.shapes), str(file))
        return hf_encoder.encoder_spec(hf_encoder.vision_config(config, str(file)), str(file)), weights
    tower = open_weights(folder)
    fields.check_depth(config, len(tower.shapes), str(file))
    info = hf_vlm.encoder_only(tower, {**config, "architectures": ["CLIPModel"]})
    check(tower, info.tables.values(), info.ignore)
    prefix = hf_encoder.prefix_of(tower)
    names = {_TOWER_MODEL + name.removeprefix(prefix): name for name in tower.shapes if name.startswith(prefix)}
    shapes = {name: found for name, found in weights.shapes.items() if not name.startswith(_TOWER)}
    shapes |= {name: tower.shapes[inner] for name, inner in names.items()}

    def read(name: str) -> np.ndarray:
        return tower.read(names[name]) if name in names else weights.read(name)

    return info.encoder, TensorFiles(weights.path, shapes, read)


def _has_weights(folder: Path) -> bool:
    return any(reading.kind(folder / name) for name in FOLDER_FILES)
