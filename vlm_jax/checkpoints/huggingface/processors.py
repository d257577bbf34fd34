"""Hugging Face's image processor files <-> the preprocessing fields of `EncoderSpec`."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_jax.checkpoints.huggingface.fields import read_json
from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import EncoderSpec

NAMES = ("processor_config.json", "preprocessor_config.json")  # the first one with an image processor is read
_FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by `resample`, Pillow's numbers
_MAX_SIDE = 2**14  # pixels
_MAX_NUMBER = 1e30


def with_processor_files(encoder: EncoderSpec, path: Path) -> EncoderSpec:
    """The encoder with the preprocessing of its weights at `path`, a folder or a file in one: `image_processor` of
    processor_config.json, else preprocessor_config.json, else unchanged. The image size stays. Raises `UserError` for a
    processor that is not supported.
    """
    folder = path if path.is_dir() else path.parent
    for name in NAMES:
        config = read_json(folder / name)
        if config is not None and name == NAMES[0]:
            config = config.get("image_processor")
        if config is None:
            continue
        if not isinstance(config, dict):
            raise UserError(f"{folder / name}: image_processor: expected an object, got {type(config).__name__}")
        return with_processor(encoder, config, str(folder / name))
    return encoder


def with_processor(encoder: EncoderSpec, config: Mapping[str, Any], where: str) -> EncoderSpec:
    """The encoder with the preprocessing of an image processor's config; missing fields keep the encoder's values.
    Raises `UserError` with `where` and the field's name.
    """
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if config.get(name, True) is not True:
            raise UserError(f"{where}: {name}={config[name]!r} is not supported: expected true")
    resize, shortest_edge, side = _resize(encoder, config, where)
    rescale = config.get("rescale_factor", encoder.pixel_rescale)
    if not _is_number(rescale) or not rescale > 0:
        raise UserError(f"{where}: rescale_factor={rescale!r}: expected a positive number")
    kind = config.get("resample", _FILTERS.index(encoder.interpolation))
    if kind not in range(len(_FILTERS)):
        raise UserError(f"{where}: resample={kind!r}: expected Pillow's number of a filter, 0 to 5")
    std = _three(config.get("image_std", encoder.pixel_std), "image_std", where)
    if not min(std) > 0:
        raise UserError(f"{where}: image_std={list(std)}: expected positive numbers")
    return dataclasses.replace(
        encoder,
        pixel_mean=_three(config.get("image_mean", encoder.pixel_mean), "image_mean", where),
        pixel_std=std,
        pixel_rescale=float(rescale),
        resize=resize,
        interpolation=_FILTERS[int(kind)],
        shortest_edge=round(shortest_edge * encoder.image_size / side) if shortest_edge != side else 0,
    )


def _resize(encoder: EncoderSpec, config: Mapping[str, Any], where: str) -> tuple[str, int, int]:
    """(`EncoderSpec.resize`, shortest edge, side of the square) in pixels of the config."""
    crops = encoder.resize == "crop"
    do_crop = config.get("do_center_crop", crops)
    size, crop = config.get("size"), config.get("crop_size")
    is_edge = do_crop
    if size is None or size == {}:
        size, is_edge = encoder.image_size, crops
    if isinstance(size, int):  # as in older files
        size = {"shortest_edge": size} if is_edge else {"height": size, "width": size}
    if not isinstance(size, Mapping) or not all(type(n) is int and 0 < n <= _MAX_SIDE for n in size.values()):
        raise UserError(f"{where}: size={size!r}: expected integers, numbers of pixels")
    resize, edge = "squash", size.get("shortest_edge", 0)
    if edge:
        if not do_crop:
            raise UserError(f"{where}: size.shortest_edge is not supported without do_center_crop: expected a square")
        resize = "pad" if config.get("do_pad", False) else "crop"
        size = crop if isinstance(crop, dict) else {"height": crop or edge, "width": crop or edge}
    height, width = size.get("height"), size.get("width")
    if height != width or not isinstance(height, int) or height < 1:
        raise UserError(f"{where}: size {height, width}: expected a square in pixels")
    return resize, edge, height


def processor_config(encoder: EncoderSpec) -> dict[str, Any]:
    """The preprocessing as a preprocessor_config.json."""
    size, kinds = encoder.image_size, {"squash": "Siglip", "crop": "CLIP", "pad": "Llava"}
    square = {"height": size, "width": size}
    sizes = {"size": square}
    if encoder.resize != "squash":
        sizes = {"size": {"shortest_edge": encoder.shortest_edge or size}, "crop_size": square}
    return {
        "image_processor_type": f"{kinds[encoder.resize]}ImageProcessor",
        **dict.fromkeys(("do_convert_rgb", "do_resize", "do_rescale", "do_normalize"), True),
        "do_pad": encoder.resize == "pad",
        "do_center_crop": encoder.resize != "squash",
        **sizes,
        "resample": _FILTERS.index(encoder.interpolation),
        "rescale_factor": encoder.pixel_rescale,
        "image_mean": list(encoder.pixel_mean),
        "image_std": list(encoder.pixel_std),
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _MAX_NUMBER


def _three(value: Any, name: str, where: str) -> tuple[float, float, float]:
    value = [value] * 3 if isinstance(value, int | float) else value
    if not isinstance(value, list | tuple) or len(value) != 3 or not all(map(_is_number, value)):
        raise UserError(f"{where}: {name}={value!r}: expected three numbers")
    return tuple(map(float, value))  # type: ignore[return-value]
