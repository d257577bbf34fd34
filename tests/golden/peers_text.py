"""Makes peers_text.json.gz: what transformers makes of texts, messages and pictures, with tokenizers of a few lines.

    python -m tests.golden.peers_text          # with torch and transformers; see make_peers.py

Each case holds the files of a folder and what the reference's tokenizer or processor says; two of them hold a whole
model (its weights are drawn from their names by `peers_vision.weights`) and its answers to prompts of several lengths.
"""

import base64
import gzip
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.golden.peers_vision import weights

PATH = Path(__file__).with_name("peers_text.json.gz")
NEW_TOKENS = 64
LINES = [
    "What is in this picture? A cat sits on the mat, and it doesn't move.",
    "Describe the image in detail, please; it's 42 degrees.",
    "read row two and three: the quick brown fox jumps over the lazy dog",
    "USER: hello world ASSISTANT: naïve café, 日本語 and 😀!",
    "def f(x):\n    return x + 1\n",
] * 4
TEXTS = (*LINES[:5], "", " ", "  two spaces ", "</s> is text? <s>a", "<|im_start|>user\nhi<|im_end|>",
         "tab\tand\r\nline", "Ünknown żółć Ж", "don 't stop , now !")  # fmt: skip
QUESTIONS = ("What is in this picture?", "read", "Describe the image in detail, please; it's 日本語")
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
    "llava": (
        "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'].upper() + ': ' }}{% endif %}"
        "{% for part in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
        "{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
}


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
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    out = Tokenizer(models.Unigram())
    out.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
    out.pre_tokenizer, out.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False)
    out.train_from_iterator(LINES, trainer)
    out.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return out


def sentencepiece_model(folder: Path, **fields: Any) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line.replace("\n", " ") for line in LINES), model_prefix=str(folder / "tokenizer"),
        model_type="bpe", vocab_size=360, byte_fallback=True, normalization_rule_name="identity", minloglevel=2,
        remove_extra_whitespaces=False, split_digits=True, hard_vocab_limit=False, num_threads=1, **fields,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()


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

    def pieces(folder: Path) -> None:
        sentencepiece_model(folder)
        special = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
        said = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, **special}
        (folder / "tokenizer_config.json").write_text(json.dumps(said))

    return {
        "chatml": chatml, "llama3": llama3, "llama2": llama2("first"), "llama2_older": llama2("older"), "gemma": gemma,
        "unigram": t5, "pieces": pieces,
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


def words(make: Callable[[Path], None], name: str) -> dict[str, Any]:
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
            if kind != "llava"
        },
    }


VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 12,
    "patch_size": 4,
}  # fmt: skip
TEXT = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip


def pictures() -> np.ndarray:
    """uint8[3, 12, 12, 3]: of the encoder's size, so that resizing has no say."""
    return np.random.default_rng(5).integers(0, 256, (3, 12, 12, 3)).astype(np.uint8)


def seeing(kind: str) -> dict[str, Any]:
    """A whole tiny model, its processor, and its answers."""
    import torch
    import transformers as t
    from safetensors.numpy import load_file, save_file
    from tokenizers import AddedToken

    torch.set_num_threads(1)
    mark = AddedToken("<image>", special=True, normalized=False)
    if kind == "llava":
        tokenizer = t.PreTrainedTokenizerFast(
            tokenizer_object=spaced(["<unk>", "<s>", "</s>"], "first"), bos_token="<s>", eos_token="</s>",
            unk_token="<unk>", add_bos_token=True,
        )  # fmt: skip
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
        tokenizer.add_tokens([mark])
    else:
        tokenizer = t.PreTrainedTokenizerFast(
            tokenizer_object=spaced(["<pad>", "<eos>", "<bos>", "<unk>"], "never"), bos_token="<bos>",
            eos_token="<eos>", unk_token="<unk>", pad_token="<pad>",
        )  # fmt: skip
        tokenizer.add_special_tokens({"additional_special_tokens": [mark]})
        # Its processor would add over a thousand tokens for places.
        t.models.paligemma.processing_paligemma.EXTRA_TOKENS = ["<loc0000>", "<seg000>"]
    token = tokenizer.convert_tokens_to_ids("<image>")
    text = {
        **TEXT,
        "vocab_size": 384,
        "bos_token_id": 1 if kind == "llava" else 2,
        "eos_token_id": 2 - (kind != "llava"),
    }
    side = {"height": 12, "width": 12}
    if kind == "llava":
        config = t.LlavaConfig(
            vision_config=t.CLIPVisionConfig(**VISION), text_config=t.LlamaConfig(**text), image_token_index=token
        )
        model, images = (
            t.LlavaForConditionalGeneration(config),
            t.CLIPImageProcessorPil(size={"shortest_edge": 12}, crop_size=side),
        )
        processor = t.LlavaProcessor(
            image_processor=images, tokenizer=tokenizer, patch_size=4, vision_feature_select_strategy="default",
            num_additional_image_tokens=1, image_token="<image>", chat_template=TEMPLATES["llava"],
        )  # fmt: skip
        asked = [f"USER: <image>\n{question} ASSISTANT:" for question in QUESTIONS]
    else:
        vision = t.SiglipVisionConfig(**VISION, vision_use_head=False)
        config = t.PaliGemmaConfig(
            vision_config=vision, text_config=t.GemmaConfig(**text), image_token_index=token, projection_dim=24
        )
        model, images = t.PaliGemmaForConditionalGeneration(config), t.SiglipImageProcessorPil(size=side)
        images.image_seq_length = 9
        processor = t.PaliGemmaProcessor(image_processor=images, tokenizer=tokenizer)
        asked = [f"<image>{question}" for question in QUESTIONS]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        shapes = {key: list(leaf.shape) for key, leaf in sorted(load_file(folder / "model.safetensors").items())}
        save_file(weights(shapes), folder / "model.safetensors", metadata={"format": "pt"})
        model = type(model).from_pretrained(folder).eval()
        files = files_of(folder)
    from PIL import Image

    processor.tokenizer.padding_side = "left"
    given = processor(
        text=asked, images=[Image.fromarray(one) for one in pictures()], return_tensors="pt", padding=True
    )
    given.pop("labels", None)
    with torch.no_grad():
        logits = model(**given).logits * given["attention_mask"][..., None]
        out = model.generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False)[:, given["input_ids"].shape[1] :]
    return {
        "files": files,
        "shapes": shapes,
        "asked": asked,
        "input_ids": given["input_ids"].tolist(),
        "mask": given["attention_mask"].tolist(),
        "logits": np.round(logits[:, -1].numpy().astype(float), 5).tolist(),
        "answers": [processor.tokenizer.decode(row, skip_special_tokens=True) for row in out],
    }


def make() -> dict[str, Any]:
    out = {name: words(write_folder, name) for name, write_folder in folders().items()}
    return {**out, **{kind: seeing(kind) for kind in ("llava", "paligemma")}}


def read() -> dict[str, Any]:
    """The golden file."""
    return json.loads(gzip.decompress(PATH.read_bytes()))


def main() -> None:
    PATH.write_bytes(gzip.compress(json.dumps(make()).encode(), mtime=0))
    print(f"{PATH} {PATH.stat().st_size} bytes")


if __name__ == "__main__":
    main()
