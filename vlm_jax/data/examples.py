"""The interface between data on disk and training: a `Source` gives an `Example` for each index.

    class Shapes(Source):                                # a source of one's own
        def __init__(self, path: str): ...
        def __len__(self) -> int: ...
        def __getitem__(self, index: int) -> Example: ...

    data.train = (dict(source="my_package.shapes:Shapes", path="shapes/"),)

A source is a Grain `RandomAccessDataSource`: it is read at random, by threads and by processes, and holds no data in
memory.
"""

import abc
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

IMAGE_MARKER = "<image>"  # in the text of a user turn: an image stands here
_THREADS, _BLOCK = 4, 256  # of hashing


class Turn(NamedTuple):
    """What one side of a conversation says."""

    role: str  # "system", "user" or "assistant"
    text: str


class Example(NamedTuple):
    """One conversation and its images.

    User turns hold one `IMAGE_MARKER` for each image, in order; other turns hold none. Without images, "<image>" is
    ordinary text. The first turn, or the one after the system turn, is the user's; then assistant and user alternate;
    the last turn is the assistant's; no text is blank.
    """

    id: str
    images: tuple[bytes | Path, ...]  # encoded files, or their paths; `data.images.read_image` decodes both by content
    turns: tuple[Turn, ...]
    extra: Mapping[str, Any] = {}  # further columns of the data set, such as the kind of a question


class BadItem(Exception):
    """Raised by `source[i]` for an item that cannot be used. It is skipped, counted under `reason`, and named.

    Reasons of the built-in sources: "malformed", "missing image", "placeholder without an image", "image without a
    placeholder", "empty turn", "roles do not alternate", "no answer", "unreadable file", "video".
    """

    def __init__(self, reason: str, id: str, detail: str = ""):
        super().__init__(reason, id, detail)  # all arguments: exceptions are pickled by them
        self.reason, self.id, self.detail = reason, id, _one_line(detail)

    def __str__(self) -> str:
        return f"item {_one_line(self.id)}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


def _one_line(text: str) -> str:
    return " ".join(text.encode(errors="backslashreplace").decode().split())[:300]


class Source(abc.ABC):
    """Examples by index. A subclass implements `__len__` and `__getitem__`; large ones assign a `fingerprint` too."""

    @functools.cached_property
    def name(self) -> str:
        """In logs and reports. Can be assigned."""
        return type(self).__name__

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Example:
        """Raises `BadItem`."""

    def without_images(self, index: int) -> Example:
        """The example without reading image files: turns, and the right number of images, whose contents are undefined.
        Raises `BadItem`.
        """
        return self[index]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the texts and images of all examples. Reads everything; can be assigned."""
        text = _sha256_of(self, lambda example: [example.id, example.turns])
        return hashlib.sha256(f"{text}:{self.images_fingerprint()}".encode()).hexdigest()

    def images_fingerprint(self) -> str:
        """Hash of the contents of all images, in order. Reads every image file once."""
        known: dict[Path, str] = {}  # data sets show the same file in many items

        def sha256(image: bytes | Path) -> str:
            if isinstance(image, bytes):
                return hashlib.sha256(image).hexdigest()
            if image not in known:
                try:
                    with open(image, "rb") as file:
                        known[image] = hashlib.file_digest(file, "sha256").hexdigest()
                except OSError:  # an unusable item, once its image is read
                    known[image] = "unreadable"
            return known[image]

        return _sha256_of(self, lambda example: [sha256(image) for image in example.images])


def _sha256_of(source: Source, content: Callable[[Example], Any]) -> str:
    """Hash of `content` (JSON-serialisable) of every example in order; a bad item counts by its reason."""

    def line(index: int) -> bytes:
        try:
            value = content(source[index])
        except BadItem as error:
            value = error.reason
        return json.dumps(value).encode() + b"\n"

    total = hashlib.sha256()
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(source), _BLOCK):  # a pool's map submits all that it is given
            for part in pool.map(line, range(start, min(start + _BLOCK, len(source)))):
                total.update(part)
    return total.hexdigest()
