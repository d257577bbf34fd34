"""The conversations of a source as token ids on disk, written once for each source, tokenizer and format.

    dataset = open_tokenized(source, spec, tokenize, bare_ids, key, cache_dir)
    dataset.conversation(7)          # ids, with IMAGE for each image, and which of them are learned

Rows are packed from lengths alone, so that the order of an epoch is a function of its seed, for any number of processes
and at any step. Ids are memory-mapped, and images are read when a batch needs them.
"""

import bisect
import contextlib
import functools
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from rich.markup import escape
from rich.progress import track

from vlm_jax.core import reading, text
from vlm_jax.core.errors import UserError
from vlm_jax.core.files import atomic_write, file_lock, remove_stale
from vlm_jax.data.conversations import IMAGE, Conversation
from vlm_jax.data.examples import BadItem, Source, Turn

Tokenize = Callable[[Sequence[Turn], int], Conversation]  # (turns, number of images)
BareIds = Callable[[Sequence[Turn]], list[int]]  # the question that a compressor reads

# Flat arrays on disk; the bounds of conversation i are [bounds[i], bounds[i + 1]).
_ARRAYS = {
    "ids": np.int32, "target": np.bool_, "bounds": np.int64,
    "turn_ends": np.int32, "turn_bounds": np.int64,
    "questions": np.int32, "question_bounds": np.int64,
    "images": np.int32, "first_image": np.int64, "item": np.int64,
}  # fmt: skip


_MAX_META = 2**30  # bytes of the ids of skipped items


class TokenizedDataset(NamedTuple):
    """A source and its conversations; an item with separate questions has one for each.

    Images are numbered through all usable items, in order.
    """

    source: Source
    ids: Int[np.ndarray, " T"]
    target: Bool[np.ndarray, " T"]
    bounds: Int[np.ndarray, " n+1"]
    turn_ends: Int[np.ndarray, " E"]  # ids of a conversation up to the end of each assistant turn
    turn_bounds: Int[np.ndarray, " n+1"]
    questions: Int[np.ndarray, " Q"]
    question_bounds: Int[np.ndarray, " n+1"]
    images: Int[np.ndarray, " n"]  # of each conversation
    first_image: Int[np.ndarray, " n"]  # number of its first image
    item: Int[np.ndarray, " n"]  # its index in the source
    skipped: dict[str, list[str]]  # reason -> ids of items

    def __len__(self) -> int:
        return len(self.item)

    def conversation(self, index: int) -> tuple[Int[np.ndarray, " t"], Bool[np.ndarray, " t"]]:
        span = slice(self.bounds[index], self.bounds[index + 1])
        return self.ids[span], self.target[span]

    def question(self, index: int) -> Int[np.ndarray, " q"]:
        return self.questions[self.question_bounds[index] : self.question_bounds[index + 1]]

    @property
    def images_fingerprint(self) -> str:
        """SHA-256 of the usable images, in order."""
        digest = hashlib.sha256(self.source.images_fingerprint().encode())
        for array in (self.item, self.images):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    @property
    def items(self) -> int:
        """The number of usable items."""
        return int(np.count_nonzero(np.diff(self.item, prepend=-1)))

    @property
    def image_count(self) -> int:
        return int(self.first_image[-1] + self.images[-1])

    def _conversation_of(self, image: int) -> int:
        """A conversation that shows an image."""
        return int(np.searchsorted(self.first_image, image, side="right")) - 1

    def item_of(self, image: int) -> int:
        """The index in the source of the item with an image."""
        return int(self.item[self._conversation_of(image)])

    def image(self, number: int) -> bytes | Path:
        """An image's encoded bytes or path, by its number. Raises `UserError` where it cannot be read."""
        first = int(self.first_image[self._conversation_of(number)])
        try:
            return self.source[self.item_of(number)].images[number - first]
        except BadItem as error:
            raise UserError(f"{self.source.name}, {error}") from error
        except IndexError as error:
            raise UserError(f"{self.source.name}: its tokens in the cache have more images than it has") from error

    def id_of(self, index: int) -> str:
        """The id of a conversation's item."""
        return self.source.without_images(int(self.item[index])).id


def open_tokenized(
    source: Source, separate: bool, tokenize: Tokenize, bare_ids: BareIds, key: str, cache_dir: Path
) -> TokenizedDataset:
    """The conversations of a source, tokenized first unless the cache has them.

    Args:
        separate: each pair of turns is a conversation of its own.
        key: fingerprint of all that `tokenize` and `bare_ids` depend on.

    Raises `UserError` for a source without a usable item, or an unreadable cache.
    """
    identity = json.dumps([source.fingerprint, len(source), separate, key])
    folder = cache_dir / hashlib.sha256(identity.encode()).hexdigest()[:16]
    cache_dir.mkdir(parents=True, exist_ok=True)
    with file_lock(Path(f"{folder}.lock")):
        if not folder.exists():
            remove_stale(folder)
            with atomic_write(folder) as new:
                new.mkdir()
                _write(new, source, separate, tokenize, bare_ids)
    try:
        dataset = _read(folder, source)
    except (OSError, ValueError, LookupError, TypeError, UserError) as error:
        raise UserError(f"{folder}: unreadable tokens ({error}): delete the folder to write them again") from error
    if not len(dataset):
        raise UserError(
            f"{source.name}: expected a usable item, got none of {len(source)} ({summary(dataset.skipped)})"
        )
    return dataset


def _read(folder: Path, source: Source) -> TokenizedDataset:
    """Raises `ValueError` for a file of another size than was written, among other errors."""
    meta, arrays = reading.read_object(folder / "meta.json", _MAX_META), {}
    for name, dtype in _ARRAYS.items():
        size, expected = (folder / name).stat().st_size, meta["bytes"][name]
        if size != expected:
            raise ValueError(f"{name} has {size} bytes, expected {expected}")
        arrays[name] = np.asarray(np.memmap(folder / name, dtype, "r")) if size else np.zeros(0, dtype)
    # What is read for every conversation of an epoch is small and held in memory.
    for name in ("bounds", "turn_bounds", "images", "first_image", "item"):
        arrays[name] = np.array(arrays[name])
    dataset = TokenizedDataset(source, skipped=meta["skipped"], **arrays)
    if not _is_consistent(dataset):
        raise ValueError("its numbers contradict each other")
    return dataset


def _is_consistent(data: TokenizedDataset) -> bool:
    """Whether the arrays fit together: each bound within its array, each item in the source, images in order."""
    n, item, images = len(data.item), data.item, data.images
    pairs = ((data.bounds, data.ids), (data.turn_bounds, data.turn_ends), (data.question_bounds, data.questions))
    for bounds, flat in pairs:
        if len(bounds) != n + 1 or bounds[0] != 0 or bounds[-1] != len(flat) or (np.diff(bounds) < 0).any():
            return False
    if len(data.target) != len(data.ids) or len(images) != n or len(data.first_image) != n or (images < 0).any():
        return False
    if (np.diff(item) < 0).any() or (n and not 0 <= item[0] <= item[-1] < len(data.source)):
        return False
    first = np.flatnonzero(np.diff(item, prepend=-1))  # conversation of each item
    before = np.cumsum(images[first]) - images[first]
    lengths = np.repeat(np.diff(data.bounds), np.diff(data.turn_bounds))
    counts = np.repeat(images[first], np.diff(first, append=n))  # of an item, all of whose images each shows
    return (
        np.array_equal(images, counts)
        and np.array_equal(data.first_image, np.repeat(before, np.diff(first, append=n)))
        and bool(((data.turn_ends > 0) & (data.turn_ends <= lengths)).all())
        and isinstance(data.skipped, dict)
        and all(isinstance(ids, list) and all(isinstance(i, str) for i in ids) for ids in data.skipped.values())
    )


def summary(skipped: dict[str, list[str]]) -> str:
    """ "missing image: 3 (first id 17), ..."."""
    counts = (f"{reason}: {len(ids)} (first {ids[0]!r})" for reason, ids in sorted(skipped.items()) if ids)
    return ", ".join(counts) or "none skipped"


def conversations(
    source: Source, index: int, separate: bool, tokenize: Tokenize, bare_ids: BareIds
) -> list[tuple[Conversation, list[int], int]]:
    """(conversation, question ids, images) of an item. Raises `BadItem`."""
    example = source.without_images(index)
    parts = [example.turns]
    if separate:
        system = tuple(turn for turn in example.turns if turn.role == "system")
        rest = [turn for turn in example.turns if turn.role != "system"]
        images = "<image>\n" * len(example.images)
        parts = [(*system, *_with_images(rest[i : i + 2], images)) for i in range(0, len(rest), 2)]
    out = []
    for turns in parts:
        images = len(example.images)
        try:
            conversation = tokenize(turns, images)
        except UserError as error:
            count = sum(turn.text.count("<image>") for turn in turns)
            reason = "placeholder without an image" if count > images else "image without a placeholder"
            raise BadItem(reason if count != images else "cannot be rendered", example.id, str(error)) from error
        if not any(conversation.target):
            raise BadItem("nothing to learn", example.id)
        out.append((conversation, bare_ids(turns), conversation.ids.count(IMAGE)))
    return out


def _with_images(pair: Sequence[Turn], images: str) -> list[Turn]:
    first = pair[0]
    return [first if "<image>" in first.text else Turn(first.role, images + first.text), *pair[1:]]


def _write(folder: Path, source: Source, separate: bool, tokenize: Tokenize, bare_ids: BareIds) -> None:
    skipped: defaultdict[str, list[str]] = defaultdict(list)
    image = 0
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / name, "wb")) for name in _ARRAYS}

        def append(name: str, values: Any) -> None:
            files[name].write(np.asarray(values, _ARRAYS[name]).tobytes())

        ends = dict.fromkeys(("bounds", "turn_bounds", "question_bounds"), 0)
        for name in ends:
            append(name, [0])
        for index in _progress(source):
            try:
                made = conversations(source, index, separate, tokenize, bare_ids)
            except BadItem as error:
                skipped[error.reason].append(error.id)
                continue
            for conversation, question, count in made:
                append("ids", conversation.ids)
                append("target", conversation.target)
                append("turn_ends", conversation.turn_ends)
                append("questions", question)
                sizes = (len(conversation.ids), len(conversation.turn_ends), len(question))
                for name, size in zip(ends, sizes, strict=True):
                    ends[name] += size
                    append(name, [ends[name]])
                append("images", [count])
                append("first_image", [image])
                append("item", [index])
            image += made[0][2]
    sizes = {name: (folder / name).stat().st_size for name in _ARRAYS}
    (folder / "meta.json").write_text(json.dumps({"bytes": sizes, "skipped": skipped}) + "\n")


def _progress(source: Source) -> Iterator[int]:
    return iter(
        track(range(len(source)), description=f"tokens of {escape(text.one_line(source.name, 60))}", transient=True)
    )


class Mixture(NamedTuple):
    """Datasets as one; conversations are numbered through all of them."""

    parts: tuple[TokenizedDataset, ...]
    names: tuple[str, ...]
    passes: tuple[float, ...]  # over each part in an epoch
    starts: tuple[int, ...]  # number of each part's first conversation

    def __len__(self) -> int:
        return self.starts[-1] + len(self.parts[-1])

    def locate(self, number: int) -> tuple[int, int]:
        """(part, conversation in it)."""
        part = bisect.bisect_right(self.starts, number) - 1
        return part, int(number) - self.starts[part]

    def concatenate(self, make: Callable[[TokenizedDataset], np.ndarray]) -> np.ndarray:
        """An array over all conversations, from one for each part."""
        return np.concatenate([make(part) for part in self.parts])

    def item_numbers(self) -> Int[np.ndarray, " n"]:
        """A number for the item of each conversation, ascending through all parts."""
        starts = np.cumsum([0, *(len(part.source) for part in self.parts)])
        return np.concatenate([part.item + start for part, start in zip(self.parts, starts, strict=False)])

    def id_of(self, number: int) -> str:
        part, index = self.locate(number)
        return self.parts[part].id_of(index)

    @property
    def name(self) -> str:
        return " + ".join(self.names)


def mix(parts: Sequence[TokenizedDataset], names: Sequence[str], passes: Sequence[float]) -> Mixture:
    starts = np.cumsum([0, *(len(part) for part in parts)])[:-1]
    return Mixture(tuple(parts), tuple(names), tuple(passes), tuple(int(s) for s in starts))


@functools.cache
def folder_fingerprint(folder: Path) -> str:
    """SHA-256 of the tokenizer files of a folder, or of one file."""
    files = [folder] if folder.is_file() else sorted(p for p in folder.rglob("*") if p.suffix in _TOKENIZER_FILES)
    digest = hashlib.sha256()
    for file in files:
        digest.update(os.fsencode(file.name) + b"\0" + reading.read_bytes(file, _MAX_META))
    return digest.hexdigest()


_TOKENIZER_FILES = (".json", ".model", ".jinja", ".txt")
