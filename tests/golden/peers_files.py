"""Makes peers_files.json.gz: which file of a folder transformers takes a chat template, a begin and an end token from.

python -m tests.golden.peers_files          # with torch and transformers; see make_peers.py
"""

import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

from tests.golden import peers_text

PATH = Path(__file__).with_name("peers_files.json.gz")
TEXTS = ("What is this?", "<s>a cat</s>", "")
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
POST_PROCESSORS = ("none", "begin", "both", "end", "bytes", "bytes and begin")
_ANY = (None, "PreTrainedTokenizerFast", "TokenizersBackend", "LlamaTokenizer", "LlamaTokenizerFast")
# Backend -> classes and model types. (Qwen's classes build their own splitting around any vocabulary, which only
# byte-level files agree with.)
BACKENDS = {
    "spaces": (_ANY, (None, "llama", "llava")),
    "bytes": ((*_ANY, "GPT2Tokenizer", "Qwen2Tokenizer", "Qwen2TokenizerFast"), (None, "llama", "qwen2", "llava")),
    "gemma": (("GemmaTokenizer", "GemmaTokenizerFast", None), (None, "gemma", "paligemma")),
}
KEYS = [
    {name: value for name, value in zip(("add_bos_token", "add_eos_token"), pair, strict=True) if value is not None}
    for pair in itertools.product((None, True, False), repeat=2)
]

# A folder of a chat template: file -> what it holds. Each file names itself in its template.
FILES = {
    "processor_config.json": {"processor_class": "LlavaProcessor", "chat_template": "processor_config"},
    "chat_template.json": {"chat_template": "legacy json"},
    "chat_template.jinja": "jinja",
    "additional_chat_templates/tool_use.jinja": "tool_use of the folder",
    "additional_chat_templates/default.jinja": "default of the folder",
    "tokenizer_config.json": "tokenizer_config",
}
LISTS = {
    "one named default": [{"name": "default", "template": "of the list"}],
    "two": [{"name": "rag", "template": "rag of the list"}, {"name": "default", "template": "default of the list"}],
    "twice": [{"name": "default", "template": "first"}, {"name": "default", "template": "second"}],
    "none named default": [{"name": "rag", "template": "rag of the list"}],
    "empty": "",
}


def backend(kind: str, post_processor: str) -> Any:
    from tokenizers import processors

    tokens = ["<unk>", "<s>", "</s>"]
    if kind == "bytes":
        out = peers_text.byte_level("<s>")
        out.add_special_tokens(tokens)
    else:
        out = peers_text.spaced(tokens, "first" if kind == "spaces" else "never")
    pairs = [(token, out.token_to_id(token)) for token in ("<s>", "</s>")]
    singles = {"begin": "<s> $A", "both": "<s> $A </s>", "end": "$A </s>"}
    made = {name: processors.TemplateProcessing(single=one, special_tokens=pairs) for name, one in singles.items()}
    made["bytes"] = processors.ByteLevel(trim_offsets=False)
    made["bytes and begin"] = processors.Sequence([made["bytes"], made["begin"]])
    content = json.loads(out.to_str())
    content["post_processor"] = None
    if post_processor != "none":
        out.post_processor = made[post_processor]
        content["post_processor"] = json.loads(out.to_str())["post_processor"]
    return content


def begin_end(folder: Path, content: Any, settings: dict[str, Any], model_type: str | None) -> list[list[int]]:
    from transformers import AutoTokenizer

    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type} if model_type else {}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer(text)["input_ids"] for text in TEXTS]


def all_begin_end() -> dict[str, Any]:
    """The files, and the ids of each combination of class, model, keys and post-processor."""
    kept: dict[str, Any] = {"backends": {}, "cases": []}
    for kind, post in itertools.product(BACKENDS, POST_PROCESSORS):
        content = backend(kind, post)
        kept["backends"].setdefault(kind, {**content, "post_processor": None})
        kept.setdefault("post_processors", {}).setdefault(kind, {})[post] = content["post_processor"]
        for name, model_type, keys in itertools.product(*BACKENDS[kind], KEYS):
            if model_type and keys not in KEYS[::4]:
                continue  # as without a model type
            settings = {**SPECIAL, **keys} | ({"tokenizer_class": name} if name else {})
            with tempfile.TemporaryDirectory() as place:
                ids = begin_end(Path(place), content, settings, model_type)
            kept["cases"].append(
                {"backend": kind, "post": post, "settings": settings, "model_type": model_type, "ids": ids}
            )
    return kept


def write_templates(folder: Path, files: dict[str, Any], template: Any, base: dict[str, str]) -> None:
    peers_text.write(base, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if name == "tokenizer_config.json":
            path.write_text(json.dumps({**settings, "chat_template": template}))
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))


def template_of(folder: Path, model_type: str) -> str | None:
    """What the reference renders for a conversation, None where it refuses to."""
    from transformers import AutoProcessor, AutoTokenizer

    messages = [{"role": "user", "content": "x"}]
    try:
        made = (AutoProcessor if model_type == "llava" else AutoTokenizer).from_pretrained(folder)
        return made.apply_chat_template(messages, tokenize=False)
    except (ValueError, KeyError, TypeError, OSError) as error:
        print("refused:", str(error)[:100])
        return None


def all_templates() -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as place:
        peers_text.folders()["llama2"](Path(place))
        base = peers_text.files_of(Path(place))
    base = {name: base[name] for name in ("tokenizer.json", "tokenizer_config.json")}
    kept: dict[str, Any] = {"files": base, "cases": []}
    shown: list[tuple[tuple[str, ...], Any]] = []
    for count in range(len(FILES) + 1):
        shown += [(names, "tokenizer_config") for names in itertools.combinations(FILES, count)]
    shown += [(("tokenizer_config.json",), kind) for kind in LISTS]
    shown += [(("chat_template.jinja", "tokenizer_config.json"), kind) for kind in LISTS]
    for model_type, (names, template) in itertools.product(("llava", "llama"), shown):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            write_templates(folder, {name: FILES[name] for name in names}, LISTS.get(template, template), base)
            (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
            if model_type == "llava":
                (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
            found = template_of(folder, model_type)
        kept["cases"].append({"model_type": model_type, "names": names, "template": template, "rendered": found})
    return kept


PREPROCESSOR = {"image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor"}


# Parts of tokenizer_config.json and of the older special_tokens_map.json beside it.
SPECIAL_PARTS = {
    "roles": {"bos_token": "</s>", "pad_token": "<unk>"},
    "null": {"unk_token": None, "sep_token": None},
    "decoder": {
        "added_tokens_decoder": {str(i): {"content": t, "special": True} for i, t in enumerate(["<unk>", "<s>"])}
    },
    "own": {"boi_token": "<s>"},
}
SPECIAL_MAPS = (None, {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>", "pad_token": "</s>"})


def write_special(folder: Path, base: dict[str, str], parts: list[str], older: dict[str, Any] | None) -> None:
    peers_text.write({"tokenizer.json": base["tokenizer.json"]}, folder)
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name in parts:
        settings |= SPECIAL_PARTS[name]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if older:
        (folder / "special_tokens_map.json").write_text(json.dumps(older))


def all_special(base: dict[str, str]) -> list[dict[str, Any]]:
    """Which tokens have which role."""
    from transformers import AutoTokenizer

    kept = []
    for count in range(len(SPECIAL_PARTS) + 1):
        for parts, older in itertools.product(itertools.combinations(SPECIAL_PARTS, count), SPECIAL_MAPS):
            with tempfile.TemporaryDirectory() as place:
                write_special(Path(place), base, list(parts), older)
                found = AutoTokenizer.from_pretrained(place).special_tokens_map
            kept.append({"parts": parts, "map": older, "special": {name: str(token) for name, token in found.items()}})
    return kept


def everything() -> dict[str, Any]:
    templates = all_templates()
    return {"templates": templates, "begin_end": all_begin_end(), "special": all_special(templates["files"])}


def read() -> dict[str, Any]:
    """The golden file."""
    return peers_text.read(PATH)


if __name__ == "__main__":
    peers_text.save(PATH, json.loads(json.dumps(everything())))
