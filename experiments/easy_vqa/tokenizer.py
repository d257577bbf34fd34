"""Writes the folder `tokenizer/`: the words of the training questions, one id each.

python -m experiments.easy_vqa.tokenizer
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from experiments.easy_vqa.source import EasyVqa

FOLDER = Path(__file__).parent / "tokenizer"
PAD, END, UNKNOWN = "<pad>", "<end>", "<unknown>"


def main() -> None:
    source = EasyVqa("train")
    normalizer, splitter = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    texts = {turn.text for i in range(len(source)) for turn in source[i].turns}
    words = {word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))}
    ids = {word: number for number, word in enumerate([PAD, END, UNKNOWN, *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (PAD, END)])
    FOLDER.mkdir(exist_ok=True)
    tokenizer.save(str(FOLDER / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": PAD, "eos_token": END, "unk_token": UNKNOWN}
    (FOLDER / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    print(f"{FOLDER}: {len(ids)} words")


if __name__ == "__main__":
    main()
