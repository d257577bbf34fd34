"""Files from outside: what is no regular file is not opened, and JSON and CSV are refused in one line."""

import json
import os
import socket
from pathlib import Path

import pytest

from vlm_jax.core import reading
from vlm_jax.core.errors import UserError


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_json_is_read_with_a_byte_order_mark_and_long_integers(tmp_path: Path) -> None:
    values = {"model_max_length": 10**30, "x": [1.5, None, "ü"], "nested": {"a": {"b": [[]]}}}
    for encoding in ("utf-8", "utf-8-sig"):
        path = write(tmp_path / "a.json", json.dumps(values, ensure_ascii=False).encode(encoding))
        assert reading.read_json(path) == values
        assert reading.read_object(path) == values


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b'{"a": 1', "not valid JSON .*line 1, column 8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[" * 70 + b"]" * 70, "nested too deeply: more than 64"),
        (b'{"a": ' + b"9" * 5000 + b"}", "an integer of 5000 digits"),
        (b'{"a": -' + b"9" * 400 + b"}", "an integer of 401 digits"),
        (b'{"a": 1e400}', "1e400 is out of range"),
        (b'{"a": NaN}', "NaN is no number of JSON"),
        (b'{"a": -Infinity}', "-Infinity is no number of JSON"),
        (b'{"a": "\\ud800"}', "a lone surrogate"),
        (b'{"\\uDFFF": 1}', "a lone surrogate"),
        (b'{"a": "\xff"}', "not valid UTF-8 .byte 7"),
        ('{"a": 1}'.encode("utf-16"), "not valid UTF-8"),
        (b"[1]", "expected an object, got list"),
    ],
)
def test_bad_json_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(UserError, match=rf"a\.json: .*{message}"):
        reading.read_object(write(tmp_path / "a.json", content))


def test_pairs_of_surrogates_are_characters(tmp_path: Path) -> None:
    assert reading.read_json(write(tmp_path / "a.json", b'"\\ud83d\\ude00"')) == "\U0001f600"


def test_csv_is_read_as_spreadsheets_save_it(tmp_path: Path) -> None:
    content = '\ufeffname,value,other\r\n"a, ""b""",1,\r\n\r\n"two\nlines",2,x\r\n'
    rows = reading.read_csv(write(tmp_path / "a.csv", content.encode()), ("name", "value"))
    assert [row for _, row in rows] == [
        {"name": 'a, "b"', "value": "1", "other": ""},
        {"name": "two\nlines", "value": "2", "other": "x"},
    ]
    assert [where.rpartition(":")[2] for where, _ in rows] == ["2", "5"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"a\.csv: expected columns name,value, missing name,value"),
        (b"name,x\na,b\n", r"a\.csv: expected columns name,value, missing value"),
        (b"name,value,name\n", "expected each column once"),
        (b"name,value\na\n", r"a\.csv:2: expected as many fields as the header has, 2, got 1"),
        (b"name,value\na,1,2\n", r"a\.csv:2: .*, got 3"),
        (b"name,value\na," + b"1" * 140_000 + b"\n", r"a\.csv:2: not a CSV file \(field larger"),
        (b'name,value\n"a,1\n', r"a\.csv:2: not a CSV file"),
        (b"name,value\na,\x00\n", "a NUL byte"),
        ("name,value\na,1\n".encode("utf-16"), "not valid UTF-8"),
        (b"name,value\na,\xe9\n", r"not valid UTF-8 \(byte 13"),
    ],
)
def test_bad_csv_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        reading.read_csv(write(tmp_path / "a.csv", content), ("name", "value"))


def test_what_is_no_file_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening the pipe would block for ever."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("missing")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "linked").symlink_to(write(tmp_path / "file", b"{}"))
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # the name of a socket is short
        server.bind("socket")
    expected = {
        "pipe": "got a named pipe", "folder": "got a folder", "zero": "got a device", "socket": "got a socket",
        "loop": "cannot be read: ", "dangling": "a link to a file that does not exist", "missing": "no such file",
        "file/below": "no such file", "x" * 5000: "cannot be read: File name too long", "a\0b": "cannot be read: ",
    }  # fmt: skip
    for name, message in expected.items():
        with pytest.raises(UserError, match=message):
            reading.read_json(f"{tmp_path}/{name}")
    assert reading.read_json(tmp_path / "linked") == {}
    kinds = {name: reading.kind(tmp_path / name) for name in ("linked", "folder", "missing", "dangling")}
    assert kinds == {"linked": "file", "folder": "folder", "missing": "", "dangling": ""}


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected at most 10 bytes, got 11"):
        reading.read_bytes(write(tmp_path / "a", b"x" * 11), 10)
