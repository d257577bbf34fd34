"""Makes peers_answers.json.gz: what whole tiny models of transformers answer to pictures and prompts.

    python -m tests.golden.peers_answers          # with torch and transformers; see make_peers.py

Each case holds the files of a folder but for its weights, which are drawn from their names. Pictures are the noise of
`pictures`, which no processor changes, and the photographs that come with scikit-learn, which it makes small.
"""

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.golden import peers_text, peers_vision
from tests.golden.drawn import redrawn

PATH = Path(__file__).with_name("peers_answers.json.gz")
NEW_TOKENS = 64
QUESTIONS = ("What is in this picture?", "read", "Describe the image in detail, please; it's 日本語")
PHOTOGRAPHS = ("china.jpg", "flower.jpg")  # both are asked the first question
SIDE = 12
VISION = {**peers_vision.VISION, "num_hidden_layers": 2, "image_size": SIDE}
TEXT = {**peers_vision.TEXT, "vocab_size": 384, "intermediate_size": 40, "max_position_embeddings": 256}
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'].upper() + ': ' }}{% endif %}"
    "{% for part in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def pictures() -> np.ndarray:
    """uint8[3, 12, 12, 3]: of the encoder's size, so that resizing has no say."""
    return np.random.default_rng(5).integers(0, 256, (3, SIDE, SIDE, 3)).astype(np.uint8)


def photograph(name: str) -> Path:
    """640 x 427 pixels, as a camera took them."""
    package = importlib.util.find_spec("sklearn")
    assert package is not None
    return Path(str(package.origin)).parent / "datasets" / "images" / name


def llava() -> tuple[Any, Any, list[str]]:
    """Model, processor and prompts."""
    import transformers as t

    special = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_bos_token=True)
    backend = peers_text.spaced(["<unk>", "<s>", "</s>"], "first")
    tokenizer = t.PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.add_tokens([mark()])
    text = {**TEXT, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
    token = tokenizer.convert_tokens_to_ids("<image>")
    config = peers_vision.llava_config(t, VISION, text, image_token_index=token)
    images = t.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor = t.LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=4, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, image_token="<image>", chat_template=TEMPLATE,
    )  # fmt: skip
    asked = [f"USER: <image>\n{question} ASSISTANT:" for question in QUESTIONS]
    return t.LlavaForConditionalGeneration(config), processor, asked


def paligemma() -> tuple[Any, Any, list[str]]:
    """Model, processor and prompts."""
    import transformers as t

    special = dict(bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>")
    backend = peers_text.spaced(["<pad>", "<eos>", "<bos>", "<unk>"], "never")
    tokenizer = t.PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.add_special_tokens({"additional_special_tokens": [mark()]})
    # Its processor would add over a thousand tokens for places.
    t.models.paligemma.processing_paligemma.EXTRA_TOKENS = ["<loc0000>", "<seg000>"]
    gemma = t.GemmaConfig(**{**TEXT, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1})
    token = tokenizer.convert_tokens_to_ids("<image>")
    config = peers_vision.paligemma_config(t, VISION, gemma, image_token_index=token)
    images = t.SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    images.image_seq_length = (SIDE // VISION["patch_size"]) ** 2
    processor = t.PaliGemmaProcessor(image_processor=images, tokenizer=tokenizer)
    return t.PaliGemmaForConditionalGeneration(config), processor, [f"<image>{question}" for question in QUESTIONS]


def mark() -> Any:
    from tokenizers import AddedToken

    return AddedToken("<image>", special=True, normalized=False)


MODELS = {"llava": llava, "paligemma": paligemma}


def answer(kind: str) -> dict[str, Any]:
    """A whole tiny model's files, and its answers."""
    import torch
    from PIL import Image

    torch.set_num_threads(1)
    model, processor, asked = MODELS[kind]()
    with tempfile.TemporaryDirectory() as place:
        processor.save_pretrained(place)
        model, shapes = redrawn(model, Path(place))
        files = peers_text.files_of(Path(place))
    processor.tokenizer.padding_side = "left"
    given, answers = said(model, processor, asked, [Image.fromarray(one) for one in pictures()])
    with torch.no_grad():
        logits = model(**given).logits * given["attention_mask"][..., None]
    taken = [Image.open(photograph(name)) for name in PHOTOGRAPHS]
    return {
        "files": files,
        "shapes": shapes,
        "asked": asked,
        "input_ids": given["input_ids"].tolist(),
        "mask": given["attention_mask"].tolist(),
        "logits": np.round(logits[:, -1].numpy().astype(float), 5).tolist(),
        "answers": answers,
        "of_photographs": said(model, processor, asked[:1] * len(taken), taken)[1],
    }


def said(model: Any, processor: Any, asked: list[str], shown: list[Any]) -> tuple[Any, list[str]]:
    """What the model is given, and its greedy answers."""
    import torch

    given = processor(text=asked, images=shown, return_tensors="pt", padding=True)
    given.pop("labels", None)
    with torch.no_grad():
        out = model.generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False)[:, given["input_ids"].shape[1] :]
    return given, [processor.tokenizer.decode(row, skip_special_tokens=True) for row in out]


def read() -> dict[str, Any]:
    """The golden file, case by case."""
    return peers_text.read(PATH)


if __name__ == "__main__":
    peers_text.save(PATH, {kind: answer(kind) for kind in MODELS})
