"""jsonl rows, TFDS folders and classes of one's own; parts of sources, and what each gives to a mixture."""

import dataclasses
import importlib.metadata
import json
import math
import os
import pickle
import sys
import tarfile
from pathlib import Path

import grain
import numpy as np
import pytest
import tensorflow_datasets as tfds

from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import SourceSpec, from_dict, to_dict
from vlm_jax.data.examples import BadItem, Example, Source, Turn
from vlm_jax.data.images import read_image
from vlm_jax.data.readers import mixture
from vlm_jax.data.readers.open import open_source
from vlm_jax.studies.glyphs.source import build

from . import traps

TINY = (("glyph_ocr", "rows4_tiny"), ("glyph_facts", "facts_tiny"))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for dataset, config in TINY:
        build(dataset.removeprefix("glyph_"), config, folder)
    return folder


PNG = traps.encoded(traps.photo(0), "PNG")


class Numbers(Source):
    """A source of one's own: number N is asked for N."""

    def __init__(self, count: int = 10, path: str = ""):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        if index == 7:
            raise BadItem("empty turn", "7")
        return Example(str(index), (PNG,) * (index % 2), (Turn("user", "Which?"), Turn("assistant", f"{index}.")))


class Unfinished(Source):
    def __len__(self) -> int:
        return 1


class Dicts(Numbers):
    def __getitem__(self, index: int):
        return {"id": str(index)}


class Failing(Numbers):
    def __init__(self):
        raise FileNotFoundError("shapes.txt\nis gone")


def jsonl(tmp_path, *rows, **fields):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_source(SourceSpec("jsonl", path=str(path), **fields), tmp_path)


def test_rows_of_big_vision(tmp_path):
    """The first of several suffixes; numbers are texts; an empty prefix is a caption; text alone is a row too."""
    (tmp_path / "a.png").write_bytes(PNG)
    source = jsonl(
        tmp_path,
        {"image": "a.png", "prefix": "answer en what?", "suffix": "a bus", "split": "x"},
        {"image": "a.png", "prefix": "", "suffix": ["a", "b"], "id": 5},
        {"image": ["a.png", "a.png"], "prefix": "compare", "suffix": 7},
        {"prefix": "say <image>", "suffix": "<image>"},
    )
    png = tmp_path / "a.png"
    assert source[0] == Example("0", (png,), (Turn("user", "<image>\nanswer en what?"), Turn("assistant", "a bus")),
                                {"split": "x"})  # fmt: skip
    assert source[1] == Example("5", (png,), (Turn("user", "<image>"), Turn("assistant", "a")))
    assert source[2].turns == (Turn("user", "<image>\n<image>\ncompare"), Turn("assistant", "7"))
    assert source[3] == Example("3", (), (Turn("user", "say <image>"), Turn("assistant", "<image>")))


def test_jsonl_rows_that_cannot_be_used(tmp_path):
    good = {"prefix": "x", "suffix": "y"}
    bad = {
        "no answer": [{"prefix": "x"}, {"prefix": "x", "suffix": []}, {"prefix": "x", "suffix": None}],
        "empty turn": [{"prefix": "x", "suffix": " "}, {"suffix": "y"}],
        "malformed": [{"prefix": {"a": 1}, "suffix": "y"}, {**good, "image": 3}],
        "missing image": [{**good, "image": "none.png"}, {**good, "image": "../" * 400}, {**good, "image": "a\0b"}],
        "placeholder without an image": [{"prefix": "<image> <image>", "suffix": "y", "image": "a.png"}],
    }
    source = jsonl(tmp_path, good, *(row for rows in bad.values() for row in rows))
    reasons = []
    for index in range(1, len(source)):
        with pytest.raises(BadItem) as caught:
            source[index]
        reasons.append(caught.value.reason)
    assert reasons == [reason for reason, rows in bad.items() for _ in rows]


def test_columns_of_jsonl_by_fields(tmp_path):
    fields = (("prefix", "answer en {question}"), ("suffix", "answers"))
    source = jsonl(tmp_path, {"question": "what?", "answers": ["a", "b"], "kind": "x"}, fields=fields)
    assert source[0] == Example("0", (), (Turn("user", "answer en what?"), Turn("assistant", "a")), {"kind": "x"})
    with pytest.raises(UserError, match="expected a column 'suffix', got answers, kind, question"):
        jsonl(tmp_path, {"question": "what?", "answers": ["a", "b"], "kind": "x"})
    with pytest.raises(UserError, match="expected a column 'asked', got suffix"):
        jsonl(tmp_path, {"suffix": "x"}, fields=(("prefix", "{asked}"),))
    with pytest.raises(UserError, match="unknown field of jsonl sources 'sufix': did you mean 'suffix'"):
        jsonl(tmp_path, {"suffix": "x"}, fields=(("sufix", "x"),))
    with pytest.raises(UserError, match="expected a folder of images, got no"):
        jsonl(tmp_path, {"suffix": "x"}, images=str(tmp_path / "none"))


@pytest.mark.parametrize(("dataset", "config"), TINY)
def test_a_tfds_folder(dataset, config, data_dir, tmp_path):
    """From the dataset's folder or its version's; the same records as TFDS's own."""
    folder = data_dir / dataset / config
    source = open_source(SourceSpec("tfds", path=str(folder), split="test"), tmp_path)
    records = tfds.builder_from_directory(folder / "1.0.0").as_data_source("test")
    assert len(source) == len(records) == 32
    source = pickle.loads(pickle.dumps(source))
    for index in (31, 0, 17):
        example, record = source[index], records[index]
        assert example.id == record["id"].decode()
        assert example.extra == {"family": dataset.removeprefix("glyph_")}
        texts = [text.decode() for pair in zip(record["questions"], record["answers"], strict=True) for text in pair]
        assert [turn.text for turn in example.turns] == [f"<image>\n{texts[0]}", *texts[1:]]
        np.testing.assert_array_equal(read_image(*example.images), record["image"])
    part = open_source(SourceSpec("tfds", path=str(data_dir / dataset), config=config, split="test[:8]"), tmp_path)
    assert len(part) == 8
    assert part.fingerprint != source.fingerprint


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """A data set with the kinds of features that TFDS writes with TensorFlow (fixtures/make_tfds.py)."""
    folder = tmp_path_factory.mktemp("kinds")
    with tarfile.open(Path(__file__).parent / "fixtures" / "tfds.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize(
    ("fields", "id", "levels", "texts"),
    [
        (dict(questions="pairs/ask", answers="pairs/replies", image="picture"), "2", [2], "Q0 A0 Q1 A1"),
        (dict(question="what is {label}?", answer="label", id="views/about"), "view 2", [], "what_is_cat? cat"),
        (dict(answer="caption", images="pictures", id="number"), "2", [20, 21], " caption_2"),
        (dict(answer="number", image="views/left"), "2", [102], " 2"),
        (dict(answer="number", question="label", image="pixels"), "2", [202], "cat 2"),
    ],
)
def test_features_by_fields(kinds, tmp_path, fields, id, levels, texts):
    """Lists of questions are turns, the first of several answers counts, labels are names, images stay encoded."""
    spec = SourceSpec("tfds", path=str(kinds), split="train", fields=tuple(fields.items()))
    example = pickle.loads(pickle.dumps(open_source(spec, tmp_path)))[2]
    assert example.id == id
    assert [(image.shape, image.min(), image.max()) for image in map(read_image, example.images)] == [
        ((4, 6, 3), level, level) for level in levels
    ]
    first, *rest = (text.replace("_", " ") for text in texts.split(" "))
    assert [turn.text for turn in example.turns] == [("<image>\n" * len(levels) + first).strip(), *rest]
    assert set(example.extra) <= {"number", "label", "views/about"}


def test_fields_that_are_no_features(kinds, tmp_path):
    for fields, message in [
        ((), "expected a column 'answer' or 'answers', got box, caption, label, number, pairs, pairs/ask"),
        ((("answer", "labels"),), "expected a column 'labels', got box, caption, label"),
        ((("reply", "label"),), "unknown field of tfds sources 'reply'"),
    ]:
        with pytest.raises(UserError, match=message):
            open_source(SourceSpec("tfds", path=str(kinds), split="train", fields=fields), tmp_path)
    asked = (("question", "pairs/ask"), ("answer", "pairs/replies"))
    with pytest.raises(BadItem, match="no answer"):
        open_source(SourceSpec("tfds", path=str(kinds), split="train", fields=asked), tmp_path)[0]


def test_errors_of_a_tfds_folder_are_one_line(kinds, tmp_path):
    def message(path, split="train"):
        with pytest.raises(UserError) as caught:
            open_source(SourceSpec("tfds", path=str(path), split=split, fields=(("answer", "label"),)), tmp_path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "unknown split of" in message(kinds, "trian")
    assert "did you mean 'train'" in message(kinds, "trian")
    assert "valid: train" in message(kinds, "")
    assert "not a readable TFDS data set" in message(kinds, "train[:x]")
    assert "expected the folder of a TFDS data set, got no such file" in message(tmp_path / "none")
    folder = tmp_path / "copy"
    folder.mkdir()
    assert "expected the folder that holds dataset_info.json, got folders nothing" in message(folder)
    for file in next(kinds.rglob("features.json")).parent.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    info = folder / "dataset_info.json"
    content = info.read_text()
    info.write_text(content.replace('"array_record"', '"tfrecord"'))
    assert "expected files in the format array_record, got tfrecord" in message(folder)
    info.write_text("{")
    assert "not a readable TFDS data set" in message(folder)
    info.write_text(content)
    next(folder.glob("*array_record*")).write_bytes(b"")
    assert "not a readable TFDS data set" in message(folder)
    (folder / "features.json").unlink()
    os.mkfifo(folder / "features.json")
    assert "features.json: expected a file or folder, got a named pipe" in message(folder)
    (tmp_path / "versions" / "1.0.²").mkdir(parents=True)  # a digit, and no number
    (tmp_path / "versions" / "b").mkdir()
    assert "got folders 1.0.², b" in message(tmp_path / "versions")


def test_a_class_of_ones_own(tmp_path, monkeypatch):
    spec = SourceSpec(f"{__name__}:Numbers", path="x", options=(("count", 12),), take="end:6")
    assert from_dict(SourceSpec, to_dict(spec), "") == spec
    source = open_source(spec, tmp_path)
    assert [source[index].id for index in range(2, 6)] == ["8", "9", "10", "11"]
    assert source.name == "Numbers"
    whole = Numbers(12)
    assert whole.fingerprint == Numbers(12).fingerprint != Numbers(11).fingerprint
    monkeypatch.setattr(sys.modules[__name__], "PNG", PNG + b"x")
    assert Numbers(12).fingerprint != whole.fingerprint
    assert grain.MapDataset.source(source)[3].id == "9"
    shuffled = grain.MapDataset.source(Numbers(7)).shuffle(seed=0)
    assert sorted(shuffled[index].id for index in range(7)) == list("0123456")


def test_an_entry_point_names_a_class(tmp_path, monkeypatch):
    point = importlib.metadata.EntryPoint("numbers", f"{__name__}:Numbers", "vlm_jax.sources")
    lost = importlib.metadata.EntryPoint("lost", "tests.data.no_such_module:Numbers", "vlm_jax.sources")
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [point, lost])
    assert len(open_source(SourceSpec("numbers", take="first:3"), tmp_path)) == 3
    with pytest.raises(UserError, match="unknown kind of source 'number': did you mean 'numbers'"):
        open_source(SourceSpec("number"), tmp_path)
    with pytest.raises(UserError, match="source 'lost': cannot be imported"):
        open_source(SourceSpec("lost"), tmp_path)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("lava", {}, "unknown kind of source 'lava': did you mean 'llava'"),
        ("", {}, "unknown kind of source ''"),
        ("tests.data.test_readers_open:Number", {}, "did you mean 'Numbers'"),
        ("tests.data.no_such_module:Numbers", {}, "cannot be imported .ModuleNotFoundError"),
        ("tests.data.test_readers_open:PNG", {}, "expected a subclass of vlm_jax.data.examples.Source, got b"),
        ("tests.data.traps:Traps", {}, "expected a subclass of vlm_jax.data.examples.Source"),
        ("tests.data.test_readers_open:Unfinished", {}, "expected the methods __getitem__"),
        ("tests.data.test_readers_open:Numbers", {"size": 3}, r"expected arguments \(count.*got size"),
        ("tests.data.test_readers_open:Numbers", {"count": 0}, "expected at least one example, got none"),
        ("tests.data.test_readers_open:Numbers", {"count": "a"}, "TypeError: 'str' object cannot"),
        ("tests.data.test_readers_open:Dicts", {}, "expected an Example from __getitem__, got dict"),
        ("tests.data.test_readers_open:Failing", {}, r"FileNotFoundError: shapes.txt is gone, at test_readers_open"),
        ("..:Numbers", {}, "cannot be imported"),
        (":Numbers", {}, "cannot be imported"),
    ],
)
def test_a_class_that_cannot_be_used_is_one_line(source, options, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        open_source(SourceSpec(source, options=tuple(options.items())), tmp_path)
    assert "\n" not in str(caught.value)


def test_a_module_with_a_syntax_error_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "broken_source.py").write_text("class Shapes(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"cannot be imported \(SyntaxError: .*broken_source.py, line 1"):
        open_source(SourceSpec("broken_source:Shapes"), tmp_path)


def test_a_source_without_a_usable_item_is_rejected(tmp_path):
    """As where the image folder is another one: at once, with the first item. One good item of a few is enough."""
    rows = [{"prefix": "x", "suffix": "y", "image": f"{number}.png"} for number in range(1000)]
    with pytest.raises(
        UserError, match=r"rows\.jsonl: expected usable items, got none of 100 .*number 0, item 0: missing"
    ):
        jsonl(tmp_path, *rows)
    assert len(jsonl(tmp_path, *rows[:50], {"prefix": "x", "suffix": "y"})) == 51


def test_the_glyph_suite_is_a_source(tmp_path):
    spec = SourceSpec("vlm_jax.studies.glyphs.source:Glyphs", path="ocr", config="rows4_tiny", split="test")
    source = open_source(spec, tmp_path)
    assert source.name == "glyph_ocr/rows4_tiny:test"
    assert source[0].turns[0].text == "<image>read row one"
    with pytest.raises(UserError, match="unknown family 'orc'"):
        open_source(dataclasses.replace(spec, path="orc"), tmp_path)


def test_a_setting_that_a_kind_does_not_use_is_rejected(tmp_path):
    with pytest.raises(UserError, match="split: sources of the kind jsonl have none, got 'train'"):
        jsonl(tmp_path, {"prefix": "x", "suffix": "y"}, split="train")


def test_parts_of_a_source():
    source = Numbers(7)

    def ids(take):
        return [int(part[index].id) for part in [mixture.taken(source, take)] for index in range(len(part))]

    assert ids("all") == ids("first:99") == ids("random:100%") == list(range(7))
    assert ids("first:2") == [0, 1]
    assert ids("end:2") == [5, 6]
    assert len(ids("random:10%")) == 1  # rounded up, as LLaVA-NeXT does
    assert len(ids("random:29%")) == math.ceil(0.29 * 7)
    assert len(mixture.taken(Numbers(100), "first:7%")) == 7  # no floating point: 100 * 0.07 > 7
    assert ids("random:3") == ids("random:3")
    assert set(ids("random:3")) < set(ids("random:5"))
    assert ids("random:3") == [1, 2, 3]  # the same on every machine and for every version of NumPy
    for wrong in (
        "",
        "half",
        "first",
        "first:",
        "first:0",
        "end:-1",
        "random:x%",
        "random:1.5",
        "last:3",
        "random:1/0",
    ):
        with pytest.raises(UserError, match="take: expected all, first:N"):
            mixture.taken(source, wrong)


@pytest.mark.parametrize(
    ("weights", "shares", "counts"),
    [
        ([1, 1], [0, 0], [1000, 10]),
        ([0.5, 3], [0, 0], [500, 30]),
        ([1, 1], [0, 0.5], [1000, 1000]),  # as many as the rest of the epoch
        ([2, 1], [0, 0.2], [2000, 500]),
        ([1, 1], [0.25, 0.75], [252, 758]),  # an epoch of 1,010; 252.5 and 757.5
        ([1, 1], [0.9, 0.1], [909, 101]),
    ],
)
def test_examples_of_a_mixtures_epoch(weights, shares, counts):
    specs = [SourceSpec("x", weight=float(w), share=float(s)) for w, s in zip(weights, shares, strict=True)]
    found = mixture.epoch_counts(specs, [1000, 10])
    assert sum(found) == sum(counts)
    assert all(abs(a - b) <= 1 for a, b in zip(found, counts, strict=True))


@pytest.mark.parametrize(
    ("weights", "shares", "message"),
    [
        ([1, 1], [0, 1], "expected a sum below 1"),
        ([1, 1], [0.5, 0.4], "expected a sum of 1, got 0.9"),
        ([1, 2], [0, 0.5], r"source x \(1\): expected a weight or a share, got both"),
        ([1, 0], [0, 0], r"source x \(1\): expected weight > 0"),
        ([1, -1], [0, 0], "expected weight > 0"),
        ([1, 1], [0, 1.5], "0 <= share <= 1"),
        ([1, 1], [0, float("nan")], "0 <= share <= 1"),
        ([1, float("inf")], [0, 0], "expected weight > 0"),
        ([1, 0.01], [0, 0], "expected at least one example in an epoch, got none"),
    ],
)
def test_weights_and_shares_that_make_no_mixture(weights, shares, message):
    specs = [SourceSpec("x", weight=float(w), share=float(s)) for w, s in zip(weights, shares, strict=True)]
    with pytest.raises(UserError, match=message):
        mixture.epoch_counts(specs, [1000, 10])
