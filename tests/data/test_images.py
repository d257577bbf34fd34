"""Image preprocessing equals that of the reference's processors; errors of bad files are one line."""

import dataclasses
import json
import os
import struct
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from tests.golden import peers_vision as peers
from vlm_jax.checkpoints.huggingface import processors
from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import CLIP_MEAN, CLIP_STD, EncoderSpec
from vlm_jax.data import images
from vlm_jax.models import vision
from vlm_jax.sizing import zoo

HF = np.load(Path(__file__).parents[1] / "golden/peers_vision_hf.npz")


def encoder(family: str) -> EncoderSpec:
    """As `hf_encoder` reads them from a config.json."""
    spec = EncoderSpec("test", 18, 4, 16, 3, 2, 24, interpolation="bicubic")
    clip = {"class_token": True, "pixel_mean": CLIP_MEAN, "pixel_std": CLIP_STD, "resize": "crop"}
    return dataclasses.replace(spec, **clip) if family == "clip" else spec


def prepare(pictures: list[np.ndarray], spec: EncoderSpec) -> np.ndarray:
    return images.normalise(images.fit(pictures, spec), spec)


@pytest.mark.parametrize("name", peers.PROCESSORS)
def test_pixels_are_the_processors(tmp_path, name: str) -> None:
    """Bit for bit, for images that are wide, tall, square and too small; from its own configuration file."""
    config = json.loads(str(HF[f"images/{name}/config"]))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    spec = processors.with_processor_files(encoder("siglip" if name.startswith("siglip") else "clip"), tmp_path)
    np.testing.assert_array_equal(prepare(peers.pictures(), spec), HF[f"images/{name}"])


@pytest.mark.parametrize("name", peers.PROCESSORS)
def test_the_device_normalises_as_the_host(name: str) -> None:
    """The same function of jax arrays, all of it in float32: within two roundings of the largest value."""
    config, spec = json.loads(str(HF[f"images/{name}/config"])), encoder("clip" if "siglip" not in name else "siglip")
    spec = processors.with_processor(spec, config, name)
    levels = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None], (256, 3))
    host, device = images.normalise(levels, spec), jax.jit(images.normalise, static_argnums=1)(levels, spec)
    assert host.dtype == device.dtype == np.float32
    np.testing.assert_allclose(device, host, atol=2 * np.spacing(np.abs(host).max()))


@pytest.mark.parametrize("name", ["siglip", "clip"])
def test_a_folder_without_a_processor_takes_the_familys_defaults(tmp_path, name: str) -> None:
    spec = processors.with_processor_files(encoder(name), tmp_path)
    np.testing.assert_array_equal(prepare(peers.pictures(), spec), HF[f"images/{name}"])


def test_the_processor_inside_processor_config_json_comes_first(tmp_path) -> None:
    """Newer folders hold it there; an older preprocessor_config.json beside it says nothing any more."""
    inner = json.loads(str(HF["images/siglip_bilinear/config"]))
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": inner, "processor_class": "X"}))
    assert processors.with_processor_files(encoder("siglip"), tmp_path).interpolation == "bilinear"
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**inner, "resample": 3, "image_mean": [0.9] * 3}))
    spec = processors.with_processor_files(encoder("siglip"), tmp_path)
    assert (spec.interpolation, spec.pixel_mean) == ("bilinear", (0.1, 0.2, 0.3))
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "X"}))
    spec = processors.with_processor_files(encoder("siglip"), tmp_path)
    assert (spec.interpolation, spec.pixel_mean) == ("bicubic", (0.9, 0.9, 0.9))


def test_big_visions_files_are_resized_as_there() -> None:
    """Its `resize` is bilinear with antialias, whatever the shape: every output pixel a weighted mean under a triangle
    as wide as the scale.
    """
    picture, side = peers.pictures()[0], 18
    out = picture.astype(np.float64)
    for axis in (0, 1):
        n = out.shape[axis]
        centre = (np.arange(side) + 0.5) * n / side
        weight = np.maximum(0, 1 - np.abs(np.arange(n) + 0.5 - centre[:, None]) / max(n / side, 1))
        out = np.moveaxis(np.tensordot(weight / weight.sum(1, keepdims=True), out, (1, axis)), 0, axis)
    (found,) = images.fit([picture], EncoderSpec("test", side, 4, 16, 3, 2, 24))
    assert np.abs(found - out).max() <= 1  # 8 bits, rounded after each axis


def test_a_picture_of_this_project_lies_between_minus_one_and_one() -> None:
    page = np.random.default_rng(0).integers(0, 256, (18, 18, 3)).astype(np.uint8)
    np.testing.assert_allclose(
        prepare([page], EncoderSpec("test", 18, 4, 16, 3, 2, 24))[0], page / 127.5 - 1, atol=2e-7
    )


def test_another_resolution_keeps_the_way_of_cutting() -> None:
    """Loaded for 36 pixels instead of 18, an edge of 23 becomes one of 46."""
    config = json.loads(str(HF["images/clip_large_edge/config"]))
    spec = vision.at_size(processors.with_processor(encoder("clip"), config, "x"), 36)
    assert spec == processors.with_processor(dataclasses.replace(encoder("clip"), image_size=36), config, "x")
    assert (spec.image_size, spec.shortest_edge) == (36, 46)
    assert images.fit(peers.pictures(), spec).shape == (4, 36, 36, 3)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("do_resize", False, "do_resize"),
        ("size", {"height": 18, "width": 20}, "square"),
        ("size", {"shortest_edge": 18}, "do_center_crop"),
        ("size", {"height": -18, "width": -18}, "size"),
        ("size", "large", "size='large'"),
        ("rescale_factor", None, "rescale_factor=None"),
        ("resample", 9, "resample"),
        ("image_mean", [0.5], "image_mean"),
        ("image_std", [0, 0, 0], "image_std"),
    ],
)
def test_errors_name_the_unsupported_field_of_a_processor(field: str, value: object, message: str) -> None:
    config = {"size": {"height": 18, "width": 18}, field: value}
    with pytest.raises(UserError, match=f"conf.json: .*{message}"):
        processors.with_processor(encoder("siglip"), config, "conf.json")


@pytest.mark.parametrize("resize", ["crop", "pad"])
def test_an_image_too_thin_to_be_resized_is_rejected(resize: str) -> None:
    """Its resized copy would have 336 x 33,600,000 pixels, its padded square a side of 100,000."""
    spec = dataclasses.replace(encoder("clip"), image_size=336, resize=resize)
    with pytest.raises(UserError, match="100000 x 1 is too long and thin"):
        images.fit([np.zeros((1, 100_000, 3), np.uint8)], spec)


def test_errors_name_a_processor_file_without_a_json_object(tmp_path) -> None:
    for content, message in (("{", "not valid JSON"), ("[1]", "expected an object")):
        (tmp_path / "preprocessor_config.json").write_text(content)
        with pytest.raises(UserError, match=rf"preprocessor_config\.json: {message}"):
            processors.with_processor_files(encoder("siglip"), tmp_path)


def turned(picture: np.ndarray) -> Image.Image:
    """A photograph that was taken sideways: a quarter clockwise to see it upright."""
    image = Image.fromarray(np.rot90(picture))
    image.getexif()[0x0112] = 6
    return image


def save(image: Image.Image, path: Path) -> Path:
    image.save(path, exif=image.getexif(), **({"quality": 100, "subsampling": 0} if path.suffix == ".jpg" else {}))
    return path


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_an_image_is_the_same_by_every_door(tmp_path, suffix: str) -> None:
    """By path, as the bytes of a file, as a PIL image and as an array; upright."""
    picture = peers.pictures()[0]
    path = save(turned(picture), tmp_path / f"turned.{suffix}")
    with Image.open(path) as opened:
        assert opened.size == picture.shape[:2]  # it lies on its side
        found = [images.read_image(path), images.read_image(str(path)), images.read_image(path.read_bytes())]
        found.append(images.read_image(opened))
    found.append(images.read_image(found[0]))
    for one in found:
        np.testing.assert_array_equal(one, found[0])
    assert found[0].shape == picture.shape
    assert np.abs(found[0].astype(int) - picture).mean() <= (0 if suffix == "png" else 3)


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "YCbCr"])
def test_any_mode_becomes_rgb(mode: str) -> None:
    image = Image.fromarray(peers.pictures()[0]).convert(mode)
    np.testing.assert_array_equal(images.read_image(image), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_what_is_transparent_lies_on_white(mode: str) -> None:
    """Alpha blends: 0 is white, 255 the colour, between them a weighted mean."""
    alpha = np.linspace(0, 255, 18).astype(np.uint8)[:, None].repeat(18, 1)
    blue = np.dstack([np.zeros((18, 18, 2), np.uint8), np.full((18, 18), 255, np.uint8), alpha])
    colour, image = np.array([0, 0, 255]), Image.fromarray(blue)
    if mode == "P":  # one entry of the palette is transparent
        image, alpha = Image.fromarray((alpha > 127).astype(np.uint8)), (alpha > 127) * 255
        image.putpalette([9, 9, 9, 0, 0, 255])
        image.info["transparency"] = 0
    elif mode != "RGBA":
        image = image.convert(mode)
        colour = np.asarray(image.convert("RGB"))  # of blue: its grey, or the palette's nearest
    expected = 255 + (colour - 255.0) * (alpha[..., None] / 255)
    assert np.abs(images.read_image(image) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_grey_of_16_bits_is_scaled_by_its_depth(tmp_path, mode: str) -> None:
    """0 ... 65535 to 0 ... 255, to the nearest: from a file, and as a PIL image that knows what it is."""
    levels = np.random.default_rng(0).integers(0, 65536, (9, 14))
    levels[0, :2] = 0, 65535
    expected = np.repeat(np.rint(levels / 257)[..., None], 3, axis=-1)
    if mode == "I":
        header = f"P5 {levels.shape[1]} {levels.shape[0]} 65535\n".encode()
        path = tmp_path / "deep.pgm"
        path.write_bytes(header + levels.astype(">u2").tobytes())
    else:
        path = tmp_path / "deep.png"
        image = Image.frombytes(mode, levels.shape[::-1], levels.astype(">u2" if mode[-1] == "B" else "<u2").tobytes())
        np.testing.assert_array_equal(images.read_image(image), expected)
        image.save(path)
    np.testing.assert_array_equal(images.read_image(path), expected)
    with Image.open(path) as opened:
        np.testing.assert_array_equal(images.read_image(opened), expected)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((5, 4, 3), np.int32), r"int32\[5, 4, 3\]"),
        (np.zeros((5, 4, 3), np.uint16), r"uint16\[5, 4, 3\]"),
        (np.zeros((5, 4, 3), bool), r"bool\[5, 4, 3\]"),
        (np.zeros((5, 4, 3), np.float32), r"float32\[5, 4, 3\]"),
        (np.zeros((5, 4, 3), object), r"object\[5, 4, 3\]"),
        (np.zeros((5, 4), np.uint8), r"uint8\[5, 4\]"),
        (np.zeros((5, 4, 4), np.uint8), r"uint8\[5, 4, 4\]"),
        (np.zeros((0, 4, 3), np.uint8), r"uint8\[0, 4, 3\]"),
        (Image.new("F", (4, 5)), "float grey of 32 bits"),
        (Image.new("I", (4, 5)), "integer grey of 32 bits"),
        (None, "got NoneType"),
        ([1], "got list"),
        (7, "got int"),
    ],
)
def test_values_of_unknown_range_are_rejected(image: object, message: str) -> None:
    with pytest.raises(UserError, match=f"^image 3: .*{message}"):
        images.read_image(image, "image 3")


def test_only_image_formats_are_opened(tmp_path) -> None:
    """An EPS under another name would be given to Ghostscript."""
    path = tmp_path / "page.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(UserError, match="not a readable image"):
        images.read_image(path)


def test_errors_of_bad_image_files_are_one_line(tmp_path) -> None:
    with pytest.raises(UserError, match="cannot be read: no such file"):
        images.read_image(tmp_path / "none.png")
    whole = tmp_path / "whole.png"
    Image.fromarray(peers.pictures()[0]).save(whole)
    for content in (whole.read_bytes()[:200], b"", b"not an image", whole.read_bytes()[:60]):
        (tmp_path / "bad.png").write_bytes(content)
        with pytest.raises(UserError, match=r"bad\.png: not a readable image") as message:
            images.read_image(tmp_path / "bad.png")
        assert "\n" not in str(message.value)
        with pytest.raises(UserError, match=r"^image: not a readable image"):
            images.read_image(content)
    with pytest.raises(UserError, match="expected a file, got a folder"):
        images.read_image(tmp_path)


@pytest.mark.parametrize("side", [12_000, 40_000])
def test_a_giant_image_is_rejected_unread(tmp_path, side: int) -> None:
    """A file of a hundred bytes that claims 144 or 1,600 million pixels."""
    path = tmp_path / "giant.png"
    Image.new("1", (8, 8)).save(path)
    header = b"IHDR" + struct.pack(">II", side, side) + path.read_bytes()[24:29]
    path.write_bytes(path.read_bytes()[:12] + header + struct.pack(">I", zlib.crc32(header)) + path.read_bytes()[33:])
    with pytest.raises(UserError, match=r"giant\.png: .*pixels"):
        images.read_image(path)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK", "I;16"])
def test_large_images_are_converted_in_bands(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """Of three rows each, with the levels of the whole image."""
    pixels = np.random.default_rng(0).integers(0, 256, (10, 14, 4)).astype(np.uint8)
    deep = Image.frombytes("I;16", (14, 10), pixels[..., :2].tobytes())
    image = deep if mode == "I;16" else Image.fromarray(pixels).convert(mode)
    image.getexif()[0x0112] = 6
    whole = images.read_image(image)
    monkeypatch.setattr(images, "_BAND_PIXELS", 30)
    np.testing.assert_array_equal(images.read_image(image), whole)


@pytest.mark.parametrize("size", [(1, 2**27), (2**27, 1), (1, 1001), (2002, 2)])
def test_a_long_thin_image_is_rejected_unread(size: tuple[int, int]) -> None:
    """A file of 74 bytes; decoding it would take gigabytes."""
    with pytest.raises(UserError, match=f"^image: {size[0]} x {size[1]} is too long and thin, expected at most 1000:1"):
        images.read_image(f"P6 {size[0]} {size[1]} 255\n".encode() + bytes(60))
    assert images.read_image(np.zeros((1000, 1, 3), np.uint8)).shape == (1000, 1, 3)


def test_a_colour_outside_the_levels_is_clipped() -> None:
    """The border of "pad" is the mean colour of a preprocessor_config.json, which may be any number."""
    spec = dataclasses.replace(encoder("clip"), resize="pad", image_size=4, pixel_mean=(9.0, -9.0, 1e30))
    (found,) = images.fit([np.full((2, 4, 3), 7, np.uint8)], spec)
    assert found[0].tolist() == [[255, 0, 255]] * 4
    assert found[1].tolist() == [[7, 7, 7]] * 4


@pytest.mark.parametrize("kind", ["EPS", "DDS", "ICO", "TGA", "PCX", "SGI", "JPEG2000"])
def test_other_formats_are_not_opened_under_any_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "page.png"
    Image.fromarray(peers.pictures()[0]).save(path, kind)
    with pytest.raises(UserError, match="not a readable image"):
        images.read_image(path)


def test_a_pipe_is_not_opened_as_an_image(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(UserError, match="expected a file, got a named pipe"):
        images.read_image(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["siglip-b16-224", "clip-l14-224"])
def test_one_image_has_the_pixels_of_many(name: str) -> None:
    """With and without a copy of the whole image in between, in every kind of image; normalised in float64."""
    encoder, rng = zoo.encoder(name), np.random.default_rng(0)
    whole = Image.fromarray(rng.integers(0, 256, (120, 90, 4), np.uint8))
    for mode in ("RGB", "L", "RGBA", "P", "CMYK", "1"):
        image = whole.convert("RGB").convert(mode) if mode != "RGBA" else whole
        one = images.read_and_fit(image, encoder)
        np.testing.assert_array_equal(one, images.fit([images.read_image(image)], encoder)[0])
        expected = (one * encoder.pixel_rescale).astype(np.float32) - np.float32(encoder.pixel_mean)
        np.testing.assert_array_equal(images.normalise(one, encoder), expected / np.float32(encoder.pixel_std))
