"""From image files to the pixels that a public encoder was trained on.

    spec = image_spec(folder, encoder)        # from preprocessor_config.json, or the encoder's defaults
    pixels = prepare([read_image(path)], spec)         # float32[B, H, H, 3], ready for `Vlm.encode`

Resizing is Pillow's, on 8-bit pixels, as in the processors of Hugging Face that use Pillow; those that use torchvision
round differently by a level or two. After resizing: pixels times `rescale`, less `mean`, over `std`.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from vlm_jax.core.errors import UserError, unknown
from vlm_jax.core.specs import EncoderSpec

RESIZING = ("squash", "crop", "pad")
INTERPOLATION = {
    "nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS, "box": Image.Resampling.BOX, "hamming": Image.Resampling.HAMMING,
}  # fmt: skip
MAX_PIXELS = 2**27  # of one image file; more is refused unread
_MAX_SIDE = 2**14  # that a processor's file may ask for
_HUGE = 1e30  # no mean, no deviation and no scale of pixels comes near


@dataclass(frozen=True)
class ImageSpec:
    """How pixels are prepared for an encoder.

    resize: "squash" gives both sides their size, whatever the shape; "crop" gives the shorter edge `shortest` pixels
    and cuts the middle out; "pad" first fills the image up to a square of the mean colour.
    """

    size: int  # H
    resize: str = "squash"
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    rescale: float = 1 / 255
    shortest: int = 0  # of "crop"; 0: the same as `size`


def default_spec(encoder: EncoderSpec) -> ImageSpec:
    """What the encoders of a family were trained with: SigLIP's images are squashed, CLIP's are cut."""
    resize = "crop" if encoder.class_token else "squash"
    return ImageSpec(encoder.image_size, resize, "bicubic", encoder.pixel_mean, encoder.pixel_std)


def run_spec(encoder: EncoderSpec) -> ImageSpec:
    """For a model of this project, whose drawn pages fill their square."""
    return ImageSpec(encoder.image_size, "squash", "bilinear", encoder.pixel_mean, encoder.pixel_std)


def image_spec(folder: Path, encoder: EncoderSpec) -> ImageSpec:
    """From the folder's preprocessor_config.json (or its part of processor_config.json), else `default_spec`. The
    encoder's resolution wins, so that a model loaded for another one is fed at that one.

    Raises `UserError` for a file that asks for what we do not do.
    """
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: not valid JSON ({error})") from error
        if name == "processor_config.json" and isinstance(config, dict):
            config = config.get("image_processor")
            if config is None:
                continue
        if not isinstance(config, dict):
            raise UserError(f"{path}: an object is wanted, not {type(config).__name__}")
        return spec_from_processor(config, str(path), default_spec(encoder))
    return default_spec(encoder)


def spec_from_processor(config: Mapping[str, Any], where: str, base: ImageSpec) -> ImageSpec:
    """The fields of a Hugging Face image processor, on top of the family's defaults. Raises `UserError` that names the
    field.
    """
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if config.get(name, True) is not True:
            raise UserError(f"{where}: {name}={config[name]!r} is not supported: the encoder takes prepared pixels")
    size, cuts = base.size, base.resize == "crop"
    crop, pad = config.get("do_center_crop", cuts), bool(config.get("do_pad", False))
    given, cut = config.get("size"), config.get("crop_size")
    resize = "squash"
    if isinstance(given, int):  # older files: the shorter edge where there is a crop, else both sides
        given = {"shortest_edge": given} if crop else {"height": given, "width": given}
    given = given or ({"shortest_edge": size} if cuts else {"height": size, "width": size})
    if not isinstance(given, Mapping) or not all(type(n) is int and 0 < n <= _MAX_SIDE for n in given.values()):
        raise UserError(f"{where}: size={given!r}: whole numbers of pixels are wanted")
    shortest = 0
    if "shortest_edge" in given:
        if not crop:
            raise UserError(f"{where}: size.shortest_edge without do_center_crop leaves images of different shapes")
        resize, shortest = ("pad" if pad else "crop"), int(given["shortest_edge"])
        cut = cut if isinstance(cut, dict) else {"height": cut or shortest, "width": cut or shortest}
        sides = (cut.get("height"), cut.get("width"))
    else:
        sides = (given.get("height"), given.get("width"))
    if sides[0] != sides[1] or not isinstance(sides[0], int) or sides[0] < 1:
        raise UserError(f"{where}: size {sides}: a square of whole pixels is wanted")
    rescale = config.get("rescale_factor", base.rescale)
    if not _is_number(rescale) or not rescale > 0:
        raise UserError(f"{where}: rescale_factor={rescale!r}: a positive number is wanted")
    kind = config.get("resample", INTERPOLATION[base.interpolation])
    if kind not in list(INTERPOLATION.values()):
        raise UserError(f"{where}: resample={kind!r}: a number of Pillow's from 0 to 5 is wanted")
    std = _three(config.get("image_std", base.std), "image_std", where)
    if not min(std) > 0:
        raise UserError(f"{where}: image_std={list(std)}: pixels are divided by it; positive numbers are wanted")
    return ImageSpec(
        size=size,
        resize=resize,
        interpolation=next(name for name, value in INTERPOLATION.items() if value == kind),
        mean=_three(config.get("image_mean", base.mean), "image_mean", where),
        std=std,
        rescale=rescale,
        shortest=round(shortest * size / sides[0]) if shortest != sides[0] else 0,
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < _HUGE


def _three(value: Any, name: str, where: str) -> tuple[float, float, float]:
    value = [value] * 3 if isinstance(value, int | float) else value
    if not isinstance(value, list | tuple) or len(value) != 3 or not all(map(_is_number, value)):
        raise UserError(f"{where}: {name}={value!r}: three numbers are wanted")
    return tuple(map(float, value))  # type: ignore[return-value]


def read_image(path: str | Path) -> UInt8[np.ndarray, "h w 3"]:
    """An image file as RGB, turned upright as its EXIF says; transparency is dropped, not blended.

    Raises `UserError` for a file that is missing, is no image, is cut short, or has more than `MAX_PIXELS`.
    """
    path = Path(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused below, with our own limit
            image = Image.open(path)
        with image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise UserError(
                    f"{path}: {width} x {height} pixels; more than {MAX_PIXELS:,} are not read: scale it down"
                )
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16") or image.mode == "I":
                levels = np.asarray(image, np.int64) >> 8  # 16 bits a pixel: the upper eight
                image = Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))
            return np.asarray(image.convert("RGB"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such image") from None
    except Image.DecompressionBombError:
        raise UserError(f"{path}: far more than {MAX_PIXELS:,} pixels are not read: scale it down") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError) as error:
        raise UserError(f"{path}: not a readable image ({' '.join(str(error).split())})") from error


def prepare(images: Sequence[UInt8[np.ndarray, "_ _ 3"]], spec: ImageSpec) -> Float[np.ndarray, "B H H 3"]:
    """RGB images of any sizes -> what the encoder takes."""
    out = np.empty((len(images), spec.size, spec.size, 3), np.float32)
    mean, std = np.asarray(spec.mean, np.float32), np.asarray(spec.std, np.float32)
    for row, image in zip(out, images, strict=True):
        # Rounded where the processors round: the scaled pixel to float32, then the rest in float32.
        row[...] = ((_fitted(image, spec) * np.float64(spec.rescale)).astype(np.float32) - mean) / std
    return out


def _fitted(image: UInt8[np.ndarray, "h w 3"], spec: ImageSpec) -> UInt8[np.ndarray, "H H 3"]:
    method, size = INTERPOLATION[spec.interpolation], spec.size
    if spec.resize not in RESIZING:
        raise unknown("way to resize images", spec.resize, RESIZING)
    if spec.resize == "squash":
        return np.asarray(Image.fromarray(image).resize((size, size), method))
    if spec.resize == "pad":
        side, colour = max(image.shape[:2]), [int(x * 255) for x in spec.mean]
        image = _placed(image, side, side, [(side - n) // 2 for n in image.shape[:2]], colour)
    height, width = image.shape[:2]
    edge, short = spec.shortest or size, min(height, width)
    sides = (edge if width == short else edge * width // height, edge if height == short else edge * height // width)
    if sides[0] * sides[1] > MAX_PIXELS:
        raise UserError(f"an image of {width} x {height} is too long and thin to be scaled to {sides[0]} x {sides[1]}")
    image = np.asarray(Image.fromarray(image).resize(sides, method))
    height, width = image.shape[:2]
    if min(height, width) < size:  # a crop larger than the edge: black around
        corner = [max(0, -(-(size - n) // 2)) for n in (height, width)]
        height, width = max(height, size), max(width, size)
        image = _placed(image, height, width, corner, (0, 0, 0))
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size]


def _placed(image: np.ndarray, height: int, width: int, corner: Sequence[int], colour: Sequence[int]) -> np.ndarray:
    out = np.empty((height, width, 3), np.uint8)
    out[...] = colour
    out[corner[0] : corner[0] + image.shape[0], corner[1] : corner[1] + image.shape[1]] = image
    return out
