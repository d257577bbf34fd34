"""Which columns of a data set hold what, and their values."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_jax.core.errors import UserError, unknown
from vlm_jax.data.examples import BadItem, Turn
from vlm_jax.data.readers.turns import check_turns, mark_first_turn, text_of

_COLUMN = re.compile(r"\{([^{}]+)\}")


def check_fields(kind: str, fields: Iterable[str], known: Sequence[str]) -> None:
    """Raises `UserError` for a field that sources of a kind do not have."""
    for field in fields:
        if field not in known:
            raise unknown(f"field of {kind} sources", field, known)


def check_columns(path: Path, alternatives: Sequence[str], present: Iterable[str]) -> None:
    """Raises `UserError` where no alternative is present; it lists the columns that are."""
    present = sorted({column.encode(errors="backslashreplace").decode() for column in present})
    if not any(column in present for column in alternatives):
        expected = " or ".join(map(repr, alternatives))
        raise UserError(
            f"{path}: expected a column {expected}, got {', '.join(present) or 'none'} (name it in `fields`)"
        )


def columns_of(template: str) -> list[str]:
    """The columns of a `fields` entry: one, or those in braces of a text such as "answer en {question}"."""
    return _COLUMN.findall(template) or [template]


def value_of(record: Mapping[str, Any], template: str) -> Any:
    """The value of a `fields` entry in a record, None where the column is absent. In a text with columns in braces each
    is replaced by its value.
    """
    if not _COLUMN.search(template):
        return record.get(template)
    return _COLUMN.sub(lambda match: str(first_of(record.get(match[1])) or ""), template)


def first_of(value: Any) -> Any:
    """The first of several values (several annotators' answers), None of an empty list; another value itself."""
    return (value[0] if len(value) else None) if isinstance(value, list | tuple) else value


def item_id(value: Any, default: object) -> str:
    """An id as text; `default` where there is none. Ids of data sets may be numbers, and may repeat."""
    if value is None or value == "":
        value = default
    return str(value).encode(errors="backslashreplace").decode()


def question_turns(id: str, question: Any, answer: Any, images: int) -> tuple[Turn, ...]:
    """Turns of a question and its answer, or of a list of questions and their answers, behind the images. Of several
    answers to one question the first counts. Raises `BadItem`.
    """
    questions = question if isinstance(question, list | tuple) else [question]
    answers = answer if isinstance(question, list | tuple) else [answer]
    if not isinstance(answers, list | tuple) or len(questions) != len(answers):
        count = len(answers) if isinstance(answers, list | tuple) else 1
        raise BadItem("malformed", id, f"expected an answer for each question, got {len(questions)} and {count}")
    turns = []
    for asked, answered in zip(questions, map(first_of, answers), strict=True):
        if answered is None:
            raise BadItem("no answer", id, "")
        turns += [Turn("user", text_of(id, asked)), Turn("assistant", text_of(id, answered))]
    return check_turns(id, mark_first_turn(id, turns, images) if turns else turns)
