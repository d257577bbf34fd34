"""Tokenizers of public models, from the files of their folders.

    tokenizer = read_tokenizer(folder, config)
    tokenizer.encode("What is this?")           # as the reference's tokenizer, with the special tokens that it adds
    tokenizer.encode_without_special(text)      # none added; special tokens written in the text are recognised
    tokenizer.decode(ids)                       # special tokens left out

Read are `tokenizer.json` (tokenizers library) and SentencePiece's `*.model`; what the files beside them say is read by
`data.token_files`. How a question becomes a prompt stands in `data.chat`.
"""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, decoders
from tokenizers import Tokenizer as HfTokenizer
from tokenizers.pre_tokenizers import Metaspace

from vlm_jax.core.errors import UserError
from vlm_jax.data import glyph_tokenizer as words
from vlm_jax.data import token_files
from vlm_jax.data.token_files import TokenizerFiles, written

_SPACE = "\u2581"  # how SentencePiece writes a space
_LLAMAS = ("LlamaTokenizer", "LlamaTokenizerFast")


class Tokenizer(NamedTuple):
    """A tokenizer. `special` maps the names that templates use ("bos_token") to the text of the token."""

    encode: Callable[[str], list[int]]
    encode_without_special: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    size: int  # one more than the highest id; marks that the caller adds and unnamed special tokens do not count
    pad: int | None
    eos_ids: tuple[int, ...]  # any of these ends an answer
    special: dict[str, str]
    template: str | None  # the folder's own chat template

    def id(self, token: str) -> int | None:
        """The id of one special token, None where the tokenizer does not know it."""
        ids = self.encode_without_special(token)
        return ids[-1] if len(ids) == 1 else None


def word_tokenizer() -> Tokenizer:
    """The project's own: one number a word, for runs that `vlm_jax.train` made."""
    return Tokenizer(
        words.encode,
        words.encode,
        words.decode,
        words.VOCAB_SIZE,
        words.PAD_ID,
        (words.END_ID,),
        {},
        None,
    )


def read_tokenizer(folder: Path, config: Mapping[str, Any], more: Sequence[str] = ()) -> Tokenizer:
    """The tokenizer of a folder, or of one file (`tokenizer.json`, `*.model`) and the files beside it.

    Args:
        config: config.json, for the tokens that end an answer; {} where there is none.
        more: special tokens that it is to know besides its own ("<image>").

    Raises `UserError` for a folder without a tokenizer, or a file that cannot be read.
    """
    files = token_files.read(folder, config, more)
    special = files.special
    make = _from_json if files.file.suffix == ".json" else _from_sentencepiece
    encode, plain, decode, ids, spare = make(files)
    # A special token that the tokenizer's files do not use themselves may have no embedding: it is refused in use.
    aside = (spare | set(more)) - {special[name] for name in token_files.NAMED if name in special}
    size = max((number for token, number in ids.items() if token not in aside), default=-1) + 1
    ends = files.eos_ids
    if ends is None:
        ends = [ids[special["eos_token"]]] if special.get("eos_token") in ids else []
    return Tokenizer(
        lambda text: encode(written(text)),
        lambda text: plain(written(text)),
        decode,
        size,
        ids.get(special.get("pad_token")),
        tuple(ends),
        special,
        files.template,
    )


# encode, plain, decode, the ids of all tokens, and the special tokens that were added to the model's own
Parts = tuple[
    Callable[[str], list[int]], Callable[[str], list[int]], Callable[[Sequence[int]], str], Mapping[str, int], set[str]
]


def _from_json(files: TokenizerFiles) -> Parts:
    settings, special, added = files.settings, files.special, files.added
    try:
        backend = HfTokenizer.from_file(str(files.file))
    except Exception as error:  # the library raises nothing more exact
        raise UserError(f"{files.file}: not a readable tokenizer ({error})") from error
    backend.no_padding()
    backend.no_truncation()
    byte_level = type(backend.model).__name__ != "BPE" or "ByteLevel" in str(backend.pre_tokenizer)
    if files.model_type in (None, "llama") and settings.get("tokenizer_class") in _LLAMAS and not byte_level:
        _respace(backend, _scheme(settings))
    known = backend.get_vocab(with_added_tokens=True)
    new = sorted((token for token in added if token not in known), key=lambda t: (added[t] is None, added[t] or 0))
    backend.add_tokens([AddedToken(t, **{"special": True, "normalized": False, **files.flags.get(t, {})}) for t in new])
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


def _scheme(settings: Mapping[str, Any]) -> str:
    """Where Llama's tokenizer puts a space before a word that has none: at the start of the text ("first"); of the old
    way (`legacy`) behind every special token too ("always"); or nowhere ("never").
    """
    if settings.get("add_prefix_space") is False:
        return "never"
    return "always" if settings.get("legacy") else "first"


def _respace(backend: HfTokenizer, scheme: str) -> None:
    """As the class that the folder names: it takes the vocabulary alone from tokenizer.json, whatever that says."""
    backend.normalizer = None
    backend.pre_tokenizer = Metaspace(_SPACE, prepend_scheme=scheme, split=False)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps if scheme == "never" else [*steps, decoders.Strip(" ", 1, 0)])


def _around(settings: dict[str, Any], special: dict[str, str], ids: Mapping[str, int]) -> tuple[list[int], list[int]]:
    """What the tokenizer's settings put before and behind each text."""
    return tuple(  # type: ignore[return-value]
        [ids[special[name]]] if settings.get(f"add_{name}") and special.get(name) in ids else []
        for name in ("bos_token", "eos_token")
    )


def _cleaned(text: str) -> str:
    """Spaces that word pieces leave before punctuation and English contractions."""
    text = re.sub(r" ([.?!,])", r"\1", text).replace(" ' ", "'")
    return re.sub(r" (n't|'m|'s|'ve|'re)", r"\1", text)


def _letters(some: bytes) -> str:
    """UTF-8, or a mark for each byte of what is not."""
    try:
        return some.decode()
    except UnicodeDecodeError:
        return "\ufffd" * len(some)


def _from_sentencepiece(files: TokenizerFiles) -> Parts:
    settings, special, scheme = files.settings, files.special, _scheme(files.settings)
    model, inner, adds_space = _with_and_without_a_space(files.file)
    ids = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
    own = {"bos": model.bos_id(), "eos": model.eos_id(), "unk": model.unk_id(), "pad": model.pad_id()}
    for name, number in own.items():
        if number >= 0:
            special.setdefault(f"{name}_token", model.id_to_piece(number))
    whole, size = {token: ids[token] for token in special.values() if token in ids}, len(ids)
    for token, number in files.added.items():
        if token not in ids:
            number = size if number is None else number
            size = max(size, number + 1)
        whole[token] = ids.setdefault(token, number)
    cut = re.compile("|".join(f"({re.escape(token)})" for token in sorted(whole, key=len, reverse=True)) or r"(?!)")

    def plain(text: str) -> list[int]:
        out, start = [], 0
        for match in (*cut.finditer(text), None):
            piece = text[start : match.start() if match else None]
            # Of a model alone, its library puts a space before each piece.
            has_one = scheme == "never" or piece[:1] in (" ", _SPACE) or bool(out and scheme == "first")
            use = inner if settings and has_one else model
            if piece:
                out += use.encode(piece)
            if match:
                out.append(whole[match.group()])
                start = match.end()
        return out

    before, behind = _around({"add_bos_token": True, **settings}, special, ids)
    loud = {token for token, flags in files.flags.items() if not flags.get("special", True)}
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
        return out.removeprefix(" ") if adds_space and scheme != "never" else out

    return (lambda text: [*before, *plain(text), *behind]), plain, decode, ids, set(whole) - loud


def _with_and_without_a_space(file: Path) -> tuple[Any, Any, bool]:
    """A SentencePiece model as it is, the same without a space before a text, and whether the first puts one."""
    model, inner = sentencepiece.SentencePieceProcessor(), sentencepiece.SentencePieceProcessor()
    try:
        content = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())
        model.LoadFromSerializedProto(content.SerializeToString())
    except (OSError, RuntimeError, DecodeError) as error:
        raise UserError(f"{file}: not a readable SentencePiece model ({error})") from error
    adds_space = content.normalizer_spec.add_dummy_prefix
    content.normalizer_spec.add_dummy_prefix = False
    inner.LoadFromSerializedProto(content.SerializeToString())
    return model, inner, adds_space
