"""Data sets on disk: the same bytes every time, built once, and one line of advice where a folder is broken."""

import shutil
import threading

import numpy as np
import pytest

from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import SourceSpec
from vlm_jax.data import images
from vlm_jax.data.readers.open import open_source
from vlm_jax.studies.glyphs import source
from vlm_jax.studies.glyphs.glyph_facts.builder import GlyphFacts
from vlm_jax.studies.glyphs.source import Glyphs

TINY = (("ocr", "rows4_tiny"), ("facts", "facts_tiny"), ("scene", "two_tiny"))


def _files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def folder_of(cache_dir, family, config):
    version = "2.0.0" if family == "scene" else "1.0.0"
    return cache_dir / "data" / f"glyph_{family}" / config / version


@pytest.mark.parametrize(("family", "config"), TINY)
def test_building_twice_gives_the_same_bytes(family, config, cache_dir, tmp_path):
    again = _files(source.build(family, config, tmp_path))
    assert again == _files(folder_of(cache_dir, family, config))
    assert any("array_record" in p.name for p in again)


@pytest.mark.parametrize(("family", "config"), TINY)
@pytest.mark.parametrize("split", ["train", "test"])
def test_examples_are_the_records_of_the_builder(family, config, split, cache_dir, tmp_path):
    """Ids, questions and answers in turns, and the pixels."""
    glyphs = Glyphs(family, config, split, cache_dir)
    builder = source._locate(family, config, tmp_path)[0](config=config, data_dir=tmp_path)
    records = [record for _, record in builder._generate_examples(split)]
    assert glyphs.name == f"glyph_{family}/{config}:{split}"
    assert len(glyphs) == len(records) == {"train": 64, "test": 32}[split]
    for i, record in enumerate(records):
        example = glyphs[i]
        assert example.id == record["id"]
        assert [turn.role for turn in example.turns] == ["user", "assistant"] * len(record["questions"])
        assert [turn.text for turn in example.turns[::2]] == [f"<image>{q}" for q in record["questions"]]
        assert [turn.text for turn in example.turns[1::2]] == list(record["answers"])
    drawn = builder.chunk(split, 0, np.random.default_rng([1, ["train", "test"].index(split), 0]), len(glyphs)).images
    for i in (5, 0, 31):
        (encoded,) = glyphs[i].images
        np.testing.assert_array_equal(images.read_image(encoded, "test"), drawn[i])


def test_building_again_does_nothing(cache_dir):
    folder = folder_of(cache_dir, "ocr", "rows4_tiny")
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert source.build("ocr", "rows4_tiny", cache_dir / "data") == folder
    assert before == {p: p.stat().st_mtime_ns for p in folder.iterdir()}


def test_of_two_builds_at_once_one_waits(tmp_path, monkeypatch):
    built = []
    prepare = GlyphFacts.download_and_prepare
    monkeypatch.setattr(GlyphFacts, "download_and_prepare", lambda self, **k: built.append(1) or prepare(self, **k))
    build = {"target": source.build, "args": ("facts", "facts_tiny", tmp_path / "data")}
    threads = [threading.Thread(**build) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert built == [1]
    assert len(Glyphs("facts", "facts_tiny", "test", tmp_path)) == 32


def test_the_fingerprint_names_the_content(cache_dir):
    splits = [Glyphs(f, c, s, cache_dir) for f, c in TINY for s in ("train", "test", "train[:8]")]
    assert len({s.fingerprint for s in splits}) == len(splits)
    assert Glyphs(*TINY[0], "train", cache_dir).fingerprint == splits[0].fingerprint
    assert [splits[2][i].id for i in range(len(splits[2]))] == [splits[0][i].id for i in range(8)]


def test_a_config_opens_it_as_a_source_class(cache_dir):
    spec = SourceSpec("vlm_jax.studies.glyphs.source:Glyphs", "ocr", config="rows4_tiny", split="train", take="first:8")
    opened, split = open_source(spec, cache_dir), Glyphs("ocr", "rows4_tiny", "train", cache_dir)
    assert [opened[i] for i in range(len(opened))] == [split[i] for i in range(8)]


@pytest.mark.parametrize(
    ("family", "config", "split", "message"),
    [
        ("orc", "rows4_tiny", "train", "unknown family 'orc': did you mean 'ocr'"),
        ("ocr", "row4_tiny", "train", "unknown config of glyph_ocr 'row4_tiny': did you mean 'rows4_tiny'"),
        ("ocr", "rows4_tiny", "trian", "unknown split 'trian': did you mean 'train'"),
    ],
)
def test_unknown_names_are_rejected(family, config, split, message, cache_dir):
    with pytest.raises(UserError, match=message):
        Glyphs(family, config, split, cache_dir)


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
    Glyphs("ocr", "rows4_tiny", "train", folder)


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
def test_errors_name_a_damaged_folder_and_the_fix(damage, cache_dir, tmp_path):
    folder = folder_of(tmp_path, "ocr", "rows4_tiny")
    shutil.copytree(folder_of(cache_dir, "ocr", "rows4_tiny"), folder)
    damage(folder)
    with pytest.raises(
        UserError, match=rf"dataset folder {folder} cannot be read .*: delete it and run again"
    ) as caught:
        _build_and_load(tmp_path)
    assert "\n" not in str(caught.value)


def test_errors_name_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data folder .*file cannot be written"):
        source.build("ocr", "rows4_tiny", tmp_path / "file")
