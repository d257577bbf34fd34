"""Words to numbers: one word-level tokenizer over the closed vocabulary of the suite.

Promises: `PAD_ID` is 0; the numbers of words never depend on the data set, so one decoder reads every family.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer, models, pre_tokenizers

from vlm_jax.core.errors import unknown
from vlm_jax.data import vocabulary

PAD_ID = 0
END_ID = vocabulary.WORDS.index(vocabulary.END)
VOCAB_SIZE = len(vocabulary.WORDS)


def glyph_tokenizer() -> Tokenizer:
    """A Hugging Face tokenizer: split at white space, one number a word. Save it with `.save(path)`."""
    words = {word: number for number, word in enumerate(vocabulary.WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=vocabulary.PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


@functools.cache
def _tokenizer() -> Tokenizer:
    return glyph_tokenizer()


def encode(text: str) -> list[int]:
    """`"read row two"` -> its numbers. Raises `UserError` for a word outside the vocabulary."""
    ids = _tokenizer().encode(text).ids
    if PAD_ID in ids:
        words = text.split()
        raise unknown("word", words[ids.index(PAD_ID)], vocabulary.WORDS[2:])
    return ids


def decode(ids: Sequence[int]) -> str:
    """The words up to the first end token, without padding and without numbers that a larger embedding has to spare."""
    ids = [int(i) for i in ids]
    ids = ids[: ids.index(END_ID)] if END_ID in ids else ids
    return " ".join(vocabulary.WORDS[i] for i in ids if PAD_ID < i < VOCAB_SIZE)


def encode_table(
    texts: Sequence[str], end: Sequence[int] = (), encode: Callable[[str], Sequence[int]] = encode
) -> tuple[Int[np.ndarray, "n L"], Int[np.ndarray, " n"]]:
    """Many texts at once, each followed by `end`, padded to the longest: (numbers as int32, lengths)."""
    unique, where = np.unique(np.asarray(texts), return_inverse=True)
    rows = [[*encode(text), *end] for text in unique.tolist()]
    lengths = np.array([len(row) for row in rows], np.int32)
    table = np.zeros((len(rows), lengths.max(initial=0)), np.int32)
    for row, ids in zip(table, rows, strict=True):
        row[: len(ids)] = ids
    return table[where], lengths[where]
