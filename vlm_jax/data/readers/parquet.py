"""Parquet files with images inside, as on the Hugging Face hub.

    LLaVA-OneVision-Data, LLaVA-NeXT-Data   id, image {bytes, path} or null, conversations [{from, value}]
    the_cauldron                            images [{bytes, path}], texts [{user, assistant, source}]
    FineVision                              the same, with ratings: options=(("relevance_min", 4),) keeps 4 and above
    question and answer columns             named in `fields`: (("question", "query"), ("answer", "label"))

A row group is read at once; those read last are kept. Files with images are quickest with row groups of about a hundred
rows, as the `datasets` library writes them.
"""

import collections
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int

from vlm_jax.core.errors import UserError, unknown
from vlm_jax.core.specs import SourceSpec
from vlm_jax.data.examples import BadItem, Example, Source, Turn
from vlm_jax.data.readers import turns as conversations
from vlm_jax.data.readers.columns import check_columns, check_fields, columns_of, item_id, question_turns, value_of
from vlm_jax.data.readers.files import combined, data_files, file_sha256, image_folder
from vlm_jax.data.readers.llava import image_paths
from vlm_jax.data.readers.mixture import Concatenation

FIELDS = ("id", "image", "conversations", "texts", "question", "answer")
LARGEST_GROUP = 2**31  # bytes of a row group; Arrow's arrays of nested bytes end there too
_BROKEN = (pa.ArrowException, OSError, UnicodeDecodeError)
_SPLIT_FILE = re.compile(r"(.+?)-\d+(-of-\d+)?(-[0-9a-f]+)?\.parquet")  # train-00000-of-00010.parquet


class ParquetLayout(NamedTuple):
    """Columns of a file by their use; "" for what it does not have."""

    columns: Mapping[str, str]  # of the fields that are present
    text: tuple[str, ...]  # all without image bytes
    image_count: str  # the smallest column that tells how many images a row has


def open_parquet(spec: SourceSpec, cache_dir: Path) -> Source:
    """Opens a file, a folder or a pattern of files; `config` is a folder inside, `split` a beginning of file names.
    Raises `UserError`.
    """
    check_fields("parquet", dict(spec.fields), FIELDS)
    root = str(Path(spec.path) / spec.config) if spec.config else spec.path
    parts = []
    for path in _files_of_split(root, data_files(root, (".parquet",)), spec.split):
        try:
            with pq.ParquetFile(path) as file:
                layout = _layout(path, file, dict(spec.fields))
                _check_groups(path, file)
                ends = np.cumsum([file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)])
            rows = _kept_rows(path, int(ends[-1]) if len(ends) else 0, dict(spec.options))
            sha256 = file_sha256(path, cache_dir)
            images = image_folder(spec.images, path.parent)
        except _BROKEN as error:
            raise UserError(f"{path}: not a readable parquet file ({' '.join(str(error).split())[:200]})") from error
        identity = combined("parquet", sha256, sorted(spec.fields), sorted(spec.options))
        if len(rows):
            parts.append(ParquetSource(path, identity, layout, ends, rows, images, spec.name or path.stem))
    if not parts:
        raise UserError(f"{root}: expected at least one row{' that passes `options`' * bool(spec.options)}, got none")
    return parts[0] if len(parts) == 1 else Concatenation(tuple(parts), spec.name or Path(root).stem)


def _files_of_split(root: str, files: list[Path], split: str) -> list[Path]:
    """Files whose name begins with the split. Raises `UserError` where it is not given and names show several."""
    found: dict[str, list[Path]] = {}
    for file in files:
        match = _SPLIT_FILE.fullmatch(file.name)
        found.setdefault(match[1] if match else "", []).append(file)
    if split:
        if split not in found:
            raise unknown(f"split of {root}", split, filter(None, found))
        return found[split]
    names = sorted(name for name in found if name in ("train", "test", "val", "validation"))
    if Path(root).is_dir() and len(names) > 1:
        raise UserError(f"{root}: expected files of one split, got {' and '.join(names)} (choose one with `split`)")
    return files


def _layout(path: Path, file: pq.ParquetFile, fields: Mapping[str, str]) -> ParquetLayout:
    present = file.schema_arrow.names
    for column in (column for entry in fields.values() for column in columns_of(entry)):
        check_columns(path, [column], present)
    columns = {field: fields.get(field, field) for field in FIELDS}
    if "image" not in fields and "image" not in present:
        columns["image"] = "images"
    columns = {field: column for field, column in columns.items() if set(columns_of(column)) <= set(present)}
    if not {"conversations", "texts", "answer"} & set(columns):
        check_columns(path, ["conversations", "texts"], present)
    image = columns.get("image", "")
    leaves = [file.schema.column(i).path for i in range(len(file.schema))]
    image_count = next((leaf for leaf in leaves if leaf.startswith(f"{image}.") and leaf.endswith(".path")), image)
    text = {column for field, entry in columns.items() if field != "image" for column in columns_of(entry)}
    return ParquetLayout(columns, tuple(sorted(text)), image_count)


def _check_groups(path: Path, file: pq.ParquetFile) -> None:
    largest = max((file.metadata.row_group(g).total_byte_size for g in range(file.metadata.num_row_groups)), default=0)
    if largest > LARGEST_GROUP:
        raise UserError(
            f"{path}: expected row groups of at most {LARGEST_GROUP / 1e9:.1f} GB, which are read at once, got one of "
            f"{largest / 1e9:.1f} GB (write it again with row_group_size=100)"
        )


def _kept_rows(path: Path, count: int, minima: Mapping[str, Any]) -> Int[np.ndarray, " n"]:
    """Rows whose values are at least the minima; a null (not rated) passes."""
    keep = np.ones(count, bool)
    for column, minimum in minima.items():
        schema = pq.read_schema(path)
        numbers = [one.name for one in schema if pa.types.is_integer(one.type) or pa.types.is_floating(one.type)]
        if column not in numbers:
            raise unknown(f"column of numbers of {path}", column, numbers)
        if isinstance(minimum, bool) or not isinstance(minimum, int | float):
            raise UserError(f"options: expected a number for {column}, got {minimum!r}")
        values = pq.read_table(path, columns=[column])[column].cast(pa.float64()).to_numpy()
        keep &= ~(values < minimum)  # also for NaN, which stands for null
    return np.flatnonzero(keep)


def _read_group(path: Path, fingerprint: str, group: int, columns: tuple[str, ...]) -> pa.Table:
    with pq.ParquetFile(path, pre_buffer=False) as file:
        return file.read_row_group(group, columns=list(columns), use_threads=False)


class _GroupCache:
    """The row groups read last, up to a number of bytes; at least one. A group is read by one thread, others wait."""

    def __init__(self, limit: int):
        self._limit, self._tables = limit, collections.OrderedDict[Any, pa.Table]()
        self._lock, self._reading = threading.Lock(), [threading.Lock() for _ in range(16)]

    def __call__(self, *key: Any) -> pa.Table:
        """Row group by the arguments of `_read_group`."""
        with self._reading[hash(key) % len(self._reading)]:
            with self._lock:
                if key in self._tables:
                    self._tables.move_to_end(key)
                    return self._tables[key]
            table = _read_group(*key)
        with self._lock:
            self._tables[key] = table
            while len(self._tables) > 1 and sum(kept.nbytes for kept in self._tables.values()) > self._limit:
                self._tables.popitem(last=False)
        return table


_text_group, _image_group = _GroupCache(2**27), _GroupCache(2**28)  # shared by all files of a process


class ParquetSource(Source):
    """The rows of one file."""

    def __init__(
        self,
        path: Path,
        fingerprint: str,
        layout: ParquetLayout,
        ends: Int[np.ndarray, " groups"],
        rows: Int[np.ndarray, " n"],
        images: Path,
        name: str,
    ):
        """
        Args:
            ends: of the row groups, in rows of the file.
            rows: of the file, those that count.
            images: folder of images that are not inside the file.
        """
        self._path, self.fingerprint, self._layout, self._images = path, fingerprint, layout, images
        self._ends, self._rows, self.name = ends, rows, name

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        image = self._layout.columns.get("image")
        value = self._row(_image_group, index, (image,))[image] if image else None
        example = self._conversation(index, value)
        return example._replace(images=tuple(self._image(example.id, one) for one in _images_of(value)))

    def without_images(self, index: int) -> Example:
        image, column = self._layout.columns.get("image"), self._layout.image_count
        read = _text_group if column != image else _image_group
        return self._conversation(index, self._row(read, index, (column,))[image] if image else None)

    def _conversation(self, index: int, image: Any) -> Example:
        """The example with empty images, as many as the value of the image column says."""
        columns, record = self._layout.columns, self._row(_text_group, index, self._layout.text)
        value = {field: value_of(record, column) for field, column in columns.items() if field != "image"}
        id = item_id(value.get("id"), f"{self._path.stem}:{self._rows[index]}")
        count = len(_images_of(image))
        if value.get("conversations") is not None:
            turns = conversations.read_messages(id, value["conversations"])
            mark = conversations.mark_in_place if isinstance(image, list) else conversations.mark_front_of_turn
            turns = mark(id, turns, count) if count else turns
        elif value.get("texts") is not None:
            turns = _texts(id, value["texts"])
            turns = conversations.check_turns(id, conversations.mark_first_turn(id, turns, count) if turns else turns)
        else:
            turns = question_turns(id, value.get("question"), value.get("answer"), count)
        return Example(id, (b"",) * count, turns)

    def _row(self, read: Callable[..., pa.Table], index: int, columns: tuple[str, ...]) -> dict[str, Any]:
        row = int(self._rows[index])
        group = int(np.searchsorted(self._ends, row, side="right"))
        try:
            table = read(self._path, self.fingerprint, group, columns)
            return table.slice(row - int(self._ends[group - 1] if group else 0), 1).to_pylist()[0]
        except _BROKEN as error:
            raise BadItem("unreadable file", f"{self._path.stem}:{row}", str(error)) from error

    def _image(self, id: str, value: Any) -> bytes | Path:
        content, path = (value.get("bytes"), value.get("path")) if isinstance(value, Mapping) else (value, value)
        if isinstance(content, bytes):
            return content
        if path is None:
            raise BadItem("missing image", id, "neither bytes nor a path")
        return image_paths(id, self._images, [path])[0]


def _images_of(value: Any) -> list[Any]:
    """The images in a value of the image column: null, one, or a list."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _texts(id: str, texts: Any) -> list[Turn]:
    """The questions and answers of the_cauldron."""
    turns = []
    for text in texts if isinstance(texts, list) else [texts]:
        if not isinstance(text, Mapping) or not {"user", "assistant"} <= set(text):
            raise BadItem("malformed", id, f"expected a question with 'user' and 'assistant', got {str(text)[:60]}")
        turns += [Turn(role, conversations.text_of(id, text[role])) for role in ("user", "assistant")]
    return turns
