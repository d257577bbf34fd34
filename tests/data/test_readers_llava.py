"""LLaVA's files: placeholders stand where LLaVA's own code puts them, every known defect is one counted item."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import SourceSpec
from vlm_jax.data.examples import BadItem, Turn
from vlm_jax.data.images import read_image
from vlm_jax.data.readers import records, turns
from vlm_jax.data.readers.files import file_sha256
from vlm_jax.data.readers.open import open_source

from . import traps

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "image_markers.json").read_text())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return traps.build(tmp_path_factory.mktemp("traps"))


def llava(path, cache, **fields):
    return open_source(SourceSpec("llava", path=str(path), **fields), cache)


def reasons(source):
    found = {}
    for index in range(len(source)):
        try:
            source[index]
        except BadItem as error:
            found[index] = error.reason
    return found


def talk(texts):
    return tuple(Turn(("user", "assistant")[number % 2], text) for number, text in enumerate(texts))


@pytest.mark.parametrize(
    ("reference", "mark"), [("llava", turns.mark_front_of_turn), ("llava_next", turns.mark_in_place)]
)
def test_placeholders_stand_where_the_reference_puts_them(reference, mark):
    """On rows with a placeholder for each image, all of them the user's; others raise."""
    legal = 0
    for given, expected in zip(GOLDEN["given"], GOLDEN[reference], strict=True):
        users = sum(text.count("<image>") for text in expected[::2])
        others = sum(text.count("<image>") for text in expected[1::2])
        if users and not others:
            legal += 1
            assert mark("x", talk(given), users) == talk(expected)
        for images in {1, 2, users} - {0} - ({users} if not others else set()):
            too_few = not others and users < images
            with pytest.raises(BadItem, match="image without a" if too_few else "placeholder without an"):
                mark("x", talk(given), images)
    assert legal > 30


def test_every_trap_is_named_and_all_else_is_read(files, tmp_path):
    source = llava(files.json, tmp_path, images=str(files.images))
    assert len(source) == 60
    assert reasons(source) == files.bad
    undecodable = []
    for index in set(range(60)) - set(files.bad):
        example, row = source[index], files.rows[index]
        assert example.id == str(row["id"])
        assert example.turns[0].role == "user"
        assert [turn.role for turn in example.turns] == ["user", "assistant"] * (len(example.turns) // 2)
        assert len(example.images) == np.size(row.get("image", []))
        if example.images:
            assert sum(turn.text.count("<image>") for turn in example.turns) == len(example.images)
        for image in example.images:
            try:
                assert min(read_image(image).shape[:2]) == traps.SIDE
            except UserError:
                undecodable.append(index)
    assert undecodable == files.undecodable
    text = source[next(i for i, row in enumerate(files.rows) if row["id"] == "text about <image>")]
    assert (text.images, text.turns[0].text) == ((), "What does <image> mean in HTML?")  # ordinary text, untouched


def test_jsonl_and_other_keys_read_the_same(files, tmp_path):
    """One object a line, blank lines, CRLF, a byte order mark; role and content; renamed columns."""
    lines = []
    for row in files.rows:
        messages = [
            {"role": {"human": "user", "gpt": "assistant"}.get(turn.get("from")), "content": turn.get("value")}
            if "from" in turn
            else turn
            for turn in row["conversations"]
        ]
        image = {"picture": row["image"]} if "image" in row else {}
        lines.append(json.dumps({"key": row["id"], "messages": messages, **image}))
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode())
    fields = (("id", "key"), ("image", "picture"), ("conversations", "messages"))
    source = llava(path, tmp_path, images=str(files.images), fields=fields)
    original = llava(files.json, tmp_path, images=str(files.images))
    assert reasons(source) == files.bad
    for index in set(range(60)) - set(files.bad):
        assert source[index]._replace(extra={}) == original[index]._replace(extra={})
    row = next(i for i, row in enumerate(files.rows) if "model" in row)
    assert original[row].extra == {"model": ""}


def test_records_are_those_of_the_json_module_whatever_the_spaces_and_pieces(tmp_path, monkeypatch):
    """Items longer than a piece, numbers and escapes at its edge, text beyond ASCII, pretty-printed and compact."""
    rows = [{"n": number, "text": 'é"\\[{🚲' * number, "deep": [[{"a": [number / 7]}]]} for number in range(40)]
    for piece in (1, 2, 7, 64, 4096):
        monkeypatch.setattr(records, "_PIECE", piece)
        for number, (indent, ascii) in enumerate([(None, True), (1, False), ("\t", False)]):
            path = tmp_path / f"{piece}-{number}.json"
            path.write_text(f"\n {json.dumps(rows, indent=indent, ensure_ascii=ascii)} \n", "utf-8")
            file = records.RecordFile(path, tmp_path / "cache")
            assert [file[i] for i in range(len(file))] == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected at least one item, got none"),
        ("[]", "expected at least one item, got none"),
        ("  \n", "expected at least one item, got none"),
        ("id,image\n1,a.jpg\n", "expected a JSON array or JSON Lines, got a file that starts with"),
        ("\x1f\x8b\x08", "expected a JSON array or JSON Lines"),
        ('[{"id": 1}, {"id": ', r"item 1, at byte 12: not valid JSON .*; is the download complete"),
        ('[{"id": 1} {"id": 2}]', r"item 1, at byte 11: not valid JSON \(expected ',' or '\]'\)"),
        ('[{"id": 1},]', "a comma before the end"),
        ('[{"id": 1}', "not valid JSON"),
        ('[{"id": 1}] []', "text behind the end"),
        ("[" * 100_000, "item 0, at byte 1: not valid JSON"),
        ('{"id": 1,\n "image": 2}', "line 1 is neither"),
        ('[{"id": 1, "image": "a"}]', "expected a column 'conversations', got id, image"),
        ('{"data": [{"conversations": []}]}', "expected a column 'conversations', got data"),
        ("[1, 2]", "expected a column 'conversations', got none"),
    ],
)
def test_errors_of_a_broken_file_are_one_line(tmp_path, content, message):
    path = tmp_path / "rows.json"
    path.write_text(content, "latin-1")
    with pytest.raises(UserError, match=message) as caught:
        llava(path, tmp_path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("conversations", "reason"),
    [
        (None, "malformed"),
        ([], "malformed"),
        ("hello", "malformed"),
        ([1], "malformed"),
        ([{"from": "human"}], "malformed"),
        ([{"from": "bard", "value": "x"}], "malformed"),
        ([{"from": "human", "value": ["x"]}, {"from": "gpt", "value": "y"}], "malformed"),
        ([{"from": "human", "value": "\ud83d"}, {"from": "gpt", "value": "y"}], "malformed"),
        ([{"from": "human", "value": None}, {"from": "gpt", "value": "y"}], "empty turn"),
        ([{"from": "gpt", "value": "y"}], "no answer"),
        ([{"from": "system", "value": "y"}], "no answer"),
        ([{"from": "human", "value": "x"}, {"from": "system", "value": "y"}], "roles do not alternate"),
    ],
)
def test_a_malformed_item_is_one_bad_item(tmp_path, conversations, reason):
    good = traps.item("good", None, "What?", "A.")
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([good, {"id": "bad", "conversations": conversations}, 7]))
    source = llava(path, tmp_path)
    assert source[0].turns == (Turn("user", "What?"), Turn("assistant", "A."))
    assert reasons(source) == {1: reason, 2: "malformed"}
    with pytest.raises(BadItem) as caught:
        source[1]
    again = pickle.loads(pickle.dumps(caught.value))  # as worker processes send it
    assert (again.reason, again.id, str(again)) == (reason, "bad", str(caught.value))


def test_an_image_of_none_and_videos(tmp_path):
    """Without the key a row is text; with an empty value a placeholder has no image; videos are not read."""
    rows = [traps.item("x", None, text, "A.") for text in ("<image> what?", "What?")]
    rows = [{**row, **image} for image in ({}, {"image": None}, {"image": []}, {"video": "a.mp4"}) for row in rows]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    lost = "placeholder without an image"
    assert reasons(llava(path, tmp_path)) == {2: lost, 4: lost, 6: "video", 7: "video"}


def test_a_system_turn_stays_in_front(tmp_path):
    talk = [("system", "Be brief."), ("gpt", "Hello!"), ("human", "What?"), ("gpt", "A.")]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"conversations": [{"from": role, "value": text} for role, text in talk]}))
    example = llava(path, tmp_path)[0]
    assert example.id == "0"
    assert example.turns == (Turn("system", "Be brief."), Turn("user", "What?"), Turn("assistant", "A."))


def test_several_files_follow_each_other(tmp_path):
    """Braces keep the order given, a yaml takes parts, a pattern sorts."""
    for name in "ab":
        rows = [traps.item(f"{name}{number}", None, "What?", "A.") for number in range(10)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    listed = "datasets:\n- json_path: b.json\n  sampling_strategy: first:15%\n- json_path: a.json\n"
    (tmp_path / "mix.yaml").write_text(listed)

    def ids(path):
        source = llava(tmp_path / path, tmp_path)
        return [source[index].id for index in range(len(source))]

    a, b = ([f"{name}{number}" for number in range(10)] for name in "ab")
    assert ids("{b,a}.json") == b + a
    assert ids("[ab].json") == a + b
    assert ids("mix.yaml") == b[:2] + a
    with pytest.raises(UserError, match=r"expected one json or jsonl file in the folder, got a\.json, b\.json"):
        llava(tmp_path, tmp_path)
    with pytest.raises(UserError, match=r"c\.json: expected a file or folder, got no such file \(did you mean"):
        llava(tmp_path / "{a,c}.json", tmp_path)
    for content in ("datasets: 3", "- a.json", "datasets: [a.json]", "a: [", "datasets: []"):
        (tmp_path / "bad.yaml").write_text(content)
        with pytest.raises(UserError, match=r"bad\.yaml: expected ") as caught:
            llava(tmp_path / "bad.yaml", tmp_path)
        assert "\n" not in str(caught.value)


def test_the_fingerprint_covers_contents(files, tmp_path):
    """The same contents in another folder are the same data set; one letter or one pixel is another."""
    copy = traps.build(tmp_path / "copy")
    first, second = (llava(one.json, tmp_path, images=str(one.images)) for one in (files, copy))
    assert first.fingerprint == second.fingerprint
    assert first.images_fingerprint() == second.images_fingerprint()
    assert first.fingerprint != llava(files.json, tmp_path, images=str(files.images), take="first:59").fingerprint
    stamp = copy.json.stat()
    copy.json.write_text(copy.json.read_text().replace("photograph 11", "photograph 12"))
    image = copy.images / "coco" / "train2017" / "000000000011.jpg"
    image.write_bytes(image.read_bytes()[:-3] + b"xyz")
    assert copy.json.stat().st_size == stamp.st_size
    changed = llava(copy.json, tmp_path, images=str(copy.images))
    assert changed.fingerprint != first.fingerprint
    assert changed.images_fingerprint() != first.images_fingerprint()


def test_hashes_are_stored_until_the_file_changes(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"one")
    monkeypatch.setattr("vlm_jax.data.readers.files._SETTLED_NS", -(10**18))  # a file just written is stored too
    first = file_sha256(path, tmp_path / "cache")
    monkeypatch.setattr("hashlib.file_digest", lambda *_: pytest.fail("read again"))
    assert file_sha256(path, tmp_path / "cache") == first
    path.write_bytes(b"other")
    with pytest.raises(pytest.fail.Exception):
        file_sha256(path, tmp_path / "cache")
