"""What the files of a folder say about its tokenizer, checked: everything but the vocabulary itself.

    said = token_files.read(folder, config)      # folder, or one of its files
    said.file                                    # tokenizer.json or *.model
    said.special["bos_token"]                    # from tokenizer_config.json and special_tokens_map.json

The tokens that end an answer stand in generation_config.json, else config.json. A file that says what it cannot mean
raises `UserError` with its name.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlm_jax.core.errors import UserError

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token
_IDS = 2**31  # ids are below


class TokenizerFiles(NamedTuple):
    """A folder's tokenizer but for its vocabulary. Texts of tokens are as they are written in a prompt."""

    file: Path
    model_type: str | None  # of config.json
    settings: dict[str, Any]  # tokenizer_config.json
    special: dict[str, str]  # name that templates use ("bos_token") -> text
    added: dict[str, int | None]  # recognised before the text is cut up -> id, None: the next free one
    flags: dict[str, dict[str, bool]]  # of those added tokens of which a file tells them
    eos_ids: list[int] | None  # ids that end an answer, None where no file tells
    template: str | None  # the folder's own chat template


def read(folder: Path, config: Mapping[str, Any], more: Sequence[str] = ()) -> TokenizerFiles:
    """What the files beside a tokenizer say; `more` are tokens that it is to know besides."""
    file = find(folder)
    if file is None:
        raise UserError(f"{folder}: no tokenizer.json and no *.model; name a tokenizer with tokenizer=PATH")
    folder = file.parent
    settings = _settings(folder / "tokenizer_config.json")
    special = _special_tokens(folder, settings)
    added, flags = _added_tokens(folder, settings, (*special.values(), *more))
    # A token that has a role is special, whatever its entry says.
    flags |= {token: {**flags[token], "special": True} for token in special.values() if token in flags}
    kind, end = config.get("model_type"), eos_ids(folder, config)
    return TokenizerFiles(file, kind, settings, special, added, flags, end, _template(folder, settings))


def find(folder: Path) -> Path | None:
    """The file with the vocabulary: `folder` itself, or in it, or beside it where it is a file of weights."""
    if folder.suffix in (".json", ".model") and folder.is_file():
        return folder
    folder = folder if folder.is_dir() else folder.parent
    first = [path for path in (folder / "tokenizer.json", folder / "tokenizer.model") if path.is_file()]
    return next(iter([*first, *sorted(folder.glob("*.model"))]), None)


def eos_ids(folder: Path, config: Mapping[str, Any]) -> list[int] | None:
    """Ids that end an answer, where a file says so; several are a list. Raises `UserError` for what is no id."""
    folder = folder if folder.is_dir() else folder.parent
    inner = config.get("text_config")
    for name, source in (
        ("generation_config.json", _read_json(folder / "generation_config.json")),
        ("config.json", config),
        ("config.json: text_config", inner if isinstance(inner, Mapping) else {}),
    ):
        end = source.get("eos_token_id")
        if end is not None:
            return [_id(one, f"{folder / name}: eos_token_id") for one in (end if isinstance(end, list) else [end])]
    return None


def written(text: str) -> str:
    """The text, if UTF-8 can write it: bytes of a command line that are none arrive as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the text is not valid UTF-8 (character {error.start}): {text[:40]!a}") from error
    return text


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: an object is wanted, not {type(found).__name__}")
    return found


def _content(token: Any, where: str) -> str:
    """A token is written as its text, or as an object with its text in `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise UserError(f"{where}: {str(token)[:80]} is no token: its text is wanted, or an object with `content`")
    return written(text)


def _id(number: Any, where: str) -> int:
    if type(number) is not int or not 0 <= number < _IDS:
        raise UserError(f"{where}: {str(number)[:80]!r} is no id of a token: a whole number from 0 on is wanted")
    return number


def _settings(path: Path) -> dict[str, Any]:
    """tokenizer_config.json; its `added_tokens_decoder`, if any, with whole numbers for keys and checked entries."""
    settings = _read_json(path)
    decoder, where = settings.get("added_tokens_decoder"), f"{path}: added_tokens_decoder"
    if decoder is None:
        return {name: value for name, value in settings.items() if name != "added_tokens_decoder"}
    if not isinstance(decoder, dict) or not all(isinstance(token, dict) for token in decoder.values()):
        raise UserError(f"{where}: an object of id -> {{content, ...}} is wanted")
    checked = {}
    for key, token in decoder.items():
        number = _id(int(key) if key.isdecimal() and len(key) < 20 else key, where)
        flags = {name: token[name] for name in _FLAGS if name in token}
        if not all(isinstance(flag, bool) for flag in flags.values()):
            raise UserError(f"{where}.{number}: {', '.join(flags)} are true or false")
        checked[number] = {"content": _content(token, f"{where}.{number}"), **flags}
    return {**settings, "added_tokens_decoder": checked}


def _extra(both: dict[str, Any], name: str, where: Path) -> dict[Any, str]:
    """Tokens besides the usual ones, by their names or, of a list, their places."""
    extra = both.get(name) or {}
    if not isinstance(extra, dict | list):
        raise UserError(f"{where}: {name}={str(extra)[:80]!r}: a list or an object of tokens is wanted")
    pairs = extra.items() if isinstance(extra, dict) else enumerate(extra)
    return {key: _content(token, f"{where}: {name}") for key, token in pairs}


def _special_tokens(folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    """Name -> text; tokenizer_config.json has the last word."""
    both = {**_read_json(folder / "special_tokens_map.json"), **settings}
    given = {name: both[name] for name in (*NAMED, "image_token") if both.get(name) is not None}
    found = {name: _content(token, f"{folder}: {name}") for name, token in given.items()}
    extra = _extra(both, "extra_special_tokens", folder)
    named = {name: token for name, token in extra.items() if isinstance(name, str)}
    return {name: token for name, token in {**named, **found}.items() if token}


def _added_tokens(
    folder: Path, settings: dict[str, Any], special: Sequence[str]
) -> tuple[dict[str, int | None], dict[str, dict[str, bool]]]:
    """`TokenizerFiles.added` and `TokenizerFiles.flags`."""
    path = folder / "added_tokens.json"
    added: dict[str, int | None] = {written(token): _id(n, str(path)) for token, n in _read_json(path).items()}
    extra = _extra(settings, "extra_special_tokens", folder) or _extra(settings, "additional_special_tokens", folder)
    special = (*special, *extra.values())
    flags = {token: {"special": False, "normalized": True} for token in added if token not in special}
    for number, token in settings.get("added_tokens_decoder", {}).items():
        added[token["content"]] = number
        flags[token["content"]] = {name: flag for name, flag in token.items() if name != "content"}
    for token in special:
        added.setdefault(token, None)
    return {token: number for token, number in added.items() if token}, flags


def _template(folder: Path, settings: dict[str, Any]) -> str | None:
    """chat_template.jinja, chat_template.json, or the entry of tokenizer_config.json (its default, of several)."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not readable as UTF-8 ({error})") from error
    own = _read_json(folder / "chat_template.json").get("chat_template") or settings.get("chat_template")
    if isinstance(own, list) and all(isinstance(one, dict) for one in own):
        own = next((one.get("template") for one in own if one.get("name") == "default"), None)
    if not isinstance(own, str | None):
        raise UserError(f"{folder}: chat_template is no text, and no list of objects with `name` and `template`")
    return own
