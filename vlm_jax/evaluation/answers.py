"""A model's raw answers on disk, and the order in which a benchmark is asked.

`OUT/answers/BENCHMARK.jsonl` has a line for each answer, in the form of LLaVA's answer files:

    {"question_id": "262148000", "prompt": "Where is he looking?\\nAnswer ...", "text": "down"}

An interrupted evaluation goes on from the lines that it finds; a half-written last line is asked again. Files of other
programs are read too: an answer belongs to the item with its question_id and prompt, or, in a line of another program,
with its question_id alone where only one item and one answer have it.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from vlm_jax.core import reading
from vlm_jax.core.errors import UserError
from vlm_jax.evaluation.benchmarks.files import check_fields
from vlm_jax.evaluation.benchmarks.items import Item

_MAX_BYTES = 2**32
_WINDOW = 32  # batches that are sorted by length together; between windows, items keep the order of their files


class Answer(NamedTuple):
    """One line."""

    question_id: str
    prompt: str
    text: str
    tokens: tuple[int, int] | None = None  # (question, answer), for the cost of a row
    note: str = ""  # why there is no answer


def key(item: Item) -> tuple[str, str]:
    return item.question_id, item.prompt


class AnswerFile:
    """The answers of one benchmark; `append` writes whole lines."""

    def __init__(self, path: Path):
        self.path = path
        self._lines: dict[tuple[str, str], Answer] = {}
        self._by_id: dict[str, list[Answer]] = {}
        content = reading.read_bytes(path, _MAX_BYTES) if reading.kind(path) else b""
        whole = content.rfind(b"\n") + 1
        self._cut = whole if whole < len(content) else None  # where a half-written line begins
        for number, line in enumerate(content[:whole].split(b"\n")[:-1], start=1):
            self._add(_parse(line, f"{path}:{number}"), f"{path}:{number}")

    def _add(self, answer: Answer, where: str) -> None:
        name = answer.question_id, answer.prompt
        if name in self._lines:
            if self._lines[name].text != answer.text:
                raise UserError(f"{where}: expected one answer to {answer.question_id!r}, got a second one")
            return
        self._lines[name] = answer
        self._by_id.setdefault(answer.question_id, []).append(answer)

    def matched(self, items: Sequence[Item]) -> dict[str, Answer]:
        """The answers of the items that have one, by item id."""
        shared: dict[str, int] = {}
        for item in items:
            shared[item.question_id] = shared.get(item.question_id, 0) + 1
        out = {}
        for item in items:
            alone = self._by_id.get(item.question_id, []) if shared[item.question_id] == 1 else []
            foreign = [answer for answer in alone if answer.tokens is None and not answer.note and len(alone) == 1]
            if answer := next((a for a in (self._lines.get(key(item)), *foreign) if a), None):
                out[item.id] = answer
        return out

    def append(self, answers: Sequence[Answer]) -> None:
        """Adds lines, synced to disk. Raises `UserError` if they cannot be written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self._cut is not None:
                os.truncate(self.path, self._cut)
                self._cut = None
            with open(self.path, "a", encoding="utf-8", errors="replace") as file:
                file.writelines(_to_line(answer) for answer in answers)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"{self.path}: cannot write answers ({error.strerror}): free space") from error
        for answer in answers:
            self._add(answer, str(self.path))


def _to_line(answer: Answer) -> str:
    values = {"question_id": answer.question_id, "prompt": answer.prompt, "text": answer.text}
    optional = {"tokens": answer.tokens, "note": answer.note}
    return json.dumps(values | {name: value for name, value in optional.items() if value}, ensure_ascii=False) + "\n"


def _parse(line: bytes, where: str) -> Answer:
    try:
        values = reading.parse_json(line.decode(), where)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not valid UTF-8 (byte {error.start}): delete the line") from error
    except UserError as error:
        raise UserError(f"{error}: delete the line") from error
    check_fields(values, ("question_id", "text"), where)
    tokens = values.get("tokens")
    if not isinstance(values["text"], str):
        raise UserError(f"{where}: text: expected a text, got {values['text']!r}")
    is_pair = isinstance(tokens, list) and len(tokens) == 2 and all(type(n) is int and n >= 0 for n in tokens)
    if tokens is not None and not is_pair:
        raise UserError(f"{where}: tokens: expected two counts, got {tokens!r}")
    prompt, note = str(values.get("prompt", "")), str(values.get("note", ""))
    return Answer(str(values["question_id"]), prompt, values["text"], tokens and (tokens[0], tokens[1]), note)


def batches(items: Sequence[Item], length: Callable[[Item], int], size: int) -> Iterator[list[Item]]:
    """Batches of items of similar length, one of each key; the images of a batch are near each other in their files."""
    items = list({key(item): item for item in items}.values())
    for start in range(0, len(items), _WINDOW * size):
        window = sorted(items[start : start + _WINDOW * size], key=lambda item: (len(item.images), length(item)))
        while window:
            alike = [item for item in window[-size:] if len(item.images) == len(window[-1].images)]
            del window[-len(alike) :]
            yield alike
