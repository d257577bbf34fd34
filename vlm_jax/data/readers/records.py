"""Random access to the records of a JSON array or JSON Lines file: an index of byte offsets, 16 bytes a record.

A file of 1 GB is read once in pieces to index it (seconds); records are parsed when they are read.
"""

import array
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Int

from vlm_jax.core import reading
from vlm_jax.core.errors import UserError
from vlm_jax.data.examples import BadItem
from vlm_jax.data.readers.columns import check_columns
from vlm_jax.data.readers.files import file_sha256

_PIECE = 2**24  # bytes read at once
_LONGEST = 2**26  # bytes of one record
_SPACE = re.compile(r"[ \t\r\n]*")
_BOM = b"\xef\xbb\xbf"
_FIRST = 100  # records in which a column must occur at least once


class RecordFile:
    """Records (JSON objects) of a file by index, read from disk each time. It holds no open file, so it can be pickled
    and used by several threads.
    """

    def __init__(self, path: Path, cache_dir: Path):
        """Indexes the file. Raises `UserError` where it is no JSON array of records and no JSON Lines file."""
        self.path = path
        try:
            with reading.open_regular(path) as file:
                self.spans = _spans(file, path)
            self.sha256 = file_sha256(path, cache_dir)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
        if not len(self.spans):
            raise UserError(f"{path}: expected at least one item, got none")

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises `BadItem` for a record that is no JSON object."""
        start, stop = self.spans[index]
        try:
            with open(self.path, "rb") as file:
                file.seek(start)
                record = json.loads(file.read(stop - start))
        except (OSError, ValueError, RecursionError) as error:
            raise BadItem("malformed", str(index), str(error)) from error
        if not isinstance(record, dict):
            raise BadItem("malformed", str(index), f"expected an object, got {str(record)[:60]}")
        return record

    def require(self, *columns: str) -> None:
        """Raises `UserError` where none of the first records has any of the columns."""
        seen = set[str]()
        for index in range(min(len(self), _FIRST)):
            try:
                seen.update(self[index])
            except BadItem:
                continue
        check_columns(self.path, columns, seen)


def _spans(file: BinaryIO, path: Path) -> Int[np.ndarray, "n 2"]:
    """First byte and end of every record: of an array if the first character is "[", else of lines."""
    head = file.read(2**16)
    start = len(_BOM) if head.startswith(_BOM) else 0
    first = head[start:].lstrip()[:1]
    if first == b"[":
        file.seek(start)
        offsets = _array_spans(file, start, path)
    elif first == b"{":
        file.seek(start)
        offsets = _line_spans(file, start, path)
    elif not head[start:].strip():
        offsets = array.array("q")
    else:
        raise UserError(f"{path}: expected a JSON array or JSON Lines, got a file that starts with {head[:16]!r}")
    return np.frombuffer(offsets, np.int64).reshape(-1, 2) if offsets else np.zeros((0, 2), np.int64)


def _line_spans(file: BinaryIO, offset: int, path: Path) -> "array.array[int]":
    spans = array.array("q")
    for line in file:
        if line.strip():
            if not spans:
                _check_first_line(line, path)
            spans.extend((offset, offset + len(line)))
        offset += len(line)
    return spans


def _check_first_line(line: bytes, path: Path) -> None:
    try:
        json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: expected a JSON array, or one JSON object a line; line 1 is neither ({error})"
        ) from error


def _array_spans(file: BinaryIO, offset: int, path: Path) -> "array.array[int]":
    """Offsets of the elements, from the parser itself.

    Bytes are read as Latin-1: JSON's structure is ASCII, so that the parser finds the same elements as in UTF-8, and
    positions in the text are positions in the file.
    """
    spans = array.array("q")
    text = _Window(file, offset)
    text.skip("[")
    while not text.starts("]"):
        start = text.offset
        try:
            text.parse(json.JSONDecoder().raw_decode)
        except (ValueError, RecursionError) as error:
            raise _broken(path, len(spans) // 2, start, getattr(error, "msg", str(error))) from error
        spans.extend((start, text.offset))
        if text.starts(","):
            text.skip(",")
            if text.starts("]"):
                raise _broken(path, len(spans) // 2, text.offset, "a comma before the end of the array")
        elif not text.starts("]"):
            raise _broken(path, len(spans) // 2, text.offset, "expected ',' or ']'")
    text.skip("]")
    if not text.is_at_end():
        raise _broken(path, len(spans) // 2, text.offset, "text behind the end of the array")
    return spans


def _broken(path: Path, item: int, offset: int, why: str) -> UserError:
    return UserError(f"{path}: item {item}, at byte {offset:,}: not valid JSON ({why}); is the download complete?")


class _Window:
    """A piece of a file that moves forward as its text is consumed."""

    def __init__(self, file: BinaryIO, offset: int):
        self._file, self._text, self._at, self.offset = file, "", 0, offset

    def _more(self, size: int = _PIECE) -> bool:
        new = self._file.read(size)
        self._text, self._at = self._text[self._at :] + new.decode("latin-1"), 0
        return bool(new)

    def _advance(self, end: int) -> None:
        self.offset += end - self._at
        self._at = end

    def starts(self, letter: str) -> bool:
        """Whether the text goes on with `letter`, after white space."""
        while True:
            self._advance(_SPACE.match(self._text, self._at).end())
            if self._at < len(self._text):
                return self._text[self._at] == letter
            if not self._more():
                return False

    def skip(self, letter: str) -> None:
        assert self.starts(letter)
        self._advance(self._at + 1)

    def is_at_end(self) -> bool:
        return not self.starts("\0") and self._at == len(self._text)

    def parse(self, decode: Callable[[str, int], tuple[Any, int]]) -> None:
        """Consumes one JSON value. Raises `ValueError`."""
        size = _PIECE
        while True:
            try:
                _, end = decode(self._text, self._at)
            except ValueError:
                # Either the value is not complete in the window, or it is broken: more text decides.
                if len(self._text) - self._at > _LONGEST or not self._more(size):
                    raise
                size *= 2
            else:
                if end < len(self._text) or not self._more():  # a number may go on in the next piece
                    self._advance(end)
                    return
