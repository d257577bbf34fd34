"""One closed vocabulary for the whole suite."""

import numpy as np
import pytest
from tokenizers import Tokenizer

from vlm_jax.core.errors import UserError
from vlm_jax.data import glyph_tokenizer, vocabulary
from vlm_jax.sizing import zoo


def test_the_words_are_different_and_fit_the_ladder():
    assert len(set(vocabulary.WORDS)) == len(vocabulary.WORDS) == glyph_tokenizer.VOCAB_SIZE
    assert zoo.decoder("d24").vocab >= glyph_tokenizer.VOCAB_SIZE
    assert vocabulary.WORDS[glyph_tokenizer.PAD_ID] == vocabulary.PAD
    assert glyph_tokenizer.PAD_ID == 0


def test_encode_numbers_words_in_the_order_of_the_vocabulary():
    assert glyph_tokenizer.encode(" read  row two") == [vocabulary.WORDS.index(w) for w in ("read", "row", "two")]
    assert glyph_tokenizer.encode("") == []


def test_decode_stops_at_the_end_token():
    ids = [*glyph_tokenizer.encode("4 7"), glyph_tokenizer.END_ID, *glyph_tokenizer.encode("9")]
    assert glyph_tokenizer.decode(ids) == "4 7"
    assert glyph_tokenizer.decode([*glyph_tokenizer.encode("4 7"), 0, 0]) == "4 7"
    assert glyph_tokenizer.decode([*glyph_tokenizer.encode("4 7"), glyph_tokenizer.VOCAB_SIZE]) == "4 7"


@pytest.mark.parametrize("text", ["read row tow", "read <pad> tow"])
def test_an_unknown_word_is_named_with_its_neighbour(text):
    with pytest.raises(UserError, match="unknown word"):
        glyph_tokenizer.encode(text)
    with pytest.raises(UserError, match=r"'rows': did you mean 'row'"):
        glyph_tokenizer.encode_table(["read row one", "read rows one"])


def test_the_saved_tokenizer_reads_back(tmp_path):
    path = str(tmp_path / "glyph_tokenizer.json")
    glyph_tokenizer.glyph_tokenizer().save(path)
    text = " ".join(vocabulary.WORDS[2:])
    assert Tokenizer.from_file(path).encode(text).ids == glyph_tokenizer.encode(text)


def test_a_table_pads_and_ends_every_text():
    texts = ["4 7 1", "9", "4 7 1", "0 0"]
    table, lengths = glyph_tokenizer.encode_table(texts, end=(glyph_tokenizer.END_ID,))
    for text, row, length in zip(texts, table, lengths, strict=True):
        assert row.tolist() == [*glyph_tokenizer.encode(text), glyph_tokenizer.END_ID, *[0] * (4 - length)]
        assert length == len(text.split()) + 1
    assert table.dtype == np.int32
