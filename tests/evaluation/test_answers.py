"""Answers on disk survive crashes and come from other programs; batches hold items of like length."""

import json
from pathlib import Path
from typing import Any

import pytest

from vlm_jax.core.errors import UserError
from vlm_jax.evaluation.answers import Answer, AnswerFile, batches
from vlm_jax.evaluation.benchmarks.items import Item


def item(question_id: str, prompt: str = "?", images: int = 1) -> Item:
    return Item(f"{question_id} {prompt}", question_id, prompt, ("a",), (b"",) * images, question_id)


def test_what_was_appended_is_read(tmp_path: Path) -> None:
    path = tmp_path / "answers" / "gqa.jsonl"
    file = AnswerFile(path)
    file.append([Answer("1", "?", "café", (7, 2))])
    file.append([Answer("2", "?", "", None, "too long")])
    assert AnswerFile(path).matched([item("1"), item("2"), item("3")]) == file.matched([item("1"), item("2")])
    assert file.matched([item("1")])["1 ?"] == Answer("1", "?", "café", (7, 2))


def test_a_half_written_last_line_is_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "gqa.jsonl"
    AnswerFile(path).append([Answer("1", "?", "yes"), Answer("2", "?", "no")])
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    file = AnswerFile(path)
    assert set(file.matched([item("1"), item("2")])) == {"1 ?"}
    file.append([Answer("2", "?", "no")])
    assert path.read_bytes() == whole


def test_answers_of_llava_belong_to_question_and_prompt(tmp_path: Path) -> None:
    """MME has two questions with one id; MMBench's answers have another prompt than what was asked."""
    path, rest = tmp_path / "mme.jsonl", {"answer_id": "x", "model_id": "llava", "metadata": {}}
    lines = [
        {"question_id": "a.png", "prompt": "Is it?", "text": "Yes", **rest},
        {"question_id": "a.png", "prompt": "Is it not?", "text": "No", **rest},
        {"question_id": 241, "prompt": "without its last line", "text": "B", **rest},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    items = [item("a.png", "Is it not?"), item("a.png", "Is it?"), item("241", "another"), item("a.png", "Was it?")]
    assert [answer.text for answer in AnswerFile(path).matched(items).values()] == ["No", "Yes", "B"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{\n", "gqa.jsonl:1: not valid JSON .*: delete the line"),
        (b"\xff\n", r"gqa.jsonl:1: not valid UTF-8 \(byte 0\)"),
        ('{"question_id": 1}\n', "gqa.jsonl:1: expected fields question_id, text, missing text"),
        ('{"question_id": 1, "text": 2}\n', "gqa.jsonl:1: text: expected a text, got 2"),
        (
            '{"question_id": 1, "text": "a"}\n{"question_id": 1, "text": "b"}\n',
            "gqa.jsonl:2: expected one answer to '1'",
        ),
    ],
)
def test_bad_answers_are_one_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "gqa.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        AnswerFile(path)


def test_batches_hold_every_item_once_by_images_and_length() -> None:
    items = [item(str(n), "x" * (n * 37 % 101), images=n % 2) for n in range(1000)]
    found = list(batches([*items, items[0]], lambda item: len(item.prompt), 8))
    assert sorted(one.id for batch in found for one in batch) == sorted(one.id for one in items)
    assert all(len({len(one.images) for one in batch}) == 1 for batch in found)
    assert max(max(len(o.prompt) for o in b) - min(len(o.prompt) for o in b) for b in found) < 20
    assert sum(len(batch) < 8 for batch in found) <= 8  # at most two a window of 32 batches


@pytest.mark.parametrize("tokens", [3, "ab", [1], [1, -2], [1, 2.5], [True, 2], {"1": 2}])
def test_counts_of_tokens_are_two_integers(tmp_path: Path, tokens: Any) -> None:
    path = tmp_path / "gqa.jsonl"
    path.write_text(json.dumps({"question_id": 1, "text": "a", "tokens": tokens}) + "\n")
    with pytest.raises(UserError, match=r"gqa.jsonl:1: tokens: expected two counts"):
        AnswerFile(path)
