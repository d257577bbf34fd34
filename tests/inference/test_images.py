"""One door for images: by path, as a PIL image, as an array, in a training batch and through `forward`, the same
pixels, prepared as the weights' own files say.
"""

import base64
import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import vlm_jax
from tests import builders
from tests.data import mixtures
from tests.golden import peers_answers, peers_text, peers_vision
from tests.golden.drawn import weights
from vlm_jax import export
from vlm_jax.checkpoints.huggingface import exporting, processors
from vlm_jax.core.errors import UserError
from vlm_jax.data import images
from vlm_jax.data.views import read_pixels
from vlm_jax.inference import prompts
from vlm_jax.models.vlm import Vlm

CASES = peers_answers.read()
SIDE = peers_answers.SIDE


def folder(place: Path, **processor: Any) -> Path:
    """LLaVA's, whose processor says something else than CLIP's usual."""
    case = CASES["llava"]
    config = json.loads(base64.b64decode(case["files"]["processor_config.json"]))
    config["image_processor"] |= processor
    files = {**case["files"], "processor_config.json": base64.b64encode(json.dumps(config).encode()).decode()}
    peers_text.write(files, place)
    save_file(weights(case["shapes"]), place / "model.safetensors")
    return place


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> vlm_jax.Model:
    """Mean and deviation of one half, a bilinear filter, and a crop that is not the whole of its edge."""
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return vlm_jax.load(folder(tmp_path_factory.mktemp("half"), **half, resample=2, size={"shortest_edge": SIDE + 3}))


def sideways(path: Path) -> Path:
    """A photograph that was taken with the camera on its side."""
    image = Image.fromarray(peers_vision.pictures()[0])
    image.getexif()[0x0112] = 6
    image.save(path, exif=image.getexif())
    return path


def by_training(path: Path, model: vlm_jax.Model) -> np.ndarray:
    """The second image of a data set, by path."""
    dataset = mixtures.dataset([mixtures.example("a", "<image> <image> 5 | 6", [path.read_bytes(), path])])
    return read_pixels(dataset, np.array([1]), model.spec.encoder)


def prepared(model: vlm_jax.Model, given: Any) -> np.ndarray:
    """The one image of the one row."""
    return prompts.images_by_row(model, given, 1)[0][0][None]


DOORS = {
    "path": lambda path, model: prepared(model, [path]),
    "name": lambda path, model: prepared(model, [str(path)]),
    "bytes": lambda path, model: prepared(model, [path.read_bytes()]),
    "pil": lambda path, model: prepared(model, [Image.open(io.BytesIO(path.read_bytes()))]),
    "array": lambda path, model: prepared(model, [upright(path)]),
    "device array": lambda path, model: prepared(model, jax.numpy.asarray(upright(path))[None]),
    "training": by_training,
}


def upright(path: Path) -> np.ndarray:
    """A quarter clockwise, as orientation 6 says."""
    with Image.open(path) as image:
        return np.rot90(np.asarray(image), -1)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("door", DOORS)
def test_every_door_gives_the_same_pixels(model: vlm_jax.Model, tmp_path: Path, door: str, suffix: str) -> None:
    """Those of Pillow's own steps: turn, scale the shorter edge to 15, cut 12 x 12 out of the middle."""
    path = sideways(tmp_path / f"photograph.{suffix}")
    whole = upright(path)
    height, width = whole.shape[:2]
    assert height > width
    scaled = Image.fromarray(whole).resize((15, 15 * height // width), Image.Resampling.BILINEAR)
    top, left = (scaled.height - SIDE) // 2, (15 - SIDE) // 2
    wanted = np.asarray(scaled)[None, top : top + SIDE, left : left + SIDE]
    found = DOORS[door](path, model)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, wanted)


def test_forward_prepares_as_the_folder_says(model: vlm_jax.Model, tmp_path: Path) -> None:
    """Paths, images and levels give the logits of floats between -1 and 1, not of CLIP's usual mean and deviation."""
    path = sideways(tmp_path / "photograph.png")
    tokens = np.array(CASES["llava"]["input_ids"])[:1]
    levels = prepared(model, [path])
    wanted = vlm_jax.forward(model, (levels / 127.5 - 1).astype(np.float32), tokens)
    for given in ([path], [Image.open(path)], [upright(path)], upright(path)[None]):
        np.testing.assert_allclose(vlm_jax.forward(model, given, tokens), wanted, atol=1e-5)
    encoder = dataclasses.replace(model.spec.encoder, pixel_mean=(0.48, 0.46, 0.41), pixel_std=(0.27, 0.26, 0.28))
    other = vlm_jax.forward(model, images.normalise(levels, encoder), tokens)
    assert np.abs(other - wanted).max() > 1e-2


def test_encode_normalises_levels_itself(model: vlm_jax.Model) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3)).astype(np.uint8)
    encode = jax.jit(Vlm(model.spec, model.compute).encode)
    found, wanted = (encode(model.params, given).tokens for given in (levels, levels.astype(np.float32) / 127.5 - 1))
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_generate_prepares_images_once(model: vlm_jax.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prepared image is smaller than the edge that is cropped: preparing it again would cut it again."""
    picture = peers_vision.pictures()[0]
    assert model.spec.encoder.shortest_edge > model.spec.encoder.image_size
    seen, inputs_of = [], prompts.inputs_of
    monkeypatch.setattr(prompts, "inputs_of", lambda *given: seen.append(inputs_of(*given)) or seen[-1])
    vlm_jax.generate(model, [picture], ["What?"], 2)
    (inputs,) = seen
    np.testing.assert_array_equal(inputs.views.pixels[0, 0], images.fit([picture], model.spec.encoder)[0])


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint16, np.int8, bool, object])
def test_levels_of_other_widths_are_refused_by_name(model: vlm_jax.Model, kind: type) -> None:
    """Neither white, nor black, nor taken for normalised."""
    tokens = np.array(CASES["llava"]["input_ids"])[:1]
    batch = np.zeros((1, SIDE, SIDE, 3), kind)
    message = rf"^images\[0\]: expected .* got {np.dtype(kind)}\[12, 12, 3\]"
    for given in (batch, list(batch)):
        with pytest.raises(UserError, match=message):
            vlm_jax.forward(model, given, tokens)
        with pytest.raises(UserError, match=message):
            vlm_jax.generate(model, given, ["What?"])


def test_another_resolution_keeps_the_folders_way(model: vlm_jax.Model, tmp_path: Path) -> None:
    """At 24 pixels the shorter edge has 30, as 15 at 12."""
    half = {"image_mean": [0.5] * 3, "size": {"shortest_edge": SIDE + 3}}
    encoder = vlm_jax.load(folder(tmp_path, **half), image_size=2 * SIDE).spec.encoder
    assert (encoder.image_size, encoder.shortest_edge, encoder.pixel_mean) == (24, 30, (0.5, 0.5, 0.5))


def test_a_big_vision_file_without_a_processor_is_bilinear(tmp_path: Path) -> None:
    """As big_vision resizes; beside a processor's file, as that says."""
    source = peers_text.write(CASES["paligemma"]["files"], tmp_path / "folder")
    save_file(weights(CASES["paligemma"]["shapes"]), source / "model.safetensors")
    export.main(["--model", str(source), "--out", str(tmp_path / "alone" / "model.npz")])
    encoder = vlm_jax.load(tmp_path / "alone" / "model.npz").spec.encoder
    assert (encoder.resize, encoder.interpolation, encoder.pixel_std) == ("squash", "bilinear", (0.5, 0.5, 0.5))
    shutil.copy(source / "processor_config.json", tmp_path / "alone")
    assert vlm_jax.load(tmp_path / "alone" / "model.npz").spec.encoder.interpolation == "bicubic"
    assert processors.with_processor_files(encoder, source).interpolation == "bicubic"


@pytest.mark.parametrize("resize", images.RESIZING)
def test_an_exported_folder_says_how_images_are_prepared(tmp_path: Path, resize: str) -> None:
    """What a run was trained on is what the folder is asked with."""
    preparation = {"pixel_mean": (0.1, 0.2, 0.3), "pixel_std": (0.4, 0.5, 0.6), "pixel_rescale": 1 / 127}
    edge = 0 if resize == "squash" else 19
    encoder = dataclasses.replace(
        builders.ENCODER, taps=(), resize=resize, interpolation="box", shortest_edge=edge, **preparation
    )
    spec = dataclasses.replace(builders.model(), encoder=encoder)
    params = builders.params(Vlm(spec, builders.COMPUTE))
    exporting.save_folder(tmp_path / "out", exporting.part_of(spec, "encoder"), params)
    assert processors.with_processor_files(dataclasses.replace(builders.ENCODER, taps=()), tmp_path / "out") == encoder
