"""Image preprocessing of training, evaluation and generation.

    levels = read_and_fit(path, encoder)                               # uint8[H, H, 3], on the host
    levels = fit([read_image(path), read_image(pil_image)], encoder)   # uint8[B, H, H, 3], the same pixels
    pixels = normalise(levels, encoder)                                # float32; `Vlm.encode` does it on the device

The fields of `EncoderSpec` decide how; they are read with the weights. Resizing is Pillow's, on 8-bit pixels, as in
Hugging Face's processors that use Pillow; those that use torchvision differ by a level or two.
"""

import contextlib
import io
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from vlm_jax.core.errors import UserError, unknown
from vlm_jax.core.reading import open_regular
from vlm_jax.core.specs import EncoderSpec
from vlm_jax.ops.pixels import normalise as normalise

MAX_PIXELS = 2**27  # of one image, as stored, padded and resized
MAX_ASPECT = 1000  # longer side over the shorter one
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")  # by content, not by file name
RESIZING = ("squash", "crop", "pad")
INTERPOLATION = {filter.name.lower(): filter for filter in Image.Resampling}
_WARNINGS_LOCK = threading.Lock()  # warning filters are global, and training reads in threads
_16_BIT = ("PNG", "PPM")  # formats whose mode "I" holds 16 bits
_BAND_PIXELS = 2**22  # larger images are converted in bands of rows, whose temporary copies are small


def read_image(image: Any, name: str = "image") -> UInt8[np.ndarray, "h w 3"]:
    """A path, the bytes of a file, a PIL image or uint8[h, w, 3] as RGB, rotated by EXIF, transparency on white, 16-bit
    grey scaled to 8 bits. Errors call an image without a path `name`. Raises `UserError` for a file that is missing,
    truncated or no image, an image with more than `MAX_PIXELS`, values of unknown range (arrays other than uint8, PIL's
    modes "F" and "I"), and anything else.
    """
    return np.asarray(_read(image, name))


def read_and_fit(image: Any, encoder: EncoderSpec, name: str = "image") -> UInt8[np.ndarray, "H H 3"]:
    """`fit` of one image of `read_image`, without a copy of the whole image in between. Raises as they do."""
    return _fit(_read(image, name), encoder)


def _read(image: Any, name: str) -> Image.Image | UInt8[np.ndarray, "h w 3"]:
    """`read_image`; a PIL image of mode RGB, decoded, where that is what is read."""
    if isinstance(image, Image.Image):
        return _rgb(image, name)
    if isinstance(image, str | Path | bytes):
        name = name if isinstance(image, bytes) else str(image)
        try:
            with _opened(image) as opened:
                return _rgb(opened, name)
        except UserError:
            raise
        except Image.DecompressionBombError:
            raise UserError(f"{name}: expected at most {MAX_PIXELS:,} pixels, got far more (scale it down)") from None
        except UnidentifiedImageError:
            raise UserError(f"{name}: not a readable image (expected one of {', '.join(FORMATS)})") from None
        except Exception as error:  # a decoder may raise anything on a bad file
            raise _unreadable(name, error) from error
    dtype, shape = getattr(image, "dtype", None), tuple(getattr(image, "shape", ()))
    if dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or not all(shape):
        actual = type(image).__name__ if dtype is None else f"{dtype}{list(shape)} (levels are 0 to 255)"
        raise UserError(f"{name}: expected a path, a PIL image or uint8[h, w, 3], got {actual}")
    _check_pixels(shape[1], shape[0], name)
    return np.asarray(image)


@contextlib.contextmanager
def _opened(image: str | Path | bytes) -> Iterator[Image.Image]:
    """An image of a promised format, of which only the header is read so far."""
    with contextlib.ExitStack() as stack:
        file = io.BytesIO(image) if isinstance(image, bytes) else stack.enter_context(open_regular(image))
        with _WARNINGS_LOCK, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is checked by the callers
            opened = Image.open(file, formats=FORMATS)
        yield stack.enter_context(opened)


def count_pixels(image: str | Path | bytes) -> int:
    """Pixels by the header of a file, which is not decoded; 0 for one that `read_image` refuses as unreadable."""
    try:
        with _opened(image) as opened:
            return opened.width * opened.height
    except Image.DecompressionBombError:
        return 2 * MAX_PIXELS
    except Exception:  # a decoder may raise anything on a bad file
        return 0


def _check_pixels(width: int, height: int, name: str) -> None:
    """Raises `UserError` for an image that is too large, or too long and thin, to be decoded."""
    if width * height > MAX_PIXELS:
        raise UserError(f"{name}: expected at most {MAX_PIXELS:,} pixels, got {width} x {height} (scale it down)")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise UserError(f"{name}: {width} x {height} is too long and thin, expected at most {MAX_ASPECT}:1 (crop it)")


def _unreadable(name: str, error: Exception) -> UserError:
    return UserError(f"{name}: not a readable image ({str(error)[:200]})")


def _rgb(image: Image.Image, name: str) -> Image.Image | UInt8[np.ndarray, "h w 3"]:
    _check_pixels(*image.size, name)
    file_format = image.format  # lost by exif_transpose
    try:
        image.load()
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode == "RGB":
            return image
        is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and file_format in _16_BIT)
        if image.mode in ("F", "I") and not is_16_bit:
            kind = {"F": "float", "I": "integer"}[image.mode]
            raise UserError(
                f"{name}: expected 8 or 16 bits, got {kind} grey of 32 bits, mode {image.mode}, whose range is unknown "
                "(scale it to 0 ... 255 and convert it to mode L)"
            )
        rows = max(_BAND_PIXELS // image.width, 1)
        if image.height <= rows:
            return _levels(image, is_16_bit)
        out = np.empty((image.height, image.width, 3), np.uint8)
        for top in range(0, image.height, rows):
            bottom = min(top + rows, image.height)
            out[top:bottom] = _levels(image.crop((0, top, image.width, bottom)), is_16_bit)
        return out
    except UserError:
        raise
    except Exception as error:  # a decoder may raise anything on a bad file
        raise _unreadable(name, error) from error


class Header(NamedTuple):
    """What a file says about its image."""

    format: str
    mode: str
    width: int
    height: int


def header(image: str | Path | bytes) -> Header:
    """The header of a file, without decoding its pixels. Raises `UserError` for what is no image."""
    try:
        with _opened(image) as opened:
            return Header(opened.format or "", opened.mode, *opened.size)
    except UserError:
        raise
    except Exception as error:  # a decoder may raise anything on a bad file
        raise _unreadable("image" if isinstance(image, bytes) else str(image), error) from error


def _levels(image: Image.Image, is_16_bit: bool) -> UInt8[np.ndarray, "h w 3"]:
    """RGB levels of an image of any mode but 32-bit grey."""
    if is_16_bit:
        levels = np.clip(np.asarray(image, np.float64), 0, 65535) * (255 / 65535)
        image = Image.fromarray(np.rint(levels).astype(np.uint8))
    if image.mode != "RGB" and image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def fit(images: Sequence[UInt8[np.ndarray, "_ _ 3"]], encoder: EncoderSpec) -> UInt8[np.ndarray, "B H H 3"]:
    """RGB images of any size as the encoder's square input.

    "squash" resizes to H x H, whatever the shape; "crop" resizes the shorter edge to `shortest_edge` and takes the
    center crop; "pad" first pads to a square with the mean colour. Raises `UserError` for an image whose resized copy
    would have more than `MAX_PIXELS`.
    """
    side = encoder.image_size
    out = np.empty((len(images), side, side, 3), np.uint8)
    for row, image in zip(out, images, strict=True):
        row[...] = _fit(image, encoder)
    return out


def _fit(image: Image.Image | UInt8[np.ndarray, "h w 3"], encoder: EncoderSpec) -> UInt8[np.ndarray, "H H 3"]:
    if encoder.resize not in RESIZING:
        raise unknown("resize", encoder.resize, RESIZING)
    if encoder.interpolation not in INTERPOLATION:
        raise unknown("interpolation", encoder.interpolation, INTERPOLATION)
    side, is_array = encoder.image_size, isinstance(image, np.ndarray)
    if encoder.resize == "squash" and is_array and image.shape[:2] == (side, side):
        return image
    picture = Image.fromarray(image) if is_array else image
    return (
        _cropped(picture, encoder) if encoder.resize != "squash" else np.asarray(_resized(picture, side, side, encoder))
    )


def _cropped(picture: Image.Image, encoder: EncoderSpec) -> UInt8[np.ndarray, "H H 3"]:
    size, (width, height) = encoder.image_size, picture.size
    if encoder.resize == "pad":
        side = max(height, width)
        _check_size(picture, side, side)
        square = Image.new("RGB", (side, side), tuple(min(max(int(x * 255), 0), 255) for x in encoder.pixel_mean))
        square.paste(picture, ((side - width) // 2, (side - height) // 2))
        picture, height, width = square, side, side
    edge, short = encoder.shortest_edge or size, min(height, width)
    width, height = (
        edge if width == short else edge * width // height,
        edge if height == short else edge * height // width,
    )
    # A crop larger than the resized image gets a black border.
    left, top = ((n - size) // 2 if n >= size else -((size - n + 1) // 2) for n in (width, height))
    return np.asarray(_resized(picture, width, height, encoder).crop((left, top, left + size, top + size)))


def _resized(picture: Image.Image, width: int, height: int, encoder: EncoderSpec) -> Image.Image:
    _check_size(picture, width, height)
    if picture.size != (width, height):
        picture = picture.resize((width, height), INTERPOLATION[encoder.interpolation])
    return picture


def _check_size(picture: Image.Image, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        old = f"{picture.width} x {picture.height}"
        raise UserError(f"image: {old} is too long and thin to be resized to {width} x {height} (crop it first)")
