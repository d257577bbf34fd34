"""From images of any kind to the pixels that an encoder takes: the one door, in training, evaluation and answering.

    levels = fit([read_image(path), read_image(picture)], encoder)     # uint8[B, H, H, 3], on the host
    pixels = normalise(levels, encoder)                                # float32; `Vlm.encode` does it on the device

How is said by the fields of `EncoderSpec`, which come with the weights. Resizing is Pillow's, on 8-bit pixels, as in
the processors of Hugging Face that use Pillow; those that use torchvision round differently by a level or two.
"""

import io
import struct
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from vlm_jax.core.errors import UserError, unknown
from vlm_jax.core.specs import EncoderSpec
from vlm_jax.ops.pixels import normalise as normalise

MAX_PIXELS = 2**27  # of one image, as it comes and as it is resized; more is refused unread
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")  # that are opened, whatever the name says
RESIZING = ("squash", "crop", "pad")
INTERPOLATION = {filter.name.lower(): filter for filter in Image.Resampling}
# What Pillow raises over bad files; warnings too, where the caller makes errors of them.
_BROKEN = (OSError, ValueError, SyntaxError, EOFError, RuntimeError, LookupError, TypeError, struct.error, Warning)
_OPENING = threading.Lock()  # filters of warnings are the process's, and training reads in threads
_DEEP = ("PNG", "PPM")  # formats whose mode "I" holds 16 bits


def read_image(image: Any, name: str = "image") -> UInt8[np.ndarray, "h w 3"]:
    """A path, the bytes of a file, a PIL image or uint8[h, w, 3] -> RGB, upright as EXIF says, transparency on white.

    Grey of 16 bits is scaled by its depth. `name` is what errors call an image that has no path.

    Raises `UserError` for a file that is missing, cut short or no image, an image with more than `MAX_PIXELS`, numbers
    whose range is not known (other arrays than uint8, PIL's modes "F" and "I"), and anything else.
    """
    if isinstance(image, Image.Image):
        return _rgb(image, name)
    if isinstance(image, str | Path | bytes):
        name = name if isinstance(image, bytes) else str(image)
        try:
            with _OPENING, warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused by our own limit
                opened = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=FORMATS)
            with opened:
                return _rgb(opened, name)
        except FileNotFoundError:
            raise UserError(f"{name}: no such image") from None
        except Image.DecompressionBombError:
            raise UserError(f"{name}: far more than {MAX_PIXELS:,} pixels are not read: scale it down") from None
        except UnidentifiedImageError:
            raise UserError(f"{name}: not a readable image (expected one of {', '.join(FORMATS)})") from None
        except _BROKEN as error:
            raise _unreadable(name, error) from error
    kind, shape = getattr(image, "dtype", None), tuple(getattr(image, "shape", ()))
    if kind is None:
        raise UserError(f"{name}: expected a path, a PIL image or uint8[h, w, 3], got {type(image).__name__}")
    if kind != np.uint8 or len(shape) != 3 or shape[2] != 3 or not all(shape):
        raise UserError(
            f"{name}: expected a path, a PIL image or uint8[h, w, 3], got {kind}{list(shape)} (levels are 0 to 255)"
        )
    if shape[0] * shape[1] > MAX_PIXELS:
        raise _too_large(shape[1], shape[0], name)
    return np.asarray(image)


def _too_large(width: int, height: int, name: str) -> UserError:
    return UserError(f"{name}: {width} x {height} pixels; more than {MAX_PIXELS:,} are not read: scale it down")


def _unreadable(name: str, error: Exception) -> UserError:
    return UserError(f"{name}: not a readable image ({' '.join(str(error).split())[:200]})")


def _rgb(image: Image.Image, name: str) -> UInt8[np.ndarray, "h w 3"]:
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(*image.size, name)
    file_format = image.format  # which a turned image has no more
    try:
        image = ImageOps.exif_transpose(image)
        deep = image.mode.startswith("I;16") or (image.mode == "I" and file_format in _DEEP)
        if image.mode in ("F", "I") and not deep:
            bits = {"F": "float", "I": "integer"}[image.mode]
            raise UserError(
                f"{name}: {bits} grey of 32 bits (mode {image.mode}) has no stated range: expected 8 or 16 bits, scale "
                "it to 0 ... 255 and convert it to mode L"
            )
        if deep:
            levels = np.clip(np.asarray(image, np.float64), 0, 65535) * (255 / 65535)
            image = Image.fromarray(np.rint(levels).astype(np.uint8))
        if image.mode != "RGB" and image.has_transparency_data:
            above = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", above.size, "white"), above)
        return np.asarray(image.convert("RGB"))
    except _BROKEN as error:
        raise _unreadable(name, error) from error


def fit(images: Sequence[UInt8[np.ndarray, "_ _ 3"]], encoder: EncoderSpec) -> UInt8[np.ndarray, "B H H 3"]:
    """RGB images of any sizes, each resized, and cut or filled up, to the square that the encoder looks at.

    "squash" gives both sides H pixels, whatever the shape; "crop" gives the shorter edge `shortest_edge` pixels and
    cuts the middle out; "pad" first fills the image up to a square of the mean colour. Raises `UserError` for an image
    that is too long and thin.
    """
    if encoder.resize not in RESIZING:
        raise unknown("way to resize images", encoder.resize, RESIZING)
    if encoder.interpolation not in INTERPOLATION:
        raise unknown("interpolation", encoder.interpolation, INTERPOLATION)
    side = encoder.image_size
    out = np.empty((len(images), side, side, 3), np.uint8)
    for row, image in zip(out, images, strict=True):
        row[...] = _squashed(image, encoder) if encoder.resize == "squash" else _cut(image, encoder)
    return out


def _squashed(image: UInt8[np.ndarray, "h w 3"], encoder: EncoderSpec) -> UInt8[np.ndarray, "H H 3"]:
    size = (encoder.image_size, encoder.image_size)
    if image.shape[:2] == size:
        return image
    return np.asarray(Image.fromarray(image).resize(size, INTERPOLATION[encoder.interpolation]))


def _cut(image: UInt8[np.ndarray, "h w 3"], encoder: EncoderSpec) -> UInt8[np.ndarray, "H H 3"]:
    size, (height, width) = encoder.image_size, image.shape[:2]
    if encoder.resize == "pad":
        side, colour = max(height, width), [int(x * 255) for x in encoder.pixel_mean]
        _check_resized(image, side, side)
        image = _placed(image, side, side, [(side - n) // 2 for n in (height, width)], colour)
        height = width = side
    edge, short = encoder.shortest_edge or size, min(height, width)
    sides = (edge if width == short else edge * width // height, edge if height == short else edge * height // width)
    _check_resized(image, *sides)
    if sides != (width, height):
        image = np.asarray(Image.fromarray(image).resize(sides, INTERPOLATION[encoder.interpolation]))
    height, width = image.shape[:2]
    if min(height, width) < size:  # a crop larger than the edge: black around
        corner = [max(0, -(-(size - n) // 2)) for n in (height, width)]
        height, width = max(height, size), max(width, size)
        image = _placed(image, height, width, corner, (0, 0, 0))
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size]


def _check_resized(image: np.ndarray, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        old = f"{image.shape[1]} x {image.shape[0]}"
        raise UserError(f"an image of {old} is too long and thin to be scaled to {width} x {height}: cut it first")


def _placed(image: np.ndarray, height: int, width: int, corner: Sequence[int], colour: Sequence[int]) -> np.ndarray:
    out = np.empty((height, width, 3), np.uint8)
    out[...] = colour
    out[corner[0] : corner[0] + image.shape[0], corner[1] : corner[1] + image.shape[1]] = image
    return out
