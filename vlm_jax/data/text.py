"""Tokenizers and prompts of public models, from the files of their folders.

    tokenizer = read_tokenizer(folder, config)
    tokenizer.encode("What is this?")           # as the reference's tokenizer, with the special tokens that it adds
    tokenizer.plain("<bos>What is this?")       # nothing added; special tokens written in the text are recognised
    tokenizer.decode(ids)                       # special tokens left out

Read are `tokenizer.json` (tokenizers library) and SentencePiece's `*.model`; special tokens from tokenizer_config.json,
special_tokens_map.json and added_tokens.json; the tokens that end an answer from generation_config.json, else
config.json. How a question becomes a prompt stands in `data.chat`.
"""

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer

from vlm_jax.core.errors import UserError
from vlm_jax.data import tokenizer as words

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token
_IDS = 2**31  # ids are below
_SPACE = "\u2581"  # how SentencePiece writes a space


class Text(NamedTuple):
    """A tokenizer. `special` maps the names that templates use ("bos_token") to the text of the token."""

    encode: Callable[[str], list[int]]
    plain: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    size: int  # one more than the highest id; marks that the caller adds and unnamed special tokens do not count
    pad: int | None
    ends: tuple[int, ...]  # any of these ends an answer
    special: dict[str, str]
    template: str | None  # the folder's own chat template

    def id(self, token: str) -> int | None:
        """The id of one special token, None where the tokenizer does not know it."""
        ids = self.plain(token)
        return ids[-1] if len(ids) == 1 else None


def word_tokenizer() -> Text:
    """The project's own: one number a word, for runs that `vlm_jax.train` made."""
    return Text(
        words.encode,
        words.encode,
        words.decode,
        words.VOCAB_SIZE,
        words.PAD_ID,
        (words.END_ID,),
        {},
        None,
    )


def read_tokenizer(folder: Path, config: Mapping[str, Any], more: Sequence[str] = ()) -> Text:
    """The tokenizer of a folder, or of one file (`tokenizer.json`, `*.model`) and the files beside it.

    Args:
        config: config.json, for the tokens that end an answer; {} where there is none.
        more: special tokens that it is to know besides its own ("<image>").

    Raises `UserError` for a folder without a tokenizer, or a file that cannot be read.
    """
    file = _tokenizer_file(folder)
    folder = file.parent
    settings = _settings(folder / "tokenizer_config.json")
    special = _special_tokens(folder, settings)
    added = _added_tokens(folder, settings, (*special.values(), *more))
    make = _from_json if file.suffix == ".json" else _from_sentencepiece
    encode, plain, decode, ids, spare = make(file, settings, special, added)
    # A special token that the tokenizer's files do not use themselves may have no embedding: it is refused in use.
    aside = (spare | set(more)) - {special[name] for name in _NAMED if name in special}
    size = max((number for token, number in ids.items() if token not in aside), default=-1) + 1
    found = ends(folder, config)
    if found is None:
        found = [ids[special["eos_token"]]] if special.get("eos_token") in ids else []
    return Text(
        lambda said: encode(_written(said)),
        lambda said: plain(_written(said)),
        decode,
        size,
        ids.get(special.get("pad_token")),
        tuple(found),
        special,
        _template(folder, settings),
    )


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder, or that of a file of weights, holds a tokenizer."""
    folder = folder if folder.is_dir() else folder.parent
    return (folder / "tokenizer.json").is_file() or any(folder.glob("*.model"))


def _tokenizer_file(folder: Path) -> Path:
    if folder.suffix in (".json", ".model") and folder.is_file():
        return folder
    folder = folder if folder.is_dir() else folder.parent
    for name in ("tokenizer.json", "tokenizer.model"):
        if (folder / name).is_file():
            return folder / name
    models = sorted(folder.glob("*.model"))
    if not models:
        raise UserError(f"{folder}: no tokenizer.json and no *.model; name a tokenizer with tokenizer=PATH")
    return models[0]


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


def _written(text: str) -> str:
    """The text, if UTF-8 can write it: bytes of a command line that are none arrive as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the text is not valid UTF-8 (character {error.start}): {text[:40]!a}") from error
    return text


def _content(token: Any, where: str) -> str:
    """A token is written as its text, or as an object with its text in `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise UserError(f"{where}: {str(token)[:80]} is no token: its text is wanted, or an object with `content`")
    return _written(text)


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
    given = {name: both[name] for name in (*_NAMED, "image_token") if both.get(name) is not None}
    found = {name: _content(token, f"{folder}: {name}") for name, token in given.items()}
    extra = _extra(both, "extra_special_tokens", folder)
    named = {name: token for name, token in extra.items() if isinstance(name, str)}
    return {name: token for name, token in {**named, **found}.items() if token}


def _added_tokens(folder: Path, settings: dict[str, Any], special: Sequence[str]) -> dict[str, int | None]:
    """Text -> id (None: the next free one) of the tokens that are recognised before the text is cut up."""
    path = folder / "added_tokens.json"
    added: dict[str, int | None] = {_written(token): _id(n, str(path)) for token, n in _read_json(path).items()}
    for number, token in settings.get("added_tokens_decoder", {}).items():
        added[token["content"]] = number
    extra = _extra(settings, "extra_special_tokens", folder) or _extra(settings, "additional_special_tokens", folder)
    for token in (*special, *extra.values()):
        added.setdefault(token, None)
    return {token: number for token, number in added.items() if token}


def ends(folder: Path, config: Mapping[str, Any]) -> list[int] | None:
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


# encode, plain, decode, the ids of all tokens, and the special tokens that were added to the model's own
Parts = tuple[
    Callable[[str], list[int]], Callable[[str], list[int]], Callable[[Sequence[int]], str], Mapping[str, int], set[str]
]


def _from_json(file: Path, settings: dict[str, Any], special: dict[str, str], added: dict[str, int | None]) -> Parts:
    try:
        backend = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more exact
        raise UserError(f"{file}: not a readable tokenizer ({error})") from error
    backend.no_padding()
    backend.no_truncation()
    known = backend.get_vocab(with_added_tokens=True)
    flags = {
        token["content"]: {k: v for k, v in token.items() if k != "content"}
        for token in settings.get("added_tokens_decoder", {}).values()
    }
    new = sorted((token for token in added if token not in known), key=lambda t: (added[t] is None, added[t] or 0))
    backend.add_tokens([AddedToken(t, **{"special": True, "normalized": False, **flags.get(t, {})}) for t in new])
    # Named special tokens are always recognised whole and left out of what is decoded.
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special.values()])
    ids = backend.get_vocab(with_added_tokens=True)
    plain = lambda text: backend.encode(text, add_special_tokens=False).ids  # noqa: E731
    if "add_bos_token" in settings or "add_eos_token" in settings:
        before, behind = _around(settings, special, ids)
        encode = lambda text: [*before, *plain(text), *behind]  # noqa: E731
    else:
        encode = lambda text: backend.encode(text).ids  # noqa: E731
    clean = bool(settings.get("clean_up_tokenization_spaces")) and type(backend.model).__name__ != "BPE"

    def decode(numbers: Sequence[int]) -> str:
        text = backend.decode([int(n) for n in numbers], skip_special_tokens=True)
        return _cleaned(text) if clean else text

    return encode, plain, decode, ids, {t.content for t in backend.get_added_tokens_decoder().values() if t.special}


def _around(settings: dict[str, Any], special: dict[str, str], ids: Mapping[str, int]) -> tuple[list[int], list[int]]:
    """What the tokenizer's settings put before and behind each text."""
    return tuple(  # type: ignore[return-value]
        [ids[special[name]]] if settings.get(f"add_{name}") and special.get(name) in ids else []
        for name in ("bos_token", "eos_token")
    )


def _letters(some: bytes) -> str:
    """UTF-8, or a mark for each byte of what is not."""
    try:
        return some.decode()
    except UnicodeDecodeError:
        return "\ufffd" * len(some)


def _cleaned(text: str) -> str:
    """Spaces that word pieces leave before punctuation and English contractions."""
    text = re.sub(r" ([.?!,])", r"\1", text).replace(" ' ", "'")
    return re.sub(r" (n't|'m|'s|'ve|'re)", r"\1", text)


def _from_sentencepiece(
    file: Path, settings: dict[str, Any], special: dict[str, str], added: dict[str, int | None]
) -> Parts:
    model, inner = sentencepiece.SentencePieceProcessor(), sentencepiece.SentencePieceProcessor()
    try:
        content = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())
        model.LoadFromSerializedProto(content.SerializeToString())
    except (OSError, RuntimeError, DecodeError) as error:
        raise UserError(f"{file}: not a readable SentencePiece model ({error})") from error
    adds_space = content.normalizer_spec.add_dummy_prefix
    content.normalizer_spec.add_dummy_prefix = False
    inner.LoadFromSerializedProto(content.SerializeToString())
    ids = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
    size = len(ids)
    own = {
        "bos_token": model.bos_id(),
        "eos_token": model.eos_id(),
        "unk_token": model.unk_id(),
        "pad_token": model.pad_id(),
    }
    for name, number in own.items():
        if number >= 0:
            special.setdefault(name, model.id_to_piece(number))
    whole = {token: ids[token] for token in special.values() if token in ids}
    for token, number in added.items():
        if token not in ids:
            number = size if number is None else number
            size = max(size, number + 1)
        whole[token] = ids.setdefault(token, number)
    cut = re.compile("|".join(f"({re.escape(token)})" for token in sorted(whole, key=len, reverse=True)) or r"(?!)")

    def plain(text: str) -> list[int]:
        out, start = [], 0
        for match in (*cut.finditer(text), None):
            piece = text[start : match.start() if match else None]
            # With a tokenizer_config.json, as its library does: behind a special token the text goes on, so that only
            # the first piece gets the space before a word, unless it has one or the older way is asked for.
            goes_on = bool(settings) and (piece[:1] == " " or bool(out and not settings.get("legacy")))
            if piece:
                out += (inner if goes_on else model).encode(piece)
            if match:
                out.append(whole[match.group()])
                start = match.end()
        return out

    before, behind = _around({"add_bos_token": True, **settings}, special, ids)
    loud = {t["content"] for t in settings.get("added_tokens_decoder", {}).values() if not t.get("special", True)}
    names = {number: token for token, number in whole.items()}
    quiet = {number for number, token in names.items() if token not in loud}

    def decode(numbers: Sequence[int]) -> str:
        kept = [int(n) for n in numbers if int(n) not in quiet and (int(n) < len(model) or int(n) in names)]
        out = ""
        for is_byte, run in itertools.groupby(kept, key=lambda n: n < len(model) and model.is_byte(n)):
            if is_byte:
                out += _letters(bytes(int(model.id_to_piece(n)[3:5], 16) for n in run))
            else:
                out += "".join(names[n] if n in names else model.id_to_piece(n).replace(_SPACE, " ") for n in run)
        return out.removeprefix(" ") if adds_space else out

    return (lambda text: [*before, *plain(text), *behind]), plain, decode, ids, set(whole) - loud
