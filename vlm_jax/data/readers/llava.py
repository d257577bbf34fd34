"""LLaVA's files: a json or jsonl of conversations and a folder of images.

    {"id": "000000033471", "image": "coco/train2017/000000033471.jpg",
     "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A bus."}]}

`image` is a path, a list of paths, or absent (text only: "<image>" is then ordinary text). Facts about these files:
`scripts/v1_5` and `llava/train/train.py` of haotian-liu/LLaVA and LLaVA-VL/LLaVA-NeXT.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from vlm_jax.core import reading
from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import SourceSpec
from vlm_jax.data.examples import IMAGE_MARKER, BadItem, Example, Source, Turn
from vlm_jax.data.readers import turns as conversations
from vlm_jax.data.readers.columns import check_fields, item_id
from vlm_jax.data.readers.files import combined, data_files, find_image, image_folder
from vlm_jax.data.readers.mixture import Concatenation, taken
from vlm_jax.data.readers.records import RecordFile

FIELDS = ("id", "image", "conversations")


def open_llava(spec: SourceSpec, cache_dir: Path) -> Source:
    """Opens a file, several ("{a,b}.json", a pattern), or a yaml that lists files with the number to take of each
    (LLaVA-NeXT's `data_path`). Raises `UserError`.
    """
    check_fields("llava", dict(spec.fields), FIELDS)
    columns = {field: dict(spec.fields).get(field, field) for field in FIELDS}
    parts = []
    for file in json_files(spec.path):
        listed = _listed(file) if file.suffix in (".yaml", ".yml") else [(file, "all")]
        for path, take in listed:
            records = RecordFile(path, cache_dir)
            records.require(columns["conversations"])
            source = LlavaSource(records, image_folder(spec.images, path.parent), columns, spec.name or path.stem)
            parts.append(taken(source, take))
    return parts[0] if len(parts) == 1 else Concatenation(tuple(parts), spec.name or Path(spec.path).stem)


def json_files(path: str) -> list[Path]:
    """The files that a path means; of a folder its only json or jsonl: several are often versions of the same data."""
    folder = Path(path).expanduser()
    if not path or reading.kind(folder) != "folder":
        return data_files(path, (".json", ".jsonl"))
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in (".json", ".jsonl"))
    if len(files) != 1:
        names = ", ".join(file.name for file in files[:6]) or "none"
        raise UserError(
            f"{path}: expected one json or jsonl file in the folder, got {names} (write the path of a file)"
        )
    return files


def _listed(file: Path) -> list[tuple[Path, str]]:
    """(file, how many to take) of a yaml: datasets: [{json_path: ..., sampling_strategy: "first:10%"}]."""
    try:
        content = yaml.safe_load(reading.read_text(file))
        entries = [(entry["json_path"], entry.get("sampling_strategy", "all")) for entry in content["datasets"]]
    except (ValueError, yaml.YAMLError, LookupError, TypeError, AttributeError, RecursionError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{file}: expected a list `datasets` of entries with a json_path ({why})") from error
    if not entries:
        raise UserError(f"{file}: expected at least one data set, got none")
    out = []
    for name, take in entries:
        beside = file.parent / str(name)
        paths = data_files(str(beside if os.path.exists(beside) else name), (".json", ".jsonl"))
        out += [(path, str(take)) for path in paths]
    return out


class LlavaSource(Source):
    """The conversations of one file."""

    def __init__(self, records: RecordFile, images: Path, columns: Mapping[str, str], name: str):
        self._records, self._images, self._columns, self.name = records, images, dict(columns), name
        self.fingerprint = combined("llava", records.sha256, sorted(columns.items()))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        record, columns = self._records[index], self._columns
        id = item_id(record.get(columns["id"]), index)
        if "video" in record and columns["image"] not in record:
            raise BadItem("video", id, str(record["video"])[:200])
        turns = conversations.read_messages(id, record.get(columns["conversations"]))
        turns, names = place_images(id, turns, record.get(columns["image"]), columns["image"] in record)
        extra = {key: value for key, value in record.items() if key not in columns.values()}
        return Example(id, image_paths(id, self._images, names), turns, extra)


def place_images(id: str, turns: tuple[Turn, ...], image: Any, has_key: bool) -> tuple[tuple[Turn, ...], list[Any]]:
    """(turns with placeholders in canonical form, images) of a value that is one image, a list, or empty.

    Without the key the row is text only, whatever its text. With the key and no value, a placeholder is an error.
    Raises `BadItem`.
    """
    images = image if isinstance(image, list) else [] if image is None or image == "" else [image]
    if images:
        mark = conversations.mark_in_place if isinstance(image, list) else conversations.mark_front_of_turn
        turns = mark(id, turns, len(images))
    elif has_key and any(IMAGE_MARKER in turn.text for turn in turns):
        raise BadItem("placeholder without an image", id, f"the image is {image!r}")
    return turns, images


def image_paths(id: str, folder: Path, names: list[Any]) -> tuple[Path, ...]:
    """The files of an item's images. Raises `BadItem` for one that does not exist."""
    paths = []
    for name in names:
        if not isinstance(name, str):
            raise BadItem("malformed", id, f"expected the path of an image, got {str(name)[:60]}")
        path = find_image(folder, name)
        if path is None:
            raise BadItem("missing image", id, str(folder / name))
        paths.append(path)
    return tuple(paths)
