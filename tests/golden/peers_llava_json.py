"""Makes peers_llava_json.json.gz: what LLaVA trains on, from the sixty items of tests/data/traps.py.

    LLAVA=... LLAVA_NEXT=... python -m tests.golden.peers_llava_json     # git folders; see make_peers.py

Runs `preprocess_multimodal` and `preprocess_v1` (`preprocess_plain`) of LLaVA on every item that it reads, with the
tokenizer "pieces" of peers_conversations; items with a list of images are marked by LLaVA-NeXT's function. An item that
the reference cannot read is None. ids: -1 stands for an image. Nothing is True in `target` where the reference gives up
on an item because it miscounts its tokens.
"""

import copy
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.data import traps
from tests.golden import peers_conversations, peers_text

PATH = Path(__file__).with_name("peers_llava_json.json.gz")
FORMATS = ("v1", "plain")


def marked(scopes: dict[str, Any], row: dict[str, Any]) -> list[dict[str, str]]:
    """The conversation with its placeholders where the reference puts them."""
    talk = [copy.deepcopy(row["conversations"])]
    if "image" not in row:
        return talk[0]
    scope = scopes["LLAVA_NEXT" if isinstance(row["image"], list) else "LLAVA"]
    return scope["preprocess_multimodal"](talk, SimpleNamespace(is_multimodal=True, mm_use_im_start_end=False))[0]


def all_rows() -> dict[str, list[dict[str, Any] | None]]:
    from transformers import AutoTokenizer

    scopes = {name: peers_conversations.scope_of(name) for name in ("LLAVA", "LLAVA_NEXT")}
    for name, scope in scopes.items():
        scope["DataArguments"] = object
        peers_conversations.functions(name, ("preprocess_multimodal",), scope)
    with tempfile.TemporaryDirectory() as folder:
        rows = traps.build(Path(folder)).rows
        place = peers_text.write(peers_conversations.read()["pieces"]["files"], Path(folder, "tokenizer"))
        tokenizer = peers_conversations.as_of_4(AutoTokenizer.from_pretrained(place))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token
    scope, out = scopes["LLAVA"], {}
    for ours in FORMATS:
        conversation, function = peers_conversations.LLAVA[ours]
        scope["conversation_lib"].default_conversation = scope["conversation_lib"].conv_templates[conversation]
        out[ours] = []
        for row in rows:
            try:
                talk = marked(scopes, row)
                arguments = () if ours == "plain" else ("image" in row,)
                found = peers_conversations.learned(scope[function]([talk], tokenizer, *arguments))
            except (AssertionError, KeyError, IndexError):
                found = None
            out[ours].append(found)
    return out


def read() -> dict[str, list[dict[str, Any] | None]]:
    """The golden file: format -> items in order."""
    return peers_text.read(PATH)


if __name__ == "__main__":
    peers_text.save(PATH, json.loads(json.dumps(all_rows())))
