"""Makes peers_text.json.gz: what transformers makes of texts and messages, with tokenizers of a few lines.

    python -m tests.golden.peers_text          # with torch and transformers; see make_peers.py

Each case holds the files of a folder and what the reference's tokenizer says.
"""

import base64
import gzip
import io
import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PATH = Path(__file__).with_name("peers_text.json.gz")
LINES = [
    "What is in this picture? A cat sits on the mat, and it doesn't move.",
    "Describe the image in detail, please; it's 42 degrees.",
    "read row two and three: the quick brown fox jumps over the lazy dog",
    "USER: hello world ASSISTANT: naïve café, 日本語 and 😀!",
    "def f(x):\n    return x + 1\n",
] * 4
TEXTS = (*LINES[:5], "", " ", "  two spaces ", "</s> is text? <s>a", "<|im_start|>user\nhi<|im_end|>",
         "tab\tand\r\nline", "Ünknown żółć Ж", "don 't stop , now !",
         "<s>cat</s> cat<s>\u2581cat <pad> cat", "\u2581cat<box>cat")  # fmt: skip
TALKS = (
    [{"role": "user", "content": "What is this?"}],
    [{"role": "system", "content": "Be <brief> & kind."}, {"role": "user", "content": "Hi"},
     {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "  And now? "}],
)  # fmt: skip
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}\n{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}\n"
        "{% endfor %}\n{% if add_generation_prompt %}\n{{ '<|im_start|>assistant\\n' }}\n{% endif %}"
    ),
    "marks": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{{ eos_token }}{% endgeneration %}{% else %}    {%- if loop.index > 3 %}{% break %}{% endif %}"
        "[{{ m.role | upper }}] {{ m.content | trim | tojson }} {% endif %}{% endfor %}"
        "{{ messages | length }}{{ {'a': ['é', 1]} | tojson }}"
    ),
    "space": "{% set ns = namespace(n=0) %}{% for m in messages if m.role != 'system' %}\n  {% set ns.n = ns.n + 1 %}\n"
    "{{ ns.n }}: {{ m['content'] }}\n{% endfor %}\n",
}


# Those that read parts: in the manner of LLaVA's, which has no eyes for a text, and of Qwen's, which takes either.
PART_TEMPLATES = {
    "parts": (
        "{% for m in messages %}{% if m.role != 'system' %}{{ m.role | upper }}: {% endif %}"
        "{% for p in m.content | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
        "{% for p in m.content | selectattr('type', 'equalto', 'text') %}{{ p.text }} {% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
    "either": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for p in m.content %}{% if p.type == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %}"
        "{% endif %}<|im_end|>\n{% endfor %}"
    ),
}


def in_parts(talk: list[dict[str, Any]], images: int) -> list[dict[str, Any]]:
    """The texts of a talk as parts, with that many images (1 or 0) before the user's first."""
    out, left = [], images
    for one in talk:
        shown = [{"type": "image"}] if left and one["role"] == "user" else []
        left -= len(shown)
        out.append({**one, "content": [*shown, {"type": "text", "text": one["content"]}]})
    return out


def byte_level(bos: str | None) -> Any:
    """As Qwen's (no begin token) and Llama 3's."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    cut = r"'(?:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    out = Tokenizer(models.BPE())
    out.normalizer = None if bos else normalizers.NFC()
    out.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(cut), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    out.decoder = decoders.ByteLevel()
    special = [*([bos] if bos else []), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    out.train_from_iterator(
        LINES, trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet)
    )
    if bos:
        out.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])
    return out


def spaced(special: list[str], scheme: str) -> Any:
    """As Llama 2's ("first") and Gemma's ("never"): spaces are a letter, unknown letters fall back to bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    out = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if scheme == "never":
        out.normalizer = normalizers.Replace(" ", "▁")
    elif scheme == "older":
        out.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        out.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    out.decoder = decoders.Sequence(steps if scheme == "never" else [*steps, decoders.Strip(" ", 1, 0)])
    special = [*special, *(f"<0x{i:02X}>" for i in range(256))]
    out.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=360, special_tokens=special))
    return out


def unigram() -> Any:
    """Of letters and frequent bits of words: what the library's trainer finds is another vocabulary each time."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    text = "▁" + "▁".join(" ".join(LINES).split())
    bits = Counter(text[i : i + n] for n in range(1, 6) for i in range(len(text)) if "▁" not in text[i + 1 : i + n])
    frequent = sorted(bits, key=lambda bit: (len(bit) > 1, -bits[bit] * len(bit), bit))[:160]
    special = ["<pad>", "</s>", "<unk>"]
    scores = [(bit, math.log(bits[bit] / len(text)) if bit in bits else 0.0) for bit in (*special, *frequent)]
    out = Tokenizer(models.Unigram(scores, unk_id=2))
    out.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
    out.pre_tokenizer, out.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    out.add_special_tokens(special)
    out.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return out


def pieces(**settings: Any) -> Callable[[Path], None]:
    """A folder of SentencePiece's model and the settings of Llama's tokenizer."""

    def write(folder: Path) -> None:
        import sentencepiece

        content = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(line.replace("\n", " ") for line in LINES), model_writer=content,
            model_type="bpe", vocab_size=360, byte_fallback=True, normalization_rule_name="identity", minloglevel=2,
            remove_extra_whitespaces=False, split_digits=True, hard_vocab_limit=False, num_threads=1,
        )  # fmt: skip
        (folder / "tokenizer.model").write_bytes(content.getvalue())
        named(folder, settings)

    return write


def named(folder: Path, settings: dict[str, Any]) -> None:
    """Has Llama's class read the folder, as those of Llama 2 and Vicuna."""
    special = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    said = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, **special, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))


def folders() -> dict[str, Callable[[Path], None]]:
    """Case -> what writes its tokenizer into a folder."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast as Fast

    def chatml(folder: Path) -> None:
        Fast(tokenizer_object=byte_level(None), eos_token="<|im_end|>", pad_token="<|endoftext|>").save_pretrained(
            folder
        )
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))

    def llama3(folder: Path) -> None:
        tokenizer = Fast(tokenizer_object=byte_level("<s>"), bos_token="<s>", eos_token="<|endoftext|>")
        tokenizer.add_tokens([AddedToken("<box>", special=False), AddedToken("<|eot|>", special=True)])
        tokenizer.save_pretrained(folder)

    def llama2(scheme: str) -> Callable[[Path], None]:
        def write(folder: Path) -> None:
            tokenizer = spaced(["<unk>", "<s>", "</s>"], scheme)
            special = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
            Fast(tokenizer_object=tokenizer, **special, add_bos_token=True).save_pretrained(folder)

        return write

    def gemma(folder: Path) -> None:
        tokenizer = spaced(["<pad>", "<eos>", "<bos>", "<unk>"], "never")
        special = dict(pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")
        Fast(tokenizer_object=tokenizer, **special, add_bos_token=True, add_eos_token=False).save_pretrained(folder)

    def t5(folder: Path) -> None:
        special = dict(eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
        Fast(tokenizer_object=unigram(), **special, clean_up_tokenization_spaces=True).save_pretrained(folder)

    def older_named(folder: Path) -> None:
        llama2("older")(folder)
        named(folder, {})

    def pieces_added(folder: Path) -> None:
        """Two tokens besides, of which one has a role; and no space before words that have none."""
        pieces(add_prefix_space=False, pad_token="<pad>")(folder)
        (folder / "added_tokens.json").write_text(json.dumps({"<pad>": 360, "<box>": 361}))

    return {
        "chatml": chatml, "llama3": llama3, "llama2": llama2("first"), "llama2_older": llama2("older"),
        "llama2_older_named": older_named, "gemma": gemma, "unigram": t5, "pieces": pieces(legacy=False),
        "pieces_legacy": pieces(legacy=True), "pieces_added": pieces_added,
    }  # fmt: skip


def files_of(folder: Path) -> dict[str, str]:
    """Name -> bytes in base64, of everything but weights."""
    kept = [path for path in sorted(folder.iterdir()) if path.suffix not in (".safetensors",)]
    return {path.name: base64.b64encode(path.read_bytes()).decode() for path in kept}


def write(files: dict[str, str], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(base64.b64decode(content))
    return folder


def words(make: Callable[[Path], None]) -> dict[str, Any]:
    """One tokenizer, as the reference reads it back from its folder."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make(folder)
        files = files_of(folder)
        reference = AutoTokenizer.from_pretrained(folder)
    ids = [reference(text)["input_ids"] for text in TEXTS]
    rng = np.random.default_rng(0)
    strange = [rng.integers(0, len(reference), 12).tolist() for _ in range(6)]
    return {
        "files": files,
        "ids": ids,
        "plain": [reference(text, add_special_tokens=False)["input_ids"] for text in TEXTS],
        "decoded": [reference.decode(row, skip_special_tokens=True) for row in ids],
        "strange": strange,
        "strange_decoded": [reference.decode(row, skip_special_tokens=True) for row in strange],
        "pad": reference.pad_token_id,
        "rendered": {
            kind: [
                reference.apply_chat_template(talk, chat_template=form, tokenize=False, add_generation_prompt=True)
                for talk in TALKS
            ]
            for kind, form in TEMPLATES.items()
        },
        "rendered_parts": {
            kind: [
                reference.apply_chat_template(
                    in_parts(talk, images), chat_template=form, tokenize=False, add_generation_prompt=True
                )
                for talk in TALKS
                for images in (0, 1)
            ]
            for kind, form in PART_TEMPLATES.items()
        },
    }


def save(path: Path, cases: dict[str, Any]) -> None:
    path.write_bytes(gzip.compress(json.dumps(cases).encode(), mtime=0))


def read(path: Path = PATH) -> dict[str, Any]:
    """A golden file, case by case."""
    return json.loads(gzip.decompress(path.read_bytes()))


if __name__ == "__main__":
    save(PATH, {name: words(make) for name, make in folders().items()})
