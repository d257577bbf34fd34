"""Generated tokens to answers: where a text ends, and the pieces of it that a stream may send."""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

Decode = Callable[[Sequence[int]], str]

# The last word while it may change: a decoder that cleans up spaces removes those before punctuation and contractions.
_UNSETTLED = re.compile(r"(\s*|\s+\S{0,3})\ufffd*\Z")


class Completion(NamedTuple):
    """An answer so far."""

    text: str
    tokens: int  # generated, with the one that ends it
    finish_reason: str | None = None  # "stop" or "length"; None: unfinished


def answer_of(
    tokens: Sequence[int], decode: Decode, eos_ids: Sequence[int], stop: Sequence[str], limit: int, checked: int = 0
) -> Completion:
    """The answer of a row's tokens: it ends before a token of `eos_ids` or a text of `stop`, or at `limit`.

    Args:
        checked: the first `checked` tokens are known to hold no text of `stop`.
    """
    length = next((i for i, token in enumerate(tokens) if token in eos_ids), len(tokens))
    text = decode(tokens[:length])
    if stop and _first_stop(text, stop) is not None:
        # The fewest tokens whose text holds one of them.
        count = next(n for n in range(min(checked, length), length + 1) if _has_stop(decode(tokens[:n]), stop))
        text = decode(tokens[:count])
        return Completion(text[: _first_stop(text, stop)], count, "stop")
    if length < len(tokens):
        return Completion(text, length + 1, "stop")
    return Completion(text, length, "length" if length >= limit else None)


def settled(answer: Completion, stop: Sequence[str]) -> str:
    """The part of an unfinished answer's text that further tokens do not change, and that begins no text of `stop`."""
    if answer.finish_reason is not None:
        return answer.text
    text = answer.text[: _UNSETTLED.search(answer.text).start()]  # type: ignore[union-attr]
    longest = max((len(each) for each in stop), default=1) - 1
    starts = (i for i in range(max(len(text) - longest, 0), len(text)) if any(s.startswith(text[i:]) for s in stop))
    return text[: next(starts, len(text))]


def _first_stop(text: str, stop: Sequence[str]) -> int | None:
    return min((i for i in map(text.find, stop) if i >= 0), default=None)


def _has_stop(text: str, stop: Sequence[str]) -> bool:
    return _first_stop(text, stop) is not None
