"""Stored features are the live encoder's, computed once."""

import dataclasses
import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from tests import builders
from vlm_jax.compress import catalog
from vlm_jax.compress.contract import encoder_for
from vlm_jax.core.errors import UserError
from vlm_jax.core.structs import Views, Visual
from vlm_jax.data import features
from vlm_jax.models.vlm import Vlm

COUNT = 130  # more than the store encodes at once


class Counted:
    """An encoder, its images, and how often it ran."""

    def __init__(self, encode):
        self.calls, self.encode = 0, encode
        self.pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 16, 16, 3)).astype(np.uint8)

    def __call__(self, image: np.ndarray) -> Visual:
        self.calls += 1
        return self.encode(image)

    def open(self, root, name: str = "key"):
        return self.store(root, name).read

    def store(self, root, name: str = "key", bad: tuple[int, ...] = ()) -> features.Stored:
        def pixels(number: int) -> np.ndarray:
            if number in bad:
                raise UserError(f"image {number}: not an image")
            return self.pixels[number]

        images = features.Images(len(self.pixels), lambda n: self.pixels[n].tobytes(), pixels, 16, "test")
        return features.open_or_compute(root, name, images, self)


@pytest.fixture(scope="module")
def encode():
    model = Vlm(builders.model(), builders.COMPUTE)
    params = builders.params(model)
    return jax.jit(lambda image: model.encode(params, image))


def brightness(image: np.ndarray, factor: float = 1.0) -> Visual:
    """An encoder without parameters and without taps."""
    return Visual(factor * image.reshape(len(image), 16, 48).astype(np.float32) / 255)


def test_features_are_the_encoders_to_the_rounding_of_float16(tmp_path, encode) -> None:
    """Every example, tokens and taps, in any order: half a unit in the last of eleven bits, relative."""
    counted = Counted(encode)
    read = counted.open(tmp_path)
    order = np.random.default_rng(1).permutation(COUNT)
    live, stored = encode(counted.pixels[order]), read(order)
    assert stored.tokens.dtype == np.float16
    for a, b in zip((live.tokens, live.taps), (stored.tokens, stored.taps), strict=True):
        np.testing.assert_allclose(b.astype(np.float32), a, rtol=2.0**-11 * 1.01, atol=1e-5)


def test_the_second_open_computes_nothing(tmp_path) -> None:
    """Only the check against the live encoder runs, and no file is touched."""
    first, second = Counted(brightness), Counted(brightness)
    first.open(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "key").iterdir()}
    read = second.open(tmp_path)
    assert (first.calls, second.calls) == (2 + 1, 1)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "key").iterdir()} == before
    assert read(np.arange(2)).taps is None


def test_of_two_at_once_one_computes(tmp_path) -> None:
    both = [Counted(brightness), Counted(brightness)]
    with ThreadPoolExecutor(2) as pool:
        readers = list(pool.map(lambda counted: counted.open(tmp_path), both))
    assert sorted(counted.calls for counted in both) == [1, 3]
    np.testing.assert_array_equal(readers[0](np.arange(COUNT)).tokens, readers[1](np.arange(COUNT)).tokens)


def test_what_was_half_written_is_ignored(tmp_path) -> None:
    """Neither the folder of an interrupted computation nor a folder without its last file is taken for features; a
    user's folder stays, whatever its name."""
    for name in (".key.vlm_jax-0123456789abcdef", "key.partial-1", "key"):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "tokens.npy", np.zeros((COUNT, 16, 48), np.float16))
    counted = Counted(brightness)
    read = counted.open(tmp_path)
    np.testing.assert_array_equal(read(np.arange(COUNT)).tokens, brightness(counted.pixels).tokens.astype(np.float16))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key", "key.lock", "key.partial-1"]


def test_a_folder_of_other_files_is_not_replaced(tmp_path) -> None:
    (tmp_path / "key").mkdir()
    (tmp_path / "key" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"key: expected features with their meta\.json"):
        Counted(brightness).open(tmp_path)
    assert (tmp_path / "key" / "notes.txt").read_text() == "mine"


def test_a_full_disk_is_an_error_before_the_memory_map_is_written(tmp_path, monkeypatch) -> None:
    """Without space for its pages, writing to a map ends the process with SIGBUS."""

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        Counted(brightness).open(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["key.lock"]


def test_an_encoder_that_fails_leaves_no_features(tmp_path) -> None:
    def fails(image: np.ndarray) -> Visual:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        Counted(fails).open(tmp_path)
    assert not (tmp_path / "key").exists()
    Counted(brightness).open(tmp_path)


def test_features_of_another_encoder_are_refused(tmp_path) -> None:
    Counted(brightness).open(tmp_path)
    with pytest.raises(UserError, match=r"stored features differ from the encoder by .*: delete the folder"):
        Counted(lambda image: brightness(image, 1.02)).open(tmp_path)


def test_a_truncated_store_is_told(tmp_path) -> None:
    Counted(brightness).open(tmp_path)
    path = tmp_path / "key" / "tokens.npy"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"key: unreadable features .* delete the folder"):
        Counted(brightness).open(tmp_path)


def test_the_key_names_what_features_depend_on() -> None:
    """Images, encoder and taps: another key for each, and the same key for the same."""
    keys = [
        features.key(*of) for of in (("a", "b", {"x": 1}), ("c", "b", {"x": 1}), ("a", "c", {"x": 1}), ("a", "b", {}))
    ]
    assert len(set(keys)) == 4
    assert features.key("a", "b", {"x": 1}) == keys[0]


def test_meta_says_where_they_come_from(tmp_path) -> None:
    Counted(brightness).open(tmp_path)
    assert json.loads((tmp_path / "key" / "meta.json").read_text()) == {"images": COUNT, "source": "test"}


def test_equal_files_share_a_row(tmp_path) -> None:
    """130 images of which 4 are different: one batch, and four rows on disk."""
    counted = Counted(brightness)
    counted.pixels = counted.pixels[np.random.default_rng(0).integers(0, 4, COUNT)]
    read = counted.open(tmp_path)
    assert counted.calls == 1 + 1  # and the check
    assert np.load(tmp_path / "key" / "tokens.npy").shape == (4, 16, 48)
    order = np.random.default_rng(1).permutation(COUNT)
    np.testing.assert_array_equal(read(order).tokens, brightness(counted.pixels[order]).tokens.astype(np.float16))


@pytest.mark.parametrize("bad", [(3,), (0, COUNT - 1), tuple(range(128))])
def test_images_that_cannot_be_decoded_are_zero_and_named(bad: tuple[int, ...], tmp_path) -> None:
    """The first, the last, or a whole batch of them; equal files are bad together."""
    counted = Counted(brightness)
    counted.pixels[4] = counted.pixels[3]
    store = counted.store(tmp_path, bad=(*bad, 4) if 3 in bad else bad)
    assert sorted(store.bad) == sorted({*bad, *([4] if 3 in bad else [])})
    assert store.bad[bad[0]] == f"image {bad[0]}: not an image"
    good = np.array([n for n in range(COUNT) if n not in store.bad])
    assert not store.read(np.array(sorted(store.bad))).tokens.any()
    np.testing.assert_array_equal(store.read(good).tokens, brightness(counted.pixels[good]).tokens.astype(np.float16))
    again = Counted(brightness)
    again.pixels = counted.pixels
    assert again.store(tmp_path, bad=bad).bad == store.bad


def test_a_source_without_a_readable_image_is_an_error(tmp_path) -> None:
    with pytest.raises(UserError, match=r"^test: expected a readable image, got none \(image 0: not an image\)"):
        Counted(brightness).store(tmp_path, bad=tuple(range(COUNT)))


@pytest.fixture(scope="module", params=["heads", "width"])
def selecting(request):
    """A model of a compressor that chooses tokens by keys and salience, its parameters and its features."""
    spec = builders.model({"heads": "vision_zip", "width": "prumerge"}[request.param], 5)
    encoder = dataclasses.replace(builders.ENCODER, class_token=True, feature_layer=2)
    encoder = dataclasses.replace(encoder_for(catalog.row(spec.compressor.name), encoder), taps=(1, 3))
    vlm = Vlm(dataclasses.replace(spec, encoder=encoder), builders.COMPUTE)
    params = builders.params(vlm)
    return vlm, params, jax.jit(lambda image: vlm.features(params, image))


def test_what_the_compressor_reads_is_stored_and_nothing_else(tmp_path, selecting) -> None:
    """Keys and salience as the encoder gives them, since a rounded value would choose other tokens."""
    vlm, _, encode = selecting
    counted = Counted(encode)
    read, live = counted.open(tmp_path), encode(counted.pixels)
    reads = catalog.row(vlm.spec.compressor.name).reads
    files = {path.stem for path in (tmp_path / "key").glob("*.npy")}
    assert files == {"index"} | (reads & set(Visual._fields))
    stored = read(np.arange(COUNT))
    assert stored.taps is None  # which the encoder has, and this compressor does not read
    for field in ("keys", "salience"):
        assert getattr(stored, field).dtype == np.float32
        np.testing.assert_allclose(getattr(stored, field), getattr(live, field), rtol=1e-5, atol=1e-7)


def test_stored_features_give_the_logits_of_pixels(tmp_path, selecting) -> None:
    """Of every image, to the rounding of float16: no other token is chosen."""
    vlm, params, encode = selecting
    counted = Counted(encode)
    read = counted.open(tmp_path)
    rows = builders.inputs(rows=COUNT, questions=1, visual_tokens=5)
    features = jax.tree.map(lambda leaf: leaf[:, None], read(np.arange(COUNT)))
    forward = jax.jit(lambda inputs: vlm.forward(params, inputs)[0])
    live = forward(rows._replace(views=Views(counted.pixels[:, None])))
    stored = forward(rows._replace(views=Views(features=features)))
    np.testing.assert_allclose(stored, live, atol=4e-3 * float(np.abs(live).max()))


def test_a_field_that_is_missing_or_left_over_is_told(tmp_path, selecting) -> None:
    _, _, encode = selecting
    Counted(encode).open(tmp_path)
    (tmp_path / "key" / "salience.npy").rename(tmp_path / "salience.npy")
    with pytest.raises(UserError, match=r"key: has no salience: delete the folder"):
        Counted(encode).open(tmp_path)
    (tmp_path / "salience.npy").rename(tmp_path / "key" / "salience.npy")
    with pytest.raises(UserError, match=r"key: has, beside what is read, keys: delete the folder"):
        Counted(lambda image: encode(image)._replace(keys=None)).open(tmp_path)
