"""Stub until the branch `chat` is merged."""

from typing import NamedTuple

IMAGE = -1


class Conversation(NamedTuple):
    ids: list[int]
    target: list[bool]
    turn_ends: list[int]


def tokenize(chat_format, tokenizer, turns):
    ids, target, ends = [], [], []
    for turn in turns:
        if turn.role == "user":
            n = turn.text.count("<image>")
            new = [IMAGE] * n + tokenizer.encode(turn.text.replace("<image>", "").strip() + "\n")
            ids += new
            target += [False] * len(new)
        elif turn.role == "assistant":
            new = [*tokenizer.encode_without_special(turn.text), tokenizer.eos_ids[0]]
            ids += new
            target += [True] * len(new)
            ends.append(len(ids))
    return Conversation(ids, target, ends)


def bare_question(turns):
    return next(turn.text for turn in turns if turn.role == "user").replace("<image>", "").strip()
