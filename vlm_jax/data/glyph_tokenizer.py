"""The word-level tokenizer of the glyph suite. Its vocabulary is the same for all data sets; `PAD_ID` is 0."""

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


@functools.cache
def glyph_tokenizer() -> Tokenizer:
    """A Hugging Face tokenizer that splits at white space, one id a word. Save it with `.save(path)`."""
    ids = {word: number for number, word in enumerate(vocabulary.WORDS)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=vocabulary.PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def encode(text: str) -> list[int]:
    """Ids of "read row two". Raises `UserError` for a word outside the vocabulary."""
    ids = glyph_tokenizer().encode(text).ids
    if PAD_ID in ids:
        words = text.split()
        raise unknown("word", words[ids.index(PAD_ID)], vocabulary.WORDS[2:])
    return ids


def decode(ids: Sequence[int]) -> str:
    """The words up to the first end token, without padding and ids beyond the vocabulary."""
    ids = [int(i) for i in ids]
    ids = ids[: ids.index(END_ID)] if END_ID in ids else ids
    return " ".join(vocabulary.WORDS[i] for i in ids if PAD_ID < i < VOCAB_SIZE)


def encode_table(
    texts: Sequence[str], end: Sequence[int] = (), encode: Callable[[str], Sequence[int]] = encode
) -> tuple[Int[np.ndarray, "n L"], Int[np.ndarray, " n"]]:
    """(ids, lengths) of many texts, each followed by `end`, padded with 0 to the longest."""
    unique, where = np.unique(np.asarray(texts), return_inverse=True)
    rows = [[*encode(text), *end] for text in unique.tolist()]
    lengths = np.array([len(row) for row in rows], np.int32)
    table = np.zeros((len(rows), lengths.max(initial=0)), np.int32)
    for row, ids in zip(table, rows, strict=True):
        row[: len(ids)] = ids
    return table[where], lengths[where]
