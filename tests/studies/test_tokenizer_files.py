"""The suite's tokenizer folder: one id a word, in the order of the vocabulary."""

import pytest

from vlm_jax import build
from vlm_jax.core.errors import UserError
from vlm_jax.sizing import zoo
from vlm_jax.studies.glyphs import tokenizer_files, vocabulary


@pytest.fixture(scope="module")
def tokenizer():
    return build.load_tokenizer("")


def test_the_words_are_different_and_fit_the_ladder(tokenizer):
    assert len(set(vocabulary.WORDS)) == len(vocabulary.WORDS) == tokenizer.size
    assert zoo.decoder("d24").vocab >= tokenizer.size
    assert tokenizer.eos_ids[0] == vocabulary.WORDS.index(vocabulary.END)


def test_ids_are_numbers_of_words(tokenizer):
    text = " ".join(vocabulary.WORDS[2:])
    assert tokenizer.encode(text) == list(range(2, len(vocabulary.WORDS)))
    assert tokenizer.encode(" read  row two") == [vocabulary.WORDS.index(w) for w in ("read", "row", "two")]
    assert tokenizer.encode("") == []
    assert tokenizer.decode(tokenizer.encode("4 7")) == "4 7"


def test_unknown_words_are_errors(tokenizer):
    with pytest.raises(UserError, match="unknown word 'rows': did you mean 'row'"):
        tokenizer.encode("read rows one")
    with pytest.raises(UserError, match="unknown word 'tow'"):
        tokenizer.encode_without_special("read row tow")


def test_the_folder_is_what_the_module_writes(tmp_path):
    tokenizer_files.write(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert files == {path.name: path.read_bytes() for path in tokenizer_files.FOLDER.iterdir()}
