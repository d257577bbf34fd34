"""Settings of a tokenizer from the files beside its vocabulary, checked.

    files = token_files.read(folder, config)     # folder, or one of its files
    files.file                                   # tokenizer.json or *.model
    files.special["bos_token"]                   # from tokenizer_config.json and special_tokens_map.json

`eos_ids` come from generation_config.json, else config.json. Raises `UserError` with the file and field for a value of
the wrong type.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlm_jax.core import reading
from vlm_jax.core.errors import UserError

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token
_MAX_ID = 2**31
_FOLDER = "additional_chat_templates"
_WITH_PROCESSOR = ("llava", "paligemma")  # model types


class TokenizerFiles(NamedTuple):
    """The settings of a tokenizer. Tokens are given by their text."""

    file: Path  # the vocabulary
    model_type: str | None  # of config.json
    settings: dict[str, Any]  # tokenizer_config.json
    special: dict[str, str]  # name that templates use ("bos_token") -> token
    added: dict[str, int | None]  # token that is matched whole -> id, None: the next free one
    flags: dict[str, dict[str, bool]]  # of added tokens, where a file gives them
    eos_ids: list[int] | None
    template: str | None  # chat template


def read(folder: Path, config: Mapping[str, Any], extra: Sequence[str] = ()) -> TokenizerFiles:
    """Reads the files beside a tokenizer; `extra` are further special tokens."""
    file = find(folder)
    if file is None:
        raise UserError(f"{folder}: no tokenizer.json and no *.model (name a tokenizer with tokenizer=PATH)")
    folder = file.parent
    settings = _settings(folder / "tokenizer_config.json")
    special = _special_tokens(folder, settings)
    added, flags = _added_tokens(folder, settings, (*special.values(), *extra))
    # A token with a role is special even where its entry says special=false.
    flags |= {token: {**flags[token], "special": True} for token in special.values() if token in flags}
    template, model_type = _template(folder, config, settings), config.get("model_type")
    return TokenizerFiles(file, model_type, settings, special, added, flags, eos_ids(folder, config), template)


def find(folder: Path) -> Path | None:
    """The vocabulary file: `folder` itself, a file in it, or beside it where `folder` is a file of weights."""
    if folder.suffix in (".json", ".model") and folder.is_file():
        return folder
    folder = folder if folder.is_dir() else folder.parent
    paths = (folder / "tokenizer.json", folder / "tokenizer.model", *sorted(folder.glob("*.model")))
    return next((path for path in paths if path.is_file()), None)


def eos_ids(folder: Path, config: Mapping[str, Any]) -> list[int] | None:
    """`eos_token_id` of generation_config.json, else of config.json, as a list; None where neither has it."""
    folder = folder if folder.is_dir() else folder.parent
    text_config = config.get("text_config")
    for name, source in (
        ("generation_config.json", _read_json(folder / "generation_config.json")),
        ("config.json", config),
        ("config.json: text_config", text_config if isinstance(text_config, Mapping) else {}),
    ):
        ids = source.get("eos_token_id")
        if ids is not None:
            return [_id(one, f"{folder / name}: eos_token_id") for one in (ids if isinstance(ids, list) else [ids])]
    return None


def check_utf8(text: str) -> str:
    """The text. Raises `UserError` for lone surrogates, which stand for invalid bytes of a command line."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"text: not valid UTF-8 (character {error.start}): {text[:40]!a}") from error
    return text


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, {} where there is no such file."""
    return reading.read_object(path) if reading.kind(path) else {}


def _content(token: Any, where: str) -> str:
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise UserError(f"{where}: expected a token, as a string or an object with `content`, got {str(token)[:80]}")
    return check_utf8(text)


def _id(number: Any, where: str) -> int:
    if type(number) is not int or not 0 <= number < _MAX_ID:
        raise UserError(f"{where}: expected a token id, an integer from 0 on, got {str(number)[:80]!r}")
    return number


def _settings(path: Path) -> dict[str, Any]:
    """tokenizer_config.json; its `added_tokens_decoder`, if any, with integer keys and checked entries."""
    settings = _read_json(path)
    decoder, where = settings.pop("added_tokens_decoder", None), f"{path}: added_tokens_decoder"
    if decoder is None:
        return settings
    if not isinstance(decoder, dict) or not all(isinstance(token, dict) for token in decoder.values()):
        raise UserError(f"{where}: expected an object of id -> {{content, ...}}")
    checked = {}
    for key, token in decoder.items():
        number = _id(int(key) if key.isdecimal() and len(key) < 20 else key, where)
        flags = {name: token[name] for name in _FLAGS if name in token}
        if not all(isinstance(flag, bool) for flag in flags.values()):
            raise UserError(f"{where}.{number}: expected true or false for {', '.join(flags)}")
        checked[number] = {"content": _content(token, f"{where}.{number}"), **flags}
    return {**settings, "added_tokens_decoder": checked}


def _token_group(settings: dict[str, Any], name: str, where: Path) -> dict[Any, str]:
    """Key -> token of a list or an object of tokens."""
    group = settings.get(name) or {}
    if not isinstance(group, dict | list):
        raise UserError(f"{where}: {name}: expected a list or an object of tokens, got {str(group)[:80]!r}")
    pairs = group.items() if isinstance(group, dict) else enumerate(group)
    return {key: _content(token, f"{where}: {name}") for key, token in pairs}


def _special_tokens(folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    """Name -> token. special_tokens_map.json overrides tokenizer_config.json, and does not count beside its
    `added_tokens_decoder`, as in transformers 5.
    """
    older = {} if "added_tokens_decoder" in settings else _read_json(folder / "special_tokens_map.json")
    both = {**settings, **older}
    extra = _token_group(both, "extra_special_tokens", folder)
    tokens = {name: token for name, token in extra.items() if isinstance(name, str)}
    for name, token in both.items():
        if token is not None and (name in ROLES or (name.endswith("_token") and isinstance(token, str | dict))):
            tokens[name] = _content(token, f"{folder}: {name}")
    return {name: token for name, token in tokens.items() if token}


def _added_tokens(
    folder: Path, settings: dict[str, Any], special: Sequence[str]
) -> tuple[dict[str, int | None], dict[str, dict[str, bool]]]:
    """`TokenizerFiles.added` and `TokenizerFiles.flags`."""
    path = folder / "added_tokens.json"
    added: dict[str, int | None] = {check_utf8(token): _id(n, str(path)) for token, n in _read_json(path).items()}
    names = ("extra_special_tokens", "additional_special_tokens")
    extra = next((group for name in names if (group := _token_group(settings, name, folder))), {})
    special = (*special, *extra.values())
    flags = {token: {"special": False, "normalized": True} for token in added if token not in special}
    for number, token in settings.get("added_tokens_decoder", {}).items():
        added[token["content"]] = number
        flags[token["content"]] = {name: flag for name, flag in token.items() if name != "content"}
    for token in special:
        added.setdefault(token, None)
    return {token: number for token, number in added.items() if token}, flags


def _template(folder: Path, config: Mapping[str, Any], settings: dict[str, Any]) -> str | None:
    """The chat template of the first of these that has one, as transformers 5.23 takes it.

    AutoProcessor: processor_config.json, chat_template.json, the .jinja files. AutoTokenizer: the .jinja files. Of a
    folder without any, tokenizer_config.json. Of several named templates, "default".

    Raises `UserError` for files that transformers refuses together.
    """
    files = _jinja_files(folder)
    if _has_processor(folder, config, settings):
        legacy, where = folder / "chat_template.json", folder / "processor_config.json"
        template = _template_of(_read_json(where), where)
        if legacy.is_file() and any(path.parent != folder for path in files.values()):
            raise UserError(f"{legacy}: expected no {_FOLDER} beside it (transformers refuses both: delete one)")
        # In the file itself wins here; `_jinja_files` has AutoTokenizer's order.
        file = folder / "chat_template.jinja"
        template = (
            template
            or _template_of(_read_json(legacy), legacy)
            or (reading.read_text(file) if file.is_file() else None)
        )
        if template is not None:
            return template
    if files:
        return reading.read_text(files["default"]) if "default" in files else None
    return _template_of(settings, folder / "tokenizer_config.json")


def _has_processor(folder: Path, config: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether the tokenizer belongs to a vision-language model; without a config.json, whether files say so."""
    if "model_type" in config:
        return "vision_config" in config or config["model_type"] in _WITH_PROCESSOR
    names = ("processor_config.json", "chat_template.json")
    return "processor_class" in settings or any((folder / name).is_file() for name in names)


def _jinja_files(folder: Path) -> dict[str, Path]:
    """Name -> file of the folder's templates."""
    files = {"default": folder / "chat_template.jinja", **{p.stem: p for p in (folder / _FOLDER).glob("*.jinja")}}
    return {name: path for name, path in files.items() if path.is_file()}


def _template_of(content: Mapping[str, Any], where: Path) -> str | None:
    """The entry `chat_template` of a JSON file: a text, or a list of named ones, of which the last of a name counts."""
    template = content.get("chat_template")
    if isinstance(template, list) and all(isinstance(one, dict) for one in template):
        template = {str(one.get("name")): one.get("template") for one in template}
    if isinstance(template, dict):
        template = template.get("default")
    if not isinstance(template, str | None):
        raise UserError(f"{where}: chat_template: expected a string, or a list of objects with `name` and `template`")
    return template
