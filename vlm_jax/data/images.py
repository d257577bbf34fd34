"""Image preprocessing of training, evaluation and generation.

    levels = fit([read_image(path), read_image(pil_image)], encoder)   # uint8[B, H, H, 3], on the host
    pixels = normalise(levels, encoder)                                # float32; `Vlm.encode` does it on the device

The fields of `EncoderSpec` decide how; they are read with the weights. Resizing is Pillow's, on 8-bit pixels, as in
Hugging Face's processors that use Pillow; those that use torchvision differ by a level or two.
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

MAX_PIXELS = 2**27  # of one image, as stored and as resized
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")  # by content, not by file name
RESIZING = ("squash", "crop", "pad")
INTERPOLATION = {filter.name.lower(): filter for filter in Image.Resampling}
# Pillow's errors on bad files; warnings too, for callers that turn them into errors.
_BROKEN = (OSError, ValueError, SyntaxError, EOFError, RuntimeError, LookupError, TypeError, struct.error, Warning)
_WARNINGS_LOCK = threading.Lock()  # warning filters are global, and training reads in threads
_16_BIT = ("PNG", "PPM")  # formats whose mode "I" holds 16 bits


def read_image(image: Any, name: str = "image") -> UInt8[np.ndarray, "h w 3"]:
    """A path, the bytes of a file, a PIL image or uint8[h, w, 3] as RGB, rotated by EXIF, transparency on white, 16-bit
    grey scaled to 8 bits. Errors call an image without a path `name`. Raises `UserError` for a file that is missing,
    truncated or no image, an image with more than `MAX_PIXELS`, values of unknown range (arrays other than uint8, PIL's
    modes "F" and "I"), and anything else.
    """
    if isinstance(image, Image.Image):
        return _rgb(image, name)
    if isinstance(image, str | Path | bytes):
        name = name if isinstance(image, bytes) else str(image)
        try:
            with _open(image) as opened:
                return _rgb(opened, name)
        except FileNotFoundError:
            raise UserError(f"{name}: no such image") from None
        except Image.DecompressionBombError:
            raise UserError(f"{name}: expected at most {MAX_PIXELS:,} pixels, got far more (scale it down)") from None
        except UnidentifiedImageError:
            raise UserError(f"{name}: not a readable image (expected one of {', '.join(FORMATS)})") from None
        except _BROKEN as error:
            raise _unreadable(name, error) from error
    dtype, shape = getattr(image, "dtype", None), tuple(getattr(image, "shape", ()))
    if dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or not all(shape):
        actual = type(image).__name__ if dtype is None else f"{dtype}{list(shape)} (levels are 0 to 255)"
        raise UserError(f"{name}: expected a path, a PIL image or uint8[h, w, 3], got {actual}")
    if shape[0] * shape[1] > MAX_PIXELS:
        raise _too_large(shape[1], shape[0], name)
    return np.asarray(image)


def count_pixels(image: str | Path | bytes) -> int:
    """Pixels by the header of a file, which is not decoded; 0 for one that `read_image` refuses as unreadable."""
    try:
        with _open(image) as opened:
            return opened.width * opened.height
    except Image.DecompressionBombError:
        return 2 * MAX_PIXELS
    except _BROKEN:
        return 0


def _open(image: str | Path | bytes) -> Image.Image:
    with _WARNINGS_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is checked by the callers
        return Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=FORMATS)


def _too_large(width: int, height: int, name: str) -> UserError:
    return UserError(f"{name}: expected at most {MAX_PIXELS:,} pixels, got {width} x {height} (scale it down)")


def _unreadable(name: str, error: Exception) -> UserError:
    return UserError(f"{name}: not a readable image ({' '.join(str(error).split())[:200]})")


def _rgb(image: Image.Image, name: str) -> UInt8[np.ndarray, "h w 3"]:
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(*image.size, name)
    file_format = image.format  # lost by exif_transpose
    try:
        image = ImageOps.exif_transpose(image)
        is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and file_format in _16_BIT)
        if image.mode in ("F", "I") and not is_16_bit:
            kind = {"F": "float", "I": "integer"}[image.mode]
            raise UserError(
                f"{name}: expected 8 or 16 bits, got {kind} grey of 32 bits, mode {image.mode}, whose range is unknown "
                "(scale it to 0 ... 255 and convert it to mode L)"
            )
        if is_16_bit:
            levels = np.clip(np.asarray(image, np.float64), 0, 65535) * (255 / 65535)
            image = Image.fromarray(np.rint(levels).astype(np.uint8))
        if image.mode != "RGB" and image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.asarray(image.convert("RGB"))
    except _BROKEN as error:
        raise _unreadable(name, error) from error


def fit(images: Sequence[UInt8[np.ndarray, "_ _ 3"]], encoder: EncoderSpec) -> UInt8[np.ndarray, "B H H 3"]:
    """RGB images of any size as the encoder's square input.

    "squash" resizes to H x H, whatever the shape; "crop" resizes the shorter edge to `shortest_edge` and takes the
    center crop; "pad" first pads to a square with the mean colour. Raises `UserError` for an image whose resized copy
    would have more than `MAX_PIXELS`.
    """
    if encoder.resize not in RESIZING:
        raise unknown("resize", encoder.resize, RESIZING)
    if encoder.interpolation not in INTERPOLATION:
        raise unknown("interpolation", encoder.interpolation, INTERPOLATION)
    side = encoder.image_size
    out = np.empty((len(images), side, side, 3), np.uint8)
    for row, image in zip(out, images, strict=True):
        row[...] = _resized(image, side, side, encoder) if encoder.resize == "squash" else _cropped(image, encoder)
    return out


def _cropped(image: UInt8[np.ndarray, "h w 3"], encoder: EncoderSpec) -> UInt8[np.ndarray, "H H 3"]:
    size, (height, width) = encoder.image_size, image.shape[:2]
    if encoder.resize == "pad":
        side = max(height, width)
        corner = [(side - n) // 2 for n in (height, width)]
        _check_size(image, side, side)
        image = _padded(image, side, side, corner, [int(x * 255) for x in encoder.pixel_mean])
        height = width = side
    edge, short = encoder.shortest_edge or size, min(height, width)
    width, height = (
        edge if width == short else edge * width // height,
        edge if height == short else edge * height // width,
    )
    image = _resized(image, width, height, encoder)
    if min(height, width) < size:  # a crop larger than the resized image: black border
        corner = [max(0, -(-(size - n) // 2)) for n in (height, width)]
        height, width = max(height, size), max(width, size)
        image = _padded(image, height, width, corner, (0, 0, 0))
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size]


def _resized(image: np.ndarray, width: int, height: int, encoder: EncoderSpec) -> np.ndarray:
    if image.shape[:2] == (height, width):
        return image
    _check_size(image, width, height)
    return np.asarray(Image.fromarray(image).resize((width, height), INTERPOLATION[encoder.interpolation]))


def _check_size(image: np.ndarray, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        old = f"{image.shape[1]} x {image.shape[0]}"
        raise UserError(f"image: {old} is too long and thin to be resized to {width} x {height} (crop it first)")


def _padded(image: np.ndarray, height: int, width: int, corner: Sequence[int], colour: Sequence[int]) -> np.ndarray:
    out = np.full((height, width, 3), colour, np.uint8)
    out[corner[0] : corner[0] + image.shape[0], corner[1] : corner[1] + image.shape[1]] = image
    return out
