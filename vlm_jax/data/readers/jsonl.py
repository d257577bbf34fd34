"""big_vision's rows (its `datasets/jsonl.py` and PaliGemma's transfers): a prefix, a suffix and an image.

    {"image": "a.jpg", "prefix": "answer en what is this?", "suffix": "a bus"}

`suffix` is a text or a list, of which the first counts. `fields` renames columns, and may write the prefix as
"answer en {question}". Other columns are `Example.extra`.
"""

from collections.abc import Mapping
from pathlib import Path

from vlm_jax.core.specs import SourceSpec
from vlm_jax.data.examples import Example, Source
from vlm_jax.data.readers.columns import check_fields, columns_of, first_of, item_id, question_turns, value_of
from vlm_jax.data.readers.files import combined, image_folder
from vlm_jax.data.readers.llava import image_paths, json_files
from vlm_jax.data.readers.mixture import Concatenation
from vlm_jax.data.readers.records import RecordFile

FIELDS = ("id", "image", "prefix", "suffix")


def open_jsonl(spec: SourceSpec, cache_dir: Path) -> Source:
    """Opens a jsonl file (or a json array of such rows), or several. Raises `UserError`."""
    check_fields("jsonl", dict(spec.fields), FIELDS)
    columns = {field: dict(spec.fields).get(field, field) for field in FIELDS}
    parts = []
    for path in json_files(spec.path):
        records = RecordFile(path, cache_dir)
        for field in dict.fromkeys(("suffix", *dict(spec.fields))):
            for column in columns_of(columns[field]):
                records.require(column)
        parts.append(JsonlSource(records, image_folder(spec.images, path.parent), columns, spec.name or path.stem))
    return parts[0] if len(parts) == 1 else Concatenation(tuple(parts), spec.name or Path(spec.path).stem)


class JsonlSource(Source):
    """The rows of one file."""

    def __init__(self, records: RecordFile, images: Path, columns: Mapping[str, str], name: str):
        self._records, self._images, self._columns, self.name = records, images, dict(columns), name
        self.fingerprint = combined("jsonl", records.sha256, sorted(columns.items()))
        self._used = {column for entry in columns.values() for column in columns_of(entry)}

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        record = self._records[index]
        value = {field: value_of(record, column) for field, column in self._columns.items()}
        id = item_id(value["id"], index)
        image = value["image"]
        names = image if isinstance(image, list) else [] if image in (None, "") else [image]
        turns = question_turns(id, first_of(value["prefix"]), first_of(value["suffix"]), len(names))
        extra = {key: value for key, value in record.items() if key not in self._used}
        return Example(id, image_paths(id, self._images, names), turns, extra)
