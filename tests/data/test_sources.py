"""Data sets on disk: the same bytes every time, built once, and one line of advice where a folder is broken."""

import shutil
import threading

import numpy as np
import pytest

from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import DataSpec
from vlm_jax.data import glyph_tokenizer, pipeline, sources
from vlm_jax.studies.glyphs.glyph_facts.builder import GlyphFacts

from .conftest import TINY


def _files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(("dataset", "config"), TINY)
def test_building_twice_gives_the_same_bytes(dataset, config, data_dir, tmp_path):
    again = _files(sources.build(dataset, config, tmp_path))
    assert again == _files(data_dir / dataset / config / "1.0.0")
    assert any("array_record" in p.name for p in again)


@pytest.mark.parametrize(("dataset", "config"), TINY)
@pytest.mark.parametrize("name", ["train", "test"])
def test_a_split_holds_the_records_of_its_builder(dataset, config, name, data_dir, tmp_path):
    split = sources.load(dataset, config, name, data_dir)
    builder = sources._locate(dataset, config, tmp_path)[0](config=config, data_dir=tmp_path)
    records = [record for _, record in builder._generate_examples(name)]
    assert split.ids == tuple(r["id"] for r in records)
    assert split.family == dataset.removeprefix("glyph_")
    assert split.name == f"{dataset}/{config}:{name}"
    assert split.examples == len(records) == {"train": 64, "test": 32}[name]
    for i, record in enumerate(records):
        for k, (question, answer) in enumerate(zip(record["questions"], record["answers"], strict=True)):
            tokens = split.question_tokens[i, k]
            assert tokens[: split.question_lengths[i, k]].tolist() == glyph_tokenizer.encode(question)
            assert not tokens[split.question_lengths[i, k] :].any()
            tokens = split.answer_tokens[i, k, : split.answer_lengths[i, k]].tolist()
            assert tokens == [*glyph_tokenizer.encode(answer), glyph_tokenizer.END_ID]
    chosen = np.array([5, 0, 31])
    drawn = builder.chunk(name, 0, np.random.default_rng([1, ["train", "test"].index(name), 0]), split.examples).images
    np.testing.assert_array_equal(split.images(chosen), drawn[chosen])


def test_building_again_does_nothing(data_dir):
    folder = data_dir / "glyph_ocr" / "rows4_tiny" / "1.0.0"
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert sources.build("glyph_ocr", "rows4_tiny", data_dir) == folder
    assert before == {p: p.stat().st_mtime_ns for p in folder.iterdir()}


def test_of_two_that_build_at_once_one_waits(tmp_path, monkeypatch):
    built = []
    prepare = GlyphFacts.download_and_prepare
    monkeypatch.setattr(GlyphFacts, "download_and_prepare", lambda self, **k: built.append(1) or prepare(self, **k))
    threads = [threading.Thread(target=sources.build, args=("glyph_facts", "facts_tiny", tmp_path)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert built == [1]
    assert sources.load("glyph_facts", "facts_tiny", "test", tmp_path).examples == 32


def test_the_fingerprint_names_the_content(data_dir):
    splits = [sources.load(d, c, s, data_dir) for d, c in TINY for s in ("train", "test", "train[:8]")]
    assert len({s.sha256 for s in splits}) == len(splits)
    assert sources.load(*TINY[0], "train", data_dir).sha256 == splits[0].sha256
    assert splits[2].ids == splits[0].ids[:8]


def test_pixels_reach_the_batch(data_dir):
    split = sources.load("glyph_scene", "two_tiny", "train", data_dir)
    spec = DataSpec("glyph_scene", "two_tiny", "train", "test", 4, 2, pipeline.longest_row(split, 2), False)
    inputs, _ = next(pipeline.train_batches(split, spec, 0, pipeline.RowLayout(4)))
    assert inputs.views.features is None
    assert inputs.views.pixels.dtype == np.uint8
    ids = pipeline.drawn_ids(split, spec, 0, 1)
    np.testing.assert_array_equal(inputs.views.pixels[:, 0], split.images(np.array([split.ids.index(i) for i in ids])))


@pytest.mark.parametrize(
    ("dataset", "config", "split", "message"),
    [
        ("glyph_orc", "rows4_tiny", "train", "unknown dataset 'glyph_orc': did you mean 'glyph_ocr'"),
        ("glyph_ocr", "row4_tiny", "train", "unknown config of glyph_ocr 'row4_tiny': did you mean 'rows4_tiny'"),
        ("glyph_ocr", "rows4_tiny", "trian", "unknown split 'trian': did you mean 'train'"),
        ("glyph_ocr", "rows4", "train", "does not exist: build glyph_ocr/rows4"),
    ],
)
def test_unknown_names_are_rejected(dataset, config, split, message, data_dir):
    with pytest.raises(UserError, match=message):
        sources.load(dataset, config, split, data_dir)


def _empty(folder):
    for path in folder.iterdir():
        path.unlink()


def _truncate(pattern):
    def damage(folder):
        for path in folder.glob(pattern):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return damage


def _remove(pattern):
    return lambda folder: [path.unlink() for path in folder.glob(pattern)]


def _other_recipe(folder):
    (folder / "metadata.json").write_text('{"identity": "of another version"}')


def _build_and_load(folder):
    sources.build("glyph_ocr", "rows4_tiny", folder)
    sources.load("glyph_ocr", "rows4_tiny", "train", folder)


@pytest.mark.parametrize(
    "damage",
    [
        _empty,
        _truncate("*array_record*"),
        _truncate("dataset_info.json"),
        _truncate("metadata.json"),
        _remove("*train.array_record*"),
        _remove("metadata.json"),
        _remove("dataset_info.json"),
        _other_recipe,
    ],
)
def test_errors_name_a_damaged_folder_and_the_fix(damage, data_dir, tmp_path):
    folder = tmp_path / "glyph_ocr" / "rows4_tiny" / "1.0.0"
    shutil.copytree(data_dir / "glyph_ocr" / "rows4_tiny" / "1.0.0", folder)
    damage(folder)
    with pytest.raises(
        UserError, match=rf"dataset folder {folder} cannot be read .*: delete it and run again"
    ) as caught:
        _build_and_load(tmp_path)
    assert "\n" not in str(caught.value)


def test_errors_name_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data folder .*file cannot be written"):
        sources.build("glyph_ocr", "rows4_tiny", tmp_path / "file")
