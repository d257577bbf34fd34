"""Tokenizers of published models.

    tokenizer = read_tokenizer(folder, config)
    tokenizer.encode("What is this?")           # with the special tokens that the reference adds
    tokenizer.encode_without_special(text)      # none added; special tokens in the text are recognised
    tokenizer.decode(ids)                       # special tokens left out

Reads `tokenizer.json` (tokenizers library) and SentencePiece's `*.model`; `data.token_files` reads the files beside
them, `data.chat` builds prompts.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, decoders
from tokenizers import Tokenizer as HfTokenizer
from tokenizers.pre_tokenizers import Metaspace

from vlm_jax.core import reading
from vlm_jax.core.errors import UserError, unknown
from vlm_jax.data import token_files
from vlm_jax.data.token_files import TokenizerFiles, check_utf8

_SPACE = "\u2581"  # SentencePiece's space
_MAX_BYTES = 2**28  # of a SentencePiece model
_LLAMAS = ("LlamaTokenizer", "LlamaTokenizerFast")

_Encode = Callable[[str], list[int]]
_WithOffsets = Callable[[str], tuple[list[int], list[tuple[int, int]]]]


class Tokenizer(NamedTuple):
    """A tokenizer. `special` maps the names that templates use ("bos_token") to the text of the token."""

    encode: _Encode
    encode_without_special: _Encode
    encode_with_offsets: _WithOffsets  # without special tokens: ids, and the characters [start, end) of each
    decode: Callable[[Sequence[int]], str]
    begin: tuple[int, ...]  # that `encode` puts before the ids of a text
    end: tuple[int, ...]  # and behind them
    size: int  # highest id + 1, without the caller's extra tokens, added padding, and added tokens that have no role
    pad: int | None
    eos_ids: tuple[int, ...]
    special: dict[str, str]
    special_tokens: tuple[str, ...]  # all that are matched whole and left out of decoded text
    template: str | None  # chat template of the folder
    without_extra: Callable[[], "Tokenizer"]  # the same without the caller's extra tokens

    def id(self, token: str) -> int | None:
        """The id of a special token, None where the tokenizer does not have it."""
        ids = self.encode_without_special(token)
        return ids[-1] if len(ids) == 1 else None


def read_tokenizer(folder: Path, config: Mapping[str, Any], extra: Sequence[str] = ()) -> Tokenizer:
    """The tokenizer of a folder, or of one file (`tokenizer.json`, `*.model`) and the files beside it.

    Args:
        config: config.json, for `eos_ids`; {} where there is none.
        extra: special tokens to add ("<image>").

    Raises `UserError` for a folder without a tokenizer, or a file that cannot be read.
    """
    files = token_files.read(folder, config, extra)
    special = files.special
    backend = (_from_json if files.file.suffix == ".json" else _from_sentencepiece)(files)
    # An added special token may have no embedding (Llama 2's <pad>): it does not count for the size unless it has a
    # role in rows of tokens.
    roles = {special[name] for name in token_files.ROLES if name in special and name != "pad_token"}
    uncounted = (backend.added | set(extra)) - roles
    eos_ids = files.eos_ids
    if eos_ids is None:
        eos_ids = [backend.ids[special["eos_token"]]] if special.get("eos_token") in backend.ids else []

    @functools.cache
    def without_extra() -> Tokenizer:
        return read_tokenizer(folder, config)

    return Tokenizer(
        encode=lambda text: backend.encode(check_utf8(text)),
        encode_without_special=lambda text: backend.encode_without_special(check_utf8(text)),
        encode_with_offsets=lambda text: backend.encode_with_offsets(check_utf8(text)),
        decode=backend.decode,
        begin=backend.begin,
        end=backend.end,
        size=max((number for token, number in backend.ids.items() if token not in uncounted), default=-1) + 1,
        pad=backend.ids.get(special.get("pad_token")),
        eos_ids=tuple(eos_ids),
        special=special,
        special_tokens=tuple(sorted({*special.values(), *backend.added})),
        template=files.template,
        without_extra=without_extra,
    )


class _Backend(NamedTuple):
    """The vocabulary of one file format."""

    encode: _Encode
    encode_without_special: _Encode
    encode_with_offsets: _WithOffsets
    decode: Callable[[Sequence[int]], str]
    begin: tuple[int, ...]
    end: tuple[int, ...]
    ids: Mapping[str, int]  # of all tokens
    added: set[str]  # special tokens added to the model's own vocabulary


def _from_json(files: TokenizerFiles) -> _Backend:
    settings, special, added = files.settings, files.special, files.added
    try:
        backend = HfTokenizer.from_file(str(files.file))
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{files.file}: not a readable tokenizer ({error})") from error
    backend.no_padding()
    backend.no_truncation()
    is_bpe = type(backend.model).__name__ == "BPE"
    is_llama = files.model_type in (None, "llama") and settings.get("tokenizer_class") in _LLAMAS
    if is_llama and is_bpe and "ByteLevel" not in str(backend.pre_tokenizer):
        _set_llama_spaces(backend, _prepend_scheme(settings))
    known = backend.get_vocab(with_added_tokens=True)
    new = sorted((token for token in added if token not in known), key=lambda t: (added[t] is None, added[t] or 0))
    backend.add_tokens([AddedToken(t, **{"special": True, "normalized": False, **files.flags.get(t, {})}) for t in new])
    # Tokens with a role are always matched whole, and left out of decoded text.
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special.values()])
    ids = backend.get_vocab(with_added_tokens=True)

    def encode_without_special(text: str) -> list[int]:
        return _encode(backend, text, add_special_tokens=False).ids

    def encode(text: str) -> list[int]:
        # The file's post-processor decides; transformers ignores `add_bos_token` and `add_eos_token` beside it.
        return _encode(backend, text).ids

    def encode_with_offsets(text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = _encode(backend, text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(numbers: Sequence[int]) -> str:
        text = backend.decode([int(n) for n in numbers], skip_special_tokens=True)
        return _clean_up(text) if settings.get("clean_up_tokenization_spaces") and not is_bpe else text

    added_special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    begin, end = _added_around(backend)
    return _Backend(encode, encode_without_special, encode_with_offsets, decode, begin, end, ids, added_special)


def _encode(backend: HfTokenizer, text: str, add_special_tokens: bool = True) -> Any:
    """Raises `UserError` for a word outside a closed vocabulary, one without an unknown token."""
    try:
        return backend.encode(text, add_special_tokens=add_special_tokens)
    except Exception as error:  # the library raises plain Exception
        known = backend.get_vocab(with_added_tokens=True)
        word = next((word for word in text.split() if word not in known), None)
        if word is None:
            raise UserError(f"text {text[:80]!r}: cannot be encoded ({error})") from error
        raise unknown("word", word, known) from error


def _added_around(backend: HfTokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that a post-processor puts before a text, and behind it."""
    if backend.post_processor is None:
        return (), ()
    encoding = backend.encode("a")
    is_text = [not added for added in encoding.special_tokens_mask]
    if not any(is_text):
        return (), ()
    first, last = is_text.index(True), len(is_text) - is_text[::-1].index(True)
    return tuple(encoding.ids[:first]), tuple(encoding.ids[last:])


def _prepend_scheme(settings: Mapping[str, Any]) -> str:
    """Where Llama's tokenizer prepends a space: "first", at the start of the text; "always", after special tokens too
    (`legacy`); or "never".
    """
    if settings.get("add_prefix_space") is False:
        return "never"
    return "always" if settings.get("legacy") else "first"


def _set_llama_spaces(backend: HfTokenizer, scheme: str) -> None:
    """Llama's classes in transformers take the vocabulary of tokenizer.json, but not its normalizer and decoder."""
    backend.normalizer = None
    backend.pre_tokenizer = Metaspace(_SPACE, prepend_scheme=scheme, split=False)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps if scheme == "never" else [*steps, decoders.Strip(" ", 1, 0)])


def _clean_up(text: str) -> str:
    """transformers' clean_up_tokenization: no spaces before punctuation and English contractions."""
    text = re.sub(r" ([.?!,])", r"\1", text).replace(" ' ", "'")
    return re.sub(r" (n't|'m|'s|'ve|'re)", r"\1", text)


def _decode_bytes(some: bytes) -> str:
    """UTF-8, or a replacement character for each byte of an invalid sequence."""
    try:
        return some.decode()
    except UnicodeDecodeError:
        return "\ufffd" * len(some)


def _from_sentencepiece(files: TokenizerFiles) -> _Backend:
    settings, special, scheme = files.settings, files.special, _prepend_scheme(files.settings)
    model, without_prefix, adds_prefix = _read_sentencepiece(files.file)
    ids = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
    roles = {"bos": model.bos_id(), "eos": model.eos_id(), "unk": model.unk_id(), "pad": model.pad_id()}
    for name, number in roles.items():
        if number >= 0:
            special.setdefault(f"{name}_token", model.id_to_piece(number))
    # Tokens that are matched whole, before the text is split into pieces.
    whole, size = {token: ids[token] for token in special.values() if token in ids}, len(ids)
    for token, number in files.added.items():
        if token not in ids:
            number = size if number is None else number
            size = max(size, number + 1)
        whole[token] = ids.setdefault(token, number)
    by_length = sorted(whole, key=len, reverse=True)
    pattern = re.compile("|".join(f"({re.escape(token)})" for token in by_length) or r"(?!)")

    def pieces(text: str) -> Iterator[tuple[Any, str, int]]:
        """(model, or None for a special token; text; its first character)"""
        start = 0
        for match in (*pattern.finditer(text), None):
            piece = text[start : match.start() if match else None]
            # A model without a tokenizer_config.json prepends a space to each piece, as its library does.
            has_space = scheme == "never" or piece[:1] in (" ", _SPACE) or bool(start and scheme == "first")
            if piece:
                yield without_prefix if settings and has_space else model, piece, start
            if match:
                yield None, match.group(), match.start()
                start = match.end()

    def encode_without_special(text: str) -> list[int]:
        out = []
        for one, piece, _ in pieces(text):
            out += [whole[piece]] if one is None else one.encode(piece)
        return out

    def encode_with_offsets(text: str) -> tuple[list[int], list[tuple[int, int]]]:
        out, offsets = [], []
        for one, piece, start in pieces(text):
            if one is None:
                out.append(whole[piece])
                offsets.append((start, start + len(piece)))
                continue
            found = one.encode(piece, return_type="offset_mapping")
            out += found["ids"]
            end, marked = len(piece), []
            # A space that the model prepends, and all bytes of a letter but the last, have no characters.
            for begin, stop in reversed(found["offsets"]):
                end = stop if stop > begin else end
                marked.append((start + begin, start + end))
            offsets += marked[::-1]
        return out, offsets

    begin, end = (
        (ids[special[name]],) if settings.get(f"add_{name}", default) and special.get(name) in ids else ()
        for name, default in (("bos_token", True), ("eos_token", False))
    )

    def encode(text: str) -> list[int]:
        return [*begin, *encode_without_special(text), *end]

    not_special = {token for token, flags in files.flags.items() if not flags.get("special", True)}
    names = {number: token for token, number in whole.items()}
    skipped = {number for number, token in names.items() if token not in not_special}

    def decode(numbers: Sequence[int]) -> str:
        kept = [int(n) for n in numbers if int(n) not in skipped and (int(n) < len(model) or int(n) in names)]
        out = ""
        for is_byte, run in itertools.groupby(kept, key=lambda n: n < len(model) and model.is_byte(n)):
            if is_byte:
                out += _decode_bytes(bytes(int(model.id_to_piece(n)[3:5], 16) for n in run))
            else:
                out += "".join(names[n] if n in names else model.id_to_piece(n).replace(_SPACE, " ") for n in run)
        return out.removeprefix(" ") if adds_prefix and scheme != "never" else out

    added = set(whole) - not_special
    return _Backend(encode, encode_without_special, encode_with_offsets, decode, begin, end, ids, added)


def _read_sentencepiece(file: Path) -> tuple[Any, Any, bool]:
    """A SentencePiece model, the same model without `add_dummy_prefix`, and whether the first has it."""
    model, without_prefix = sentencepiece.SentencePieceProcessor(), sentencepiece.SentencePieceProcessor()
    try:
        content = sentencepiece_model_pb2.ModelProto.FromString(reading.read_bytes(file, _MAX_BYTES))
        model.LoadFromSerializedProto(content.SerializeToString())
    except (OSError, RuntimeError, DecodeError) as error:
        raise UserError(f"{file}: not a readable SentencePiece model ({error})") from error
    adds_prefix = content.normalizer_spec.add_dummy_prefix
    content.normalizer_spec.add_dummy_prefix = False
    without_prefix.LoadFromSerializedProto(content.SerializeToString())
    return model, without_prefix, adds_prefix
