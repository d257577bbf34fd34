"""Where a text ends, and that the pieces of a stream are the text."""

import re

import numpy as np
import pytest

from vlm_jax.inference.serving.answers import Completion, answer_of, settled

EOS = 0
WORDS = dict(enumerate(["", " a", " b", " .", " n't", "c", " abc", "\n", "ab", " ,", ",", " 's"]))


def decode(tokens: list[int]) -> str:
    """Words whose spaces are cleaned up, as `data.tokenizers` does where a folder asks for it."""
    text = "".join(WORDS[token] for token in tokens).removeprefix(" ")
    return re.sub(r" ([.?!,]|n't|'s)", r"\1", text)


@pytest.mark.parametrize(
    ("tokens", "stop", "limit", "expected"),
    [
        ([1, 2, EOS, 1], (), 9, Completion("a b", 3, "stop")),
        ([1, 2], (), 9, Completion("a b", 2, None)),
        ([1, 2], (), 2, Completion("a b", 2, "length")),
        ([1, EOS], (), 2, Completion("a", 2, "stop")),
        ([EOS], (), 1, Completion("", 1, "stop")),
        ([1, 2, 5, 1], ("b", "c"), 9, Completion("a ", 2, "stop")),
        ([1, 2, 5, 1], ("bc", "c a"), 9, Completion("a ", 3, "stop")),
        ([1, 2, EOS, 5], ("c",), 9, Completion("a b", 3, "stop")),
        ([2, 5], ("bc",), 2, Completion("", 2, "stop")),
    ],
)
def test_an_answer_ends_at_the_first_of_eos_stop_text_and_limit(tokens, stop, limit, expected) -> None:
    assert answer_of(tokens, decode, (EOS,), stop, limit) == expected


def test_pieces_of_a_stream_are_the_whole_text() -> None:
    """However the tokens arrive: what was sent is never taken back, and all of it is the text decoded at once."""
    rng = np.random.default_rng(0)
    for _ in range(2000):
        tokens = rng.integers(1, len(WORDS), 12).tolist()
        stop = tuple(rng.choice(["abc", "b.", "a b", "c\n", "n't"], rng.integers(0, 3), replace=False).tolist())
        whole = answer_of(tokens, decode, (EOS,), stop, 12)
        sent, answer, count = "", Completion("", 0), 0
        while answer.finish_reason is None:
            count = min(count + int(rng.integers(1, 5)), 12)
            answer = answer_of(tokens[:count], decode, (EOS,), stop, 12, answer.tokens)
            text = settled(answer, stop)
            assert text.startswith(sent) or sent.startswith(text)
            sent = max(sent, text, key=len)
        assert (sent, answer) == (whole.text, whole)


def test_half_a_character_and_the_begin_of_a_stop_text_wait() -> None:
    assert settled(Completion("one word\ufffd", 3), ()) == "one word"
    assert settled(Completion("some text STO", 3), ("TOP", "STOP")) == "some text"
    assert settled(Completion("some textual STO", 3, "length"), ("STOP",)) == "some textual STO"
