"""Makes peers_conversations.json.gz: the ids and loss masks that LLaVA and LLaVA-NeXT train on.

    LLAVA=... LLAVA_NEXT=... python -m tests.golden.peers_conversations     # git folders; see make_peers.py

Runs the `preprocess_*` functions of their `llava/train/train.py` on small tokenizers. ids: -1 stands for an image.
"""

import ast
import copy
import json
import os
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

from tests.golden import peers_text
from tests.golden.make_peers import REPOSITORIES

PATH = Path(__file__).with_name("peers_conversations.json.gz")
# Tokenizer of peers_text -> formats that end answers with a token of its own.
_LLAMA = ("v1", "llama_2", "llava_llama_2", "plain")
TOKENIZERS = {
    **dict.fromkeys(("pieces", "pieces_legacy", "llama2", "llama2_older"), _LLAMA),
    "chatml": ("plain", "mpt", "qwen_headers"),
    "llama3": ("plain", "mpt"),
}
# Ours -> the conversation and the function of theirs.
LLAVA = {
    "v1": ("vicuna_v1", "preprocess_v1"),
    "llama_2": ("llama_2", "preprocess_llama_2"),
    "llava_llama_2": ("llava_llama_2", "preprocess_llama_2"),
    "plain": ("plain", "preprocess_plain"),
    "mpt": ("mpt", "preprocess_mpt"),
}
TAGGED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROWS: dict[str, list[str]] = {
    "image": ["<image>\nWhat is in this picture?", "A cat sits on the mat."],
    "image, two turns": ["<image>\nWhat is this?", "A fox.", "Is it quick?", "Yes, and brown."],
    "text": ["Describe the image in detail, please", "I can't: there is none."],
    "text, three turns": ["hello world", "Hi!", "two and three?", "5", "and the dog?", "It is lazy."],
    "unicode": ["<image>\nnaïve café 日本語?", "日本語 and 😀!"],
    "answer in letters of several bytes": ["<image>\nread", "é日"],
    "trailing spaces": ["<image>\nread row two  ", "the quick   ", " and three ", " brown fox  "],
    "newlines": ["<image>\nread\n\nthe row\n", "\nline one\nline two\n"],
    "image in the middle": ["What is <image> this?", "A cat."],
    "image at the end": ["What is this? <image>", "A cat."],
    "image alone": ["<image>", "A cat sits on the mat."],
    "two images": ["<image>\n<image>\nWhat differs?", "The mat."],
    "images in two turns": ["<image>\nWhat is this?", "A cat.", "<image>\nAnd this?", "A dog."],
    "end token in a question": ["<image>\nwhat does </s> mean?", "The end."],
    "end token in an answer": ["<image>\nhow do I end it?", "with </s> there"],
    "role in an answer": ["<image>\nwho reads?", "It says ASSISTANT: hello"],
    "chatml tokens in a question": ["<image>\nis <|im_end|> text?<|im_start|>user", "no"],
    "digits": ["<image>\nread row two", "4 7 42 007"],
    "tabs": ["def f(x):\n    return x + 1", "\treturn 2"],
}


def source(repository: str, path: str) -> str:
    show = ("git", "-C", os.environ[repository], "show", f"{REPOSITORIES[repository][1]}:{path}")
    return subprocess.run(show, capture_output=True, text=True, check=True).stdout


def functions(repository: str, names: tuple[str, ...], scope: dict[str, Any], edit: Any = lambda text: text) -> None:
    """Executes functions of a repository's train.py and mm_utils.py in `scope`, and nothing else of them."""
    for path in ("llava/mm_utils.py", "llava/train/train.py"):
        text = edit(source(repository, path))
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and node.name in names:
                exec(compile(ast.Module([node], []), path, "exec"), scope)


def conversations() -> types.ModuleType:
    module = types.ModuleType("conversation")
    sys.modules["conversation"] = module
    exec(source("LLAVA", "llava/conversation.py"), module.__dict__)
    return module


def scope_of(repository: str, edit: Any = lambda text: text) -> dict[str, Any]:
    import torch
    import transformers

    scope: dict[str, Any] = {"torch": torch, "transformers": transformers, "copy": copy, "re": re}
    scope |= {"IGNORE_INDEX": -100, "IMAGE_TOKEN_INDEX": -200, "DEFAULT_IMAGE_TOKEN": "<image>"}
    scope |= {"conversation_lib": conversations(), "IS_TOKENIZER_GREATER_THAN_0_14": True}
    exec("from typing import *", scope)
    names = ("tokenizer_image_token", *{name for _, name in LLAVA.values()}, "preprocess_qwen")
    functions(repository, names, scope, edit)
    return scope


def as_of_4(tokenizer: Any) -> Any:
    """A tokenizer with what transformers 4 had, which the functions use."""

    class Older(type(tokenizer)):  # type: ignore[misc]
        def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
            mask = kwargs.get("return_assistant_tokens_mask", False)
            return super().apply_chat_template(*args, return_dict=mask, **kwargs)

        @property
        def additional_special_tokens_ids(self) -> list[int]:
            return self.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])

    tokenizer.__class__ = Older
    tokenizer.model_max_length = 2048
    if not hasattr(tokenizer, "legacy"):
        tokenizer.legacy = False
    return tokenizer


def learned(out: dict[str, Any]) -> dict[str, Any]:
    ids, labels = (list(map(int, out[name][0])) for name in ("input_ids", "labels"))
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    return {"ids": [-1 if i == -200 else i for i in ids], "target": [label != -100 for label in labels]}


def turns_of(row: list[str]) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(row)]


def case(tokenizer: Any, formats: tuple[str, ...], scope: dict[str, Any], next_scope: dict[str, Any]) -> dict[str, Any]:
    """Format -> row -> ids and mask."""
    found: dict[str, Any] = {}
    library = scope["conversation_lib"]
    for ours in formats:
        found[ours] = {}
        for title, row in ROWS.items():
            images = sum(text.count("<image>") for text in row)
            if ours == "plain" and (len(row) != 2 or images != 1):
                continue
            if ours in LLAVA:
                library.default_conversation = library.conv_templates[LLAVA[ours][0]]
                function = scope[LLAVA[ours][1]]
            else:
                function = next_scope["preprocess_qwen"]
            arguments = () if ours == "plain" else (images > 0,)
            found[ours][title] = learned(function([turns_of(row)], tokenizer, *arguments))
    return found


def tagged(tokenizer: Any) -> list[dict[str, Any]]:
    """What transformers takes for the assistant's tokens of a template with `generation` tags."""
    found = []
    for row in ROWS.values():
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(row)]
        out = tokenizer.apply_chat_template(
            messages, chat_template=TAGGED, tokenize=True, return_assistant_tokens_mask=True
        )
        found.append({"ids": out["input_ids"], "target": [bool(one) for one in out["assistant_masks"]]})
    return found


def all_cases() -> dict[str, Any]:
    from transformers import AutoTokenizer

    scope, out = scope_of("LLAVA"), {}
    for name, formats in TOKENIZERS.items():
        with tempfile.TemporaryDirectory() as place:
            peers_text.folders()[name](Path(place))
            files = peers_text.files_of(Path(place))
            tokenizer = as_of_4(AutoTokenizer.from_pretrained(place))
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        newline = tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
        next_scope = scope_of("LLAVA_NEXT", lambda text, new=newline: text.replace("[198,", f"[{new},"))
        out[name] = {
            "files": files,
            "formats": case(tokenizer, formats, scope, next_scope),
            "tagged": tagged(tokenizer),
        }
    return out


def read() -> dict[str, Any]:
    """The golden file."""
    return peers_text.read(PATH)


if __name__ == "__main__":
    peers_text.save(PATH, json.loads(json.dumps(all_cases())))
