"""Parquet files of the hub's layouts: rows at random from row groups, null images, ratings, splits, broken files."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import SourceSpec
from vlm_jax.data.examples import BadItem, Turn
from vlm_jax.data.images import read_image
from vlm_jax.data.readers import parquet
from vlm_jax.data.readers.open import open_source

from . import traps

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
MESSAGES = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))
TEXTS = pa.list_(pa.struct([("user", pa.string()), ("assistant", pa.string()), ("source", pa.string())]))
ONE_VISION = pa.schema(
    [("id", pa.string()), ("image", IMAGE), ("conversations", MESSAGES), ("data_source", pa.string())]
)
CAULDRON = pa.schema([("images", pa.list_(IMAGE)), ("texts", TEXTS)])
PNGS = [traps.encoded(traps.photo(number), "PNG") for number in range(3)]


def write(path, rows, schema, row_group_size=4):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=row_group_size)
    return path


def opened(path, cache, **fields):
    return open_source(SourceSpec("parquet", path=str(path), **fields), cache)


def one_vision(number, image=True):
    file = {"bytes": PNGS[number % 3], "path": f"{number}.png"} if image else None
    talk = [{"from": "human", "value": f"What is this?\n<image> {number}"}, {"from": "gpt", "value": f"A {number}."}]
    return {"id": f"id{number}", "image": file, "conversations": talk, "data_source": "test"}


def cauldron(number, images):
    texts = [{"user": f"Q{number}{k}", "assistant": f"A{number}{k}", "source": "test"} for k in range(2)]
    return {"images": [{"bytes": PNGS[k], "path": None} for k in range(images)], "texts": texts}


def test_rows_of_one_vision(tmp_path):
    """Eleven rows in groups of four, in any order, by several threads and after pickling; every third has no image."""
    rows = [one_vision(number, image=number % 3 > 0) for number in range(11)]
    source = opened(write(tmp_path / "rows.parquet", rows, ONE_VISION), tmp_path)
    order = [10, 0, 5, 9, 1, 2, 8, 4, 3, 7, 6] * 3
    with ThreadPoolExecutor(4) as pool:
        examples = list(pool.map(pickle.loads(pickle.dumps(source)).__getitem__, order))
    for number, example in zip(order, examples, strict=True):
        image = number % 3 > 0
        asked = f"<image>\nWhat is this?\n {number}" if image else f"What is this?\n<image> {number}"
        assert example.id == f"id{number}"
        assert example.images == ((PNGS[number % 3],) if image else ())
        assert example.turns == (Turn("user", asked), Turn("assistant", f"A {number}."))
        light = source.without_images(number)
        assert (light.id, light.turns, len(light.images)) == (example.id, example.turns, len(example.images))


def test_texts_are_read_without_image_bytes(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(parquet, "_text_group", lambda path, hash, group, columns: read.append(columns) or
                        parquet._read_group(path, hash, group, columns))  # fmt: skip
    monkeypatch.setattr(parquet, "_image_group", lambda *_: pytest.fail("reads image bytes"))
    source = opened(write(tmp_path / "a.parquet", [one_vision(1)], ONE_VISION), tmp_path)
    assert len(source.without_images(0).images) == 1
    rows = [cauldron(number, number) for number in range(3)]
    source = opened(write(tmp_path / "b.parquet", rows, CAULDRON), tmp_path)
    assert [len(source.without_images(number).images) for number in range(3)] == [0, 1, 2]
    assert {column for columns in read for column in columns} == {
        "id", "image.path", "conversations", "texts", "images.list.element.path",
    }  # fmt: skip


def test_rows_of_the_cauldron(tmp_path):
    """No placeholders: the images stand before the first question; every question is a turn."""
    source = opened(write(tmp_path / "rows.parquet", [cauldron(n, n) for n in range(3)], CAULDRON), tmp_path)
    for number in range(3):
        example = source[number]
        assert example.id == f"rows:{number}"
        assert example.images == tuple(PNGS[:number])
        assert example.turns[0] == Turn("user", "<image>\n" * number + f"Q{number}0")
        assert example.turns[1:] == (
            Turn("assistant", f"A{number}0"), Turn("user", f"Q{number}1"), Turn("assistant", f"A{number}1"),
        )  # fmt: skip


def test_rows_of_fine_vision_by_rating(tmp_path):
    """Rows below a minimum are left out; a rating of null passes."""
    schema = pa.schema([*CAULDRON, ("relevance_ratings", pa.list_(pa.int64())), ("relevance_min", pa.int64())])
    ratings = [5, 1, None, 4, 3, 5]
    rows = [{**cauldron(n, 1), "relevance_ratings": [r], "relevance_min": r} for n, r in enumerate(ratings)]
    path = write(tmp_path / "rows.parquet", rows, schema)
    source = opened(path, tmp_path, options=(("relevance_min", 4),))
    assert [source[n].turns[1].text for n in range(len(source))] == ["A00", "A20", "A30", "A50"]
    assert source.fingerprint != opened(path, tmp_path).fingerprint
    for options, message in [
        ((("relevance", 4),), "did you mean 'relevance_min'"),
        ((("relevance_min", "4"),), "expected a number"),
        ((("relevance_min", 6), ("relevance_min", 6)), "got none"),
    ]:
        rows = rows[:2]
        with pytest.raises(UserError, match=message):
            opened(write(tmp_path / "few.parquet", rows, schema), tmp_path, options=options)


def test_other_columns_by_fields(tmp_path):
    """Questions and answers in columns of their own; images as plain bytes, or as paths beside the file."""
    rows = [{"query": "What?", "label": ["A", "B"], "picture": PNGS[0]}]
    fields = (("question", "answer en {query}"), ("answer", "label"), ("image", "picture"))
    schema = pa.schema([("query", pa.string()), ("label", pa.list_(pa.string())), ("picture", pa.binary())])
    source = opened(write(tmp_path / "rows.parquet", rows, schema), tmp_path, fields=fields)
    assert source[0].turns == (Turn("user", "<image>\nanswer en What?"), Turn("assistant", "A"))
    assert source[0].images == (PNGS[0],)
    assert len(source.without_images(0).images) == 1
    (tmp_path / "a.png").write_bytes(PNGS[1])
    images = [{"bytes": None, "path": "a.jpg"}, {"bytes": None, "path": None}, {"bytes": None, "path": "b.jpg"}]
    rows = [{**one_vision(0), "image": image} for image in images]
    source = opened(write(tmp_path / "paths.parquet", rows, ONE_VISION), tmp_path)
    assert source[0].images == (tmp_path / "a.png",)
    for number in (1, 2):
        with pytest.raises(BadItem, match="missing image"):
            source[number]


def test_bad_rows_are_bad_items(tmp_path):
    rows = [one_vision(n) for n in range(5)]
    rows[0]["conversations"][1]["value"] = " "
    rows[1]["conversations"][0]["value"] = "What?"
    rows[2]["conversations"] = None
    rows[3]["image"]["bytes"] = b""
    source = opened(write(tmp_path / "rows.parquet", rows, ONE_VISION), tmp_path)
    for number, reason in enumerate(["empty turn", "image without a placeholder", "no answer"]):
        for read in (source.__getitem__, source.without_images):
            with pytest.raises(BadItem, match=f"item id{number}: {reason}"):
                read(number)
    with pytest.raises(UserError, match="not a readable image"):  # found when it is decoded
        read_image(source[3].images[0])
    assert source[4].id == "id4"


def test_a_folder_of_files_and_its_splits(tmp_path):
    for config in ("a", "b"):
        for split, numbers in (("train", range(5)), ("test", range(5, 8))):
            for shard in range(2):
                name = f"{split}-{shard:05d}-of-00002.parquet"
                rows = [one_vision(n + 100 * shard) for n in numbers]
                write(tmp_path / "data" / config / name, rows, ONE_VISION)
    source = opened(tmp_path / "data", tmp_path, config="b", split="test")
    assert [source[n].id for n in range(len(source))] == ["id5", "id6", "id7", "id105", "id106", "id107"]
    assert source.without_images(5).id == "id107"
    assert len(opened(tmp_path / "data" / "*" / "test-*.parquet", tmp_path)) == 12
    assert len(opened(tmp_path / "data", tmp_path, split="train")) == 20
    with pytest.raises(UserError, match="expected files of one split, got test and train"):
        opened(tmp_path / "data", tmp_path)
    with pytest.raises(UserError, match=r"unknown split .* 'tran': did you mean 'train'"):
        opened(tmp_path / "data", tmp_path, split="tran")
    with pytest.raises(UserError, match="expected a file or folder, got no such file"):
        opened(tmp_path / "data", tmp_path, config="c")


def test_errors_of_files_are_one_line(tmp_path):
    whole = write(tmp_path / "whole.parquet", [one_vision(n) for n in range(8)], ONE_VISION)
    content = whole.read_bytes()
    broken = tmp_path / "broken.parquet"
    for piece in (b"", b"PAR1", content[:-20], content[: len(content) // 2], b"version https://git-lfs.github.com"):
        broken.write_bytes(piece)
        with pytest.raises(UserError, match=r"broken\.parquet: not a readable parquet file") as caught:
            opened(broken, tmp_path)
        assert "\n" not in str(caught.value)
    half = len(content) // 2  # the first row group, and some of the second
    broken.write_bytes(content[:4] + bytes(half) + content[4 + half :])
    with pytest.raises(UserError, match=r"expected usable items, got none of 8 .* broken:0: unreadable file"):
        opened(broken, tmp_path)
    broken.write_bytes(content[:4] + bytes(900) + content[904:])
    source = opened(broken, tmp_path)
    with pytest.raises(BadItem, match="unreadable file"):
        source[0]
    assert source[7].id == "id7"
    plain = write(tmp_path / "plain.parquet", [{"text": "x"}], pa.schema([("text", pa.string())]))
    with pytest.raises(UserError, match="expected a column 'conversations' or 'texts', got text"):
        opened(plain, tmp_path)
    with pytest.raises(UserError, match="expected a column 'txt', got text"):
        opened(plain, tmp_path, fields=(("answer", "txt"),))
    with pytest.raises(UserError, match="unknown field of parquet sources 'img': did you mean 'image'"):
        opened(plain, tmp_path, fields=(("img", "text"),))
    empty = write(tmp_path / "empty.parquet", [], ONE_VISION)
    with pytest.raises(UserError, match="expected at least one row, got none"):
        opened(empty, tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"none: expected files that end in \.parquet, got none"):
        opened(tmp_path / "none", tmp_path)


def test_memory_is_bounded_by_bytes(tmp_path, monkeypatch):
    """Of twelve row groups those that fit are kept; a row group too large to be read at once is refused."""
    rows = [one_vision(number) for number in range(12)]
    path = write(tmp_path / "rows.parquet", rows, ONE_VISION, row_group_size=1)
    cache = parquet._GroupCache(3 * len(PNGS[0]) + 2000)
    monkeypatch.setattr(parquet, "_image_group", cache)
    source = opened(path, tmp_path)
    for number in (*range(12), 11, 0):
        assert source[number].images == (PNGS[number % 3],)
        assert 1 <= len(cache._tables) <= 4
    monkeypatch.setattr(parquet, "LARGEST_GROUP", 1000)
    with pytest.raises(UserError, match=r"expected row groups of at most 0\.0 GB.*row_group_size=100"):
        opened(path, tmp_path)
