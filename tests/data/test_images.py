"""Image files to pixels, against what the reference's own processors make of them, and bad files told in one line."""

import dataclasses
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.golden import peers_vision as peers
from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import CLIP_MEAN, CLIP_STD, EncoderSpec
from vlm_jax.data import images

HF = np.load(Path(__file__).parents[1] / "golden/peers_vision_hf.npz")


def encoder(family: str) -> EncoderSpec:
    spec = EncoderSpec("test", 18, 4, 16, 3, 2, 24)
    clip = {"class_token": True, "pixel_mean": CLIP_MEAN, "pixel_std": CLIP_STD}
    return dataclasses.replace(spec, **clip) if family == "clip" else spec


@pytest.mark.parametrize("name", peers.PROCESSORS)
def test_pixels_are_the_processors(tmp_path, name: str) -> None:
    """Bit for bit, for images that are wide, tall, square and too small; from its own configuration file."""
    config = json.loads(str(HF[f"images/{name}/config"]))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    spec = images.image_spec(tmp_path, encoder("siglip" if name.startswith("siglip") else "clip"))
    np.testing.assert_array_equal(images.prepare(peers.pictures(), spec), HF[f"images/{name}"])


@pytest.mark.parametrize("name", ["siglip", "clip"])
def test_a_folder_without_a_processor_takes_the_familys_defaults(tmp_path, name: str) -> None:
    spec = images.image_spec(tmp_path, encoder(name))
    np.testing.assert_array_equal(images.prepare(peers.pictures(), spec), HF[f"images/{name}"])


def test_processor_config_json_of_newer_folders_is_read(tmp_path) -> None:
    inner = json.loads(str(HF["images/siglip_bilinear/config"]))
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": inner, "processor_class": "X"}))
    assert images.image_spec(tmp_path, encoder("siglip")).interpolation == "bilinear"


def test_a_picture_of_this_project_lies_between_minus_one_and_one() -> None:
    page = np.random.default_rng(0).integers(0, 256, (18, 18, 3)).astype(np.uint8)
    np.testing.assert_allclose(
        images.prepare([page], images.run_spec(encoder("siglip")))[0], page / 127.5 - 1, atol=2e-7
    )


def test_another_resolution_keeps_the_way_of_cutting() -> None:
    """Loaded for 36 pixels instead of 18, an edge of 23 becomes one of 46."""
    config = json.loads(str(HF["images/clip_large_edge/config"]))
    spec = images.spec_from_processor(config, "x", dataclasses.replace(images.default_spec(encoder("clip")), size=36))
    assert (spec.size, spec.shortest) == (36, 46)
    assert images.prepare(peers.pictures(), spec).shape == (4, 36, 36, 3)


@pytest.mark.parametrize(
    ("field", "value", "told"),
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
def test_what_a_processor_asks_and_we_do_not_do_is_named(field: str, value: object, told: str) -> None:
    config = {"size": {"height": 18, "width": 18}, field: value}
    with pytest.raises(UserError, match=f"conf.json: .*{told}"):
        images.spec_from_processor(config, "conf.json", images.default_spec(encoder("siglip")))


def test_an_image_that_is_too_thin_to_be_scaled_is_told() -> None:
    with pytest.raises(UserError, match="100000 x 1 is too long and thin"):
        images.prepare(
            [np.zeros((1, 100_000, 3), np.uint8)], dataclasses.replace(images.default_spec(encoder("clip")), size=336)
        )


def test_a_processor_file_that_is_no_json_is_told(tmp_path) -> None:
    for content, told in (("{", "not valid JSON"), ("[1]", "an object is wanted")):
        (tmp_path / "preprocessor_config.json").write_text(content)
        with pytest.raises(UserError, match=rf"preprocessor_config\.json: {told}"):
            images.image_spec(tmp_path, encoder("siglip"))


def test_any_mode_becomes_rgb(tmp_path) -> None:
    """Greyscale, transparent, palette and 16-bit files, and a photograph that was taken sideways."""
    picture = peers.pictures()[0]
    grey = Image.fromarray(picture).convert("L")
    for mode in ("L", "RGBA", "P", "1"):
        Image.fromarray(picture).convert(mode).save(tmp_path / "one.png")
        assert images.read_image(tmp_path / "one.png").shape == picture.shape
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(images.read_image(tmp_path / "deep.png")[..., 0], np.asarray(grey))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to see it upright
    Image.fromarray(picture).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(images.read_image(tmp_path / "turned.png"), np.rot90(picture, -1))


def test_bad_image_files_are_told_in_one_line(tmp_path) -> None:
    with pytest.raises(UserError, match="no such image"):
        images.read_image(tmp_path / "none.png")
    whole = tmp_path / "whole.png"
    Image.fromarray(peers.pictures()[0]).save(whole)
    for content in (whole.read_bytes()[:200], b"", b"not an image", whole.read_bytes()[:60]):
        (tmp_path / "bad.png").write_bytes(content)
        with pytest.raises(UserError, match=r"bad\.png: not a readable image") as told:
            images.read_image(tmp_path / "bad.png")
        assert "\n" not in str(told.value)
    with pytest.raises(UserError, match="not a readable image"):
        images.read_image(tmp_path)


@pytest.mark.parametrize("side", [12_000, 40_000])
def test_a_giant_image_is_refused_unread(tmp_path, side: int) -> None:
    """A file of a hundred bytes that claims 144 or 1,600 million pixels."""
    path = tmp_path / "giant.png"
    Image.new("1", (8, 8)).save(path)
    header = b"IHDR" + struct.pack(">II", side, side) + path.read_bytes()[24:29]
    path.write_bytes(path.read_bytes()[:12] + header + struct.pack(">I", zlib.crc32(header)) + path.read_bytes()[33:])
    with pytest.raises(UserError, match=r"giant\.png: .*pixels"):
        images.read_image(path)
