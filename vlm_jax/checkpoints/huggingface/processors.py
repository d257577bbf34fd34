"""How images are prepared for published weights: the processor files beside them <-> fields of our `EncoderSpec`."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import EncoderSpec

NAMES = ("processor_config.json", "preprocessor_config.json")  # the first that says it counts
_FILTERS = (
    "nearest",
    "lanczos",
    "bilinear",
    "bicubic",
    "box",
    "hamming",
)  # by Pillow's numbers: `resample`
_MAX_SIDE = 2**14  # that a processor's file may ask for
_HUGE = 1e30  # no mean, no deviation and no scale of pixels comes near


def prepared(encoder: EncoderSpec, path: Path) -> EncoderSpec:
    """The encoder with the preparation that came with its weights at `path`, a folder or a file in one: the part
    `image_processor` of processor_config.json, else preprocessor_config.json, else what the spec says already (its
    family's). The encoder's resolution stays.

    Raises `UserError` for a file that asks for what we do not do.
    """
    folder = path if path.is_dir() else path.parent
    for name in NAMES:
        config = _read(folder / name)
        if config is not None and name == NAMES[0]:
            config = config.get("image_processor")
        if config is None:
            continue
        if not isinstance(config, dict):
            raise UserError(f"{folder / name}: image_processor: expected an object, got {type(config).__name__}")
        return with_processor(encoder, config, str(folder / name))
    return encoder


def _read(path: Path) -> dict[str, Any] | None:
    """None where there is no such file."""
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected an object, got {type(config).__name__}")
    return config


def with_processor(encoder: EncoderSpec, config: Mapping[str, Any], where: str) -> EncoderSpec:
    """The fields of a Hugging Face image processor; what they leave out is the encoder's own.

    Raises `UserError` that names `where` and the field.
    """
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if config.get(name, True) is not True:
            raise UserError(f"{where}: {name}={config[name]!r} is not supported: the encoder takes prepared pixels")
    size, cuts = encoder.image_size, encoder.resize == "crop"
    crop, pad = config.get("do_center_crop", cuts), bool(config.get("do_pad", False))
    given, cut = config.get("size"), config.get("crop_size")
    resize, shortest = "squash", 0
    if isinstance(given, int):  # older files: the shorter edge where there is a crop, else both sides
        given = {"shortest_edge": given} if crop else {"height": given, "width": given}
    given = given or ({"shortest_edge": size} if cuts else {"height": size, "width": size})
    if not isinstance(given, Mapping) or not all(type(n) is int and 0 < n <= _MAX_SIDE for n in given.values()):
        raise UserError(f"{where}: size={given!r}: expected whole numbers of pixels")
    if "shortest_edge" in given:
        if not crop:
            raise UserError(f"{where}: size.shortest_edge without do_center_crop leaves images of different shapes")
        resize, shortest = ("pad" if pad else "crop"), int(given["shortest_edge"])
        cut = cut if isinstance(cut, dict) else {"height": cut or shortest, "width": cut or shortest}
        sides = (cut.get("height"), cut.get("width"))
    else:
        sides = (given.get("height"), given.get("width"))
    if sides[0] != sides[1] or not isinstance(sides[0], int) or sides[0] < 1:
        raise UserError(f"{where}: size {sides}: expected a square of whole pixels")
    rescale = config.get("rescale_factor", encoder.pixel_rescale)
    if not _is_number(rescale) or not rescale > 0:
        raise UserError(f"{where}: rescale_factor={rescale!r}: expected a positive number")
    kind = config.get("resample", _FILTERS.index(encoder.interpolation))
    if kind not in range(len(_FILTERS)):
        raise UserError(f"{where}: resample={kind!r}: expected a number of Pillow's, 0 to 5")
    std = _three(config.get("image_std", encoder.pixel_std), "image_std", where)
    if not min(std) > 0:
        raise UserError(f"{where}: image_std={list(std)}: pixels are divided by it: expected positive numbers")
    return dataclasses.replace(
        encoder,
        pixel_mean=_three(config.get("image_mean", encoder.pixel_mean), "image_mean", where),
        pixel_std=std,
        pixel_rescale=float(rescale),
        resize=resize,
        interpolation=_FILTERS[int(kind)],
        shortest_edge=round(shortest * size / sides[0]) if shortest != sides[0] else 0,
    )


def processor_config(encoder: EncoderSpec) -> dict[str, Any]:
    """The preparation as a preprocessor_config.json, which `with_processor` and transformers read."""
    size, kinds = encoder.image_size, {"squash": "Siglip", "crop": "CLIP", "pad": "Llava"}
    square = {"height": size, "width": size}
    sizes = {"size": square}
    if encoder.resize != "squash":
        sizes = {"size": {"shortest_edge": encoder.shortest_edge or size}, "crop_size": square}
    return {
        "image_processor_type": f"{kinds[encoder.resize]}ImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "do_pad": encoder.resize == "pad",
        "do_center_crop": encoder.resize != "squash",
        "do_rescale": True,
        "do_normalize": True,
        **sizes,
        "resample": _FILTERS.index(encoder.interpolation),
        "rescale_factor": encoder.pixel_rescale,
        "image_mean": list(encoder.pixel_mean),
        "image_std": list(encoder.pixel_std),
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _HUGE


def _three(value: Any, name: str, where: str) -> tuple[float, float, float]:
    value = [value] * 3 if isinstance(value, int | float) else value
    if not isinstance(value, list | tuple) or len(value) != 3 or not all(map(_is_number, value)):
        raise UserError(f"{where}: {name}={value!r}: expected three numbers")
    return tuple(map(float, value))  # type: ignore[return-value]
