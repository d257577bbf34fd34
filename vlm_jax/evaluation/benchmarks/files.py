"""Benchmark files on disk: which of several layouts is present, and readers that name file, line and fix.

People hold LLaVA's `playground/data/eval`, the publishers' downloads, or lmms-lab's parquet repositories; a benchmark
lists the files of each, and the first complete layout is read.
"""

import base64
import binascii
import csv
import functools
import io
import os
import sys
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlm_jax.core import reading
from vlm_jax.core.errors import UserError
from vlm_jax.evaluation.benchmarks.items import Image, Item, ParquetImage

_HUBS = ("", "lmms-lab", "lmms-lab-encoder", "eval", "playground/data/eval")  # folders between DATA and a benchmark's


_MAX_BYTES = 2**32  # of a file with the questions or answers of a benchmark


class Found(NamedTuple):
    """The first complete layout."""

    layout: str
    paths: Mapping[str, list[Path]]  # by role; of optional roles that are missing, an empty list

    def path(self, role: str) -> Path:
        return self.paths[role][0]


Layouts = Mapping[str, Mapping[str, Sequence[str]]]  # layout -> role -> alternative glob patterns; "role?" is optional


def find(data: Path, folders: Sequence[str], layouts: Layouts) -> Found:
    """Raises `UserError` with every file that was looked for if no layout is complete."""
    places = list(find_folders(data, folders))
    for layout, roles in layouts.items():
        for place in places:
            paths = {role.rstrip("?"): _match(place, patterns) for role, patterns in roles.items()}
            if all(paths[role] for role in roles if not role.endswith("?")):
                return Found(layout, paths)
    looked = "; ".join(
        f"{layout}: {' and '.join(' or '.join(patterns) for role, patterns in roles.items() if role[-1] != '?')}"
        for layout, roles in layouts.items()
    )
    where = " or ".join(str(place) for place in places) or f"{data}/{folders[0]} (no such folder)"
    raise UserError(f"{folders[0]}: expected the files of one layout in {where}, looked for {looked}")


def find_folders(data: Path, folders: Sequence[str]) -> Iterator[Path]:
    """The folders of a benchmark, named in any case, also as Hugging Face's cache names them."""
    names = [folder.lower() for folder in folders]
    for hub in (data / hub for hub in _HUBS if (data / hub).is_dir()):
        for path in sorted(path for path in hub.iterdir() if path.is_dir()):
            if path.name.lower() in names:
                yield path
            elif path.name.startswith("datasets--") and path.name.lower().split("--")[-1] in names:
                yield from sorted((path / "snapshots").glob("*"))
    if data.name.lower() in names:
        yield data


def _match(place: Path, patterns: Sequence[str]) -> list[Path]:
    return next((paths for pattern in patterns if (paths := sorted(place.glob(pattern)))), [])


def read_json(path: Path) -> Any:
    """Raises `UserError` for a file that is no JSON."""
    return _parse(_text(path), str(path))


def _parse(text: str, where: str) -> Any:
    try:
        return reading.parse_json(text, where)
    except UserError as error:
        raise UserError(f"{error} (download it again)") from error


def read_jsonl(path: Path, *fields: str) -> list[dict[str, Any]]:
    """One object a line, or a JSON list. Raises `UserError` for a broken line or a missing field."""
    text = _text(path)
    if text.lstrip().startswith("["):
        rows = read_json(path)
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), start=1):
            rows += [_parse(line, f"{path}:{number}")] if line.strip() else []
    for number, row in enumerate(rows, start=1):
        check_fields(row, fields, f"{path}:{number}")
    return rows


def check_fields(row: Any, fields: Sequence[str], where: str) -> None:
    """Raises `UserError` unless `row` is an object with these fields."""
    if not isinstance(row, dict) or any(field not in row for field in fields):
        missing = [field for field in fields if field not in row] if isinstance(row, dict) else fields
        raise UserError(f"{where}: expected fields {', '.join(fields)}, missing {', '.join(missing)}")


def read_tsv(path: Path, *fields: str) -> list[dict[str, Any]]:
    """Rows of a table with a header. Raises `UserError`."""
    before = csv.field_size_limit(sys.maxsize)  # images in base64
    try:
        rows = list(csv.DictReader(io.StringIO(_text(path)), delimiter="\t"))
    except csv.Error as error:
        raise UserError(f"{path}: not a table with tabs ({error}): download it again") from error
    finally:
        csv.field_size_limit(before)
    for number, row in enumerate(rows, start=2):
        check_fields({name: value for name, value in row.items() if value is not None}, fields, f"{path}:{number}")
    return rows


def _text(path: Path) -> str:
    return reading.read_text(path, _MAX_BYTES)


def read_parquet(paths: Sequence[Path], *fields: str) -> list[dict[str, Any]]:
    """The rows of several files. Raises `UserError` for a broken file or a missing column.

    Images are left in the files: a column of images holds a tuple of `ParquetImage`, empty where there is none.
    """
    rows = []
    for path in paths:
        table, image_columns = _without_images(path)
        found = [*table.column_names, *image_columns]
        if missing := [field for field in fields if field not in found]:
            raise UserError(f"{path}: expected columns {', '.join(fields)}, missing {', '.join(missing)}")
        for number, row in enumerate(table.to_pylist()):
            for column in image_columns:
                given = row.get(column, {})
                count = len(given) if isinstance(given, list) else int(given is not None)
                row[column] = tuple(ParquetImage(path, number, column, index) for index in range(count))
            rows.append(row)
    return rows


def _without_images(path: Path) -> tuple[Any, list[str]]:
    """The table without the bytes of images, and its columns of images."""
    try:
        leaves = [column.split(".") for column in (_open(path).schema.column(i).path for i in range(_columns(path)))]
        images = list(dict.fromkeys(leaf[0] for leaf in leaves if len(leaf) > 1 and leaf[-1] == "bytes"))
        return _open(path).read([".".join(leaf) for leaf in leaves if leaf[-1] != "bytes" or len(leaf) == 1]), images
    except (OSError, ValueError, LookupError) as error:  # pyarrow's errors derive from these
        raise UserError(f"{path}: not a readable parquet file ({error}): download it again") from error


def _columns(path: Path) -> int:
    return len(_open(path).schema)


@functools.lru_cache(64)
def _open(path: Path) -> Any:
    import pyarrow.parquet

    reading.open_regular(path).close()  # a pipe would block
    return pyarrow.parquet.ParquetFile(path)


_reading = threading.Lock()  # of the files that `_open` keeps: pyarrow reads one from one thread at a time


@functools.lru_cache(8)
def _row_group(path: Path, group: int, column: str) -> list[Any]:
    return _open(path).read_row_group(group, columns=[column]).column(column).to_pylist()


def read_image(image: Image) -> Path | bytes:
    """A path or the bytes of a file, which `data.images.read_image` takes."""
    if not isinstance(image, ParquetImage):
        return image
    row, group = image.row, 0
    with _reading:
        while row >= (size := _open(image.path).metadata.row_group(group).num_rows):
            row, group = row - size, group + 1
        try:
            value = _row_group(image.path, group, image.column)[row]
        except (OSError, ValueError) as error:
            raise UserError(f"{image.path}: not a readable parquet file ({error}): download it again") from error
    value = value[image.index] if isinstance(value, list) else value
    if not value or value.get("bytes") is None:
        raise UserError(f"{image.path}: row {image.row}: expected an image in column {image.column}, got none")
    return value["bytes"]


def decode_base64(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"{where}: expected an image in base64, got {text[:20]!r}... ({error})") from error


def check(name: str, items: Sequence[Item]) -> None:
    """Raises `UserError` for no items, ids that occur twice, or image files that are missing."""
    if not items:
        raise UserError(f"{name}: expected questions, got none")
    seen: set[str] = set()
    if twice := next((item.id for item in items if item.id in seen or seen.add(item.id)), None):
        raise UserError(f"{name}: expected unique ids, got {twice!r} twice")
    shared: dict[tuple[str, str], Item] = {}
    for item in items:
        _check_item(name, item)
    for item in items:  # items that share an answer are the same question
        other = shared.setdefault((item.question_id, item.prompt), item)
        if (other.references, other.image_id) != (item.references, item.image_id):
            raise UserError(f"{name}: expected unique ids, got {item.question_id!r} for two questions with one prompt")
    paths = dict.fromkeys(image for item in items for image in item.images if isinstance(image, Path))
    if missing := [path for path in paths if not os.path.isfile(path)]:
        raise UserError(f"{name}: {len(missing)} of {len(paths)} images are missing, the first is {missing[0]}")


def _check_item(name: str, item: Item) -> None:
    """Raises `UserError` for fields of other types than a model and a scorer take."""
    options = item.extra.get("options")
    options = options.values() if isinstance(options, Mapping) else options
    for what, values in (("prompt", [item.prompt]), ("answers", item.references), ("image", [item.image_id])):
        if not all(isinstance(value, str) for value in values):
            raise UserError(f"{name}: question {item.id!r}: {what}: expected text, got {list(values)!r}")
    if options is not None and (isinstance(options, str) or not isinstance(options, Collection)):
        raise UserError(f"{name}: question {item.id!r}: options: expected a list of texts, got {options!r}")
    images = item.images if isinstance(item.images, tuple) else (item.images,)
    if not all(isinstance(image, Path | bytes | ParquetImage) for image in images):
        raise UserError(f"{name}: question {item.id!r}: expected images, got {item.images!r}")


def look_up(name: str, keys: Sequence[Any], truth: Mapping[Any, Any], where: Path) -> list[Any]:
    """The truth of each key. Raises `UserError` if questions and truth do not match."""
    if missing := [key for key in keys if key not in truth]:
        raise UserError(
            f"{name}: {len(missing)} of {len(keys)} questions have no answer in {where}, the first is {missing[0]!r}"
            " (files of one release belong together)"
        )
    return [truth[key] for key in keys]
