"""The tokenizer of the glyph suite: its words as an ordinary tokenizer folder, `tokenizer/`.

python -m vlm_jax.studies.glyphs.tokenizer_files        # writes the folder again
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from vlm_jax.studies.glyphs import vocabulary

FOLDER = Path(__file__).parent / "tokenizer"


def write(folder: Path) -> None:
    """One id a word, in the order of the vocabulary; text is split at white space."""
    ids = {word: number for number, word in enumerate(vocabulary.WORDS)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unknown>"))  # not a word: unknown words are errors
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in (vocabulary.PAD, vocabulary.END)])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": vocabulary.PAD,
        "eos_token": vocabulary.END,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")


if __name__ == "__main__":
    write(FOLDER)
