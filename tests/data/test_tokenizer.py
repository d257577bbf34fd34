"""One closed vocabulary for the whole suite."""

import numpy as np
import pytest
from tokenizers import Tokenizer

from vlm_jax.core.errors import UserError
from vlm_jax.data import tokenizer, vocabulary
from vlm_jax.sizing import zoo


def test_the_words_are_different_and_fit_the_ladder():
    assert len(set(vocabulary.WORDS)) == len(vocabulary.WORDS) == tokenizer.VOCAB_SIZE
    assert zoo.decoder("d24").vocab >= tokenizer.VOCAB_SIZE
    assert vocabulary.WORDS[tokenizer.PAD_ID] == vocabulary.PAD
    assert tokenizer.PAD_ID == 0


def test_encode_numbers_words_in_the_order_of_the_vocabulary():
    assert tokenizer.encode(" read  row two") == [vocabulary.WORDS.index(w) for w in ("read", "row", "two")]
    assert tokenizer.encode("") == []


def test_decode_stops_at_the_end_token():
    ids = [*tokenizer.encode("4 7"), tokenizer.END_ID, *tokenizer.encode("9")]
    assert tokenizer.decode(ids) == "4 7"
    assert tokenizer.decode([*tokenizer.encode("4 7"), 0, 0]) == "4 7"
    assert tokenizer.decode([*tokenizer.encode("4 7"), tokenizer.VOCAB_SIZE]) == "4 7"


@pytest.mark.parametrize("text", ["read row tow", "read <pad> tow"])
def test_an_unknown_word_is_named_with_its_neighbour(text):
    with pytest.raises(UserError, match="unknown word"):
        tokenizer.encode(text)
    with pytest.raises(UserError, match=r"'rows': did you mean 'row'"):
        tokenizer.encode_table(["read row one", "read rows one"])


def test_the_saved_tokenizer_reads_back(tmp_path):
    path = str(tmp_path / "tokenizer.json")
    tokenizer.glyph_tokenizer().save(path)
    text = " ".join(vocabulary.WORDS[2:])
    assert Tokenizer.from_file(path).encode(text).ids == tokenizer.encode(text)


def test_a_table_pads_and_ends_every_text():
    texts = ["4 7 1", "9", "4 7 1", "0 0"]
    table, lengths = tokenizer.encode_table(texts, end=(tokenizer.END_ID,))
    for text, row, length in zip(texts, table, lengths, strict=True):
        assert row.tolist() == [*tokenizer.encode(text), tokenizer.END_ID, *[0] * (4 - length)]
        assert length == len(text.split()) + 1
    assert table.dtype == np.int32
