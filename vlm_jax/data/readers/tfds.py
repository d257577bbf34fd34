"""Any TFDS data set on disk (array_record; without TensorFlow and without the builder's code).

`fields` maps image, question, answer and id to features: (("question", "qa/question"), ("answer", "qa/answer")), where
"/" goes into nested features. Lists of questions and answers become the turns of one conversation; of several answers
to one question the first counts. Other scalar features are `Example.extra`.
"""

import contextlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlm_jax.core import reading
from vlm_jax.core.errors import UserError, unknown
from vlm_jax.core.specs import SourceSpec
from vlm_jax.data.examples import BadItem, Example, Source
from vlm_jax.data.readers.columns import check_columns, check_fields, columns_of, item_id, question_turns, value_of
from vlm_jax.data.readers.files import combined, file_sha256, missing_path

DEFAULTS = {
    "id": ("id",),
    "image": ("image", "images"),
    "question": ("question", "questions"),
    "answer": ("answer", "answers"),
}
PLURALS = {"images": "image", "questions": "question", "answers": "answer"}


def open_tfds(spec: SourceSpec, cache_dir: Path) -> Source:
    """Opens one split of a builder's folder: `path` is the folder with dataset_info.json, or one above it, `config` is
    the builder's config, `split` is in TFDS's notation ("train[:10%]"). Raises `UserError`.
    """
    import tensorflow_datasets as tfds  # slow to import

    folder = _builder_folder(
        Path(spec.path).expanduser() / spec.config if spec.config else Path(spec.path).expanduser()
    )
    given = {PLURALS.get(field, field): column for field, column in spec.fields}
    check_fields("tfds", given, tuple(DEFAULTS))
    for file in folder.iterdir():
        reading.kind(file)  # TFDS would open a pipe
    if _file_format(folder) != "array_record":
        raise UserError(
            f"{folder}: expected files in the format array_record, got {_file_format(folder)} "
            "(prepare the data set again with file_format='array_record')"
        )
    try:
        builder = tfds.builder_from_directory(folder)
        splits, features = builder.info.splits, dict(_leaves(builder.info.features))
    except Exception as error:  # TFDS raises many types for damaged folders
        raise _unreadable(folder, error) from error
    if not spec.split or spec.split.partition("[")[0] not in splits:
        raise unknown(f"split of {folder}", spec.split, splits)
    columns = {}
    for field, defaults in DEFAULTS.items():
        choices = columns_of(given[field]) if field in given else defaults
        if field in given:
            for column in choices:
                check_columns(folder, [column], features)
            columns[field] = given[field]
        elif found := [column for column in choices if column in features]:
            columns[field] = found[0]
    if "answer" not in columns:
        check_columns(folder, DEFAULTS["answer"], features)
    try:
        data = builder.as_data_source(spec.split, decoders=_image_decoders(builder.info.features) or None)
        files = sorted(map(Path, splits[spec.split.partition("[")[0]].filepaths))
        content = [file_sha256(file, cache_dir) for file in (*files, folder / "features.json")]
        if len(data):
            data[0]
    except Exception as error:
        raise _unreadable(folder, error) from error
    if not len(data):
        raise UserError(f"{folder}: expected at least one example in {spec.split}, got none")
    name = spec.name or f"{builder.info.full_name.rpartition('/')[0]}:{spec.split}"
    return TfdsSource(data, columns, features, combined("tfds", content, spec.split, sorted(columns.items())), name)


def _unreadable(folder: Path, error: Exception) -> UserError:
    why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return UserError(f"{folder}: not a readable TFDS data set ({why})")


def _builder_folder(folder: Path) -> Path:
    """The folder that holds dataset_info.json: this one, or its only one or its newest version below."""
    if reading.kind(folder) != "folder":
        raise missing_path(folder, "the folder of a TFDS data set")
    if (folder / "dataset_info.json").is_file():
        return folder
    inside = sorted(child for child in folder.iterdir() if child.is_dir())
    versions = [child for child in inside if all(part.isdecimal() for part in child.name.split("."))]
    if versions:
        return _builder_folder(max(versions, key=lambda child: [int(part) for part in child.name.split(".")]))
    if len(inside) == 1:
        return _builder_folder(inside[0])
    found = ", ".join(child.name for child in inside[:8]) or "nothing"
    raise UserError(
        f"{folder}: expected the folder that holds dataset_info.json, got folders {found} (add one to path)"
    )


def _file_format(folder: Path) -> str:
    try:
        return str(reading.read_object(folder / "dataset_info.json")["fileFormat"])
    except (UserError, KeyError) as error:
        raise _unreadable(folder, error) from error


def _leaves(features: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name with "/", feature) of nested features; sequences of features as the features."""
    for name, feature in features.items():
        yield f"{prefix}{name}", feature
        inner = getattr(feature, "feature", feature)  # of a sequence
        if hasattr(inner, "items"):
            yield from _leaves(inner, f"{prefix}{name}/")


def _image_decoders(features: Any) -> dict[str, Any]:
    """Decoders that leave images encoded, nested as the features are."""
    import tensorflow_datasets as tfds

    decoders: dict[str, Any] = {}
    for name, feature in features.items():
        inner = getattr(feature, "feature", feature)
        if hasattr(inner, "items"):
            decoders[name] = _image_decoders(inner)
        elif isinstance(inner, tfds.features.Image):
            decoders[name] = tfds.decode.SkipDecoding()
            decoders[name].decode_batch_example_np = _unchanged  # of a sequence of images, which TFDS lacks
    return {name: decoder for name, decoder in decoders.items() if decoder}


def _unchanged(batch: Any) -> Any:
    return batch


class TfdsSource(Source):
    """The examples of one split."""

    def __init__(self, data: Any, columns: Mapping[str, str], features: Mapping[str, Any], fingerprint: str, name: str):
        self._data, self._columns, self.fingerprint, self.name = data, dict(columns), fingerprint, name
        self._used = {column for entry in columns.values() for column in columns_of(entry)}
        self._labels = {name: one.names for name, one in features.items() if type(one).__name__ == "ClassLabel"}

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Example:
        try:
            leaves = dict(_leaves_of(self._data[index]))
            record = {name: self._plain(name, leaves[name]) for name in self._used if name in leaves}
            extra = self._extra(leaves)
        except Exception as error:  # of array_record and TFDS, whose types are their own
            raise BadItem("unreadable file", str(index), str(error)) from error
        value = {field: value_of(record, column) for field, column in self._columns.items()}
        id, images = item_id(value.get("id"), index), value.get("image")
        images = [] if images is None else images if isinstance(images, list) else [images]
        turns = question_turns(id, value.get("question"), value.get("answer"), len(images))
        return Example(id, tuple(_encoded(id, image) for image in images), turns, extra)

    def _extra(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        """Scalars and texts of the features that are not used."""
        extra = {}
        for name, value in leaves.items():
            if name not in self._used and isinstance(value, bytes | str | int | float | np.generic):
                with contextlib.suppress(UnicodeDecodeError):  # an encoded image
                    extra[name] = self._plain(name, value)
        return extra

    def _plain(self, name: str, value: Any) -> Any:
        """A feature as plain Python: texts decoded, labels as names, lists; images stay as they are."""
        if name == self._columns.get("image"):
            return list(value) if isinstance(value, np.ndarray) and value.dtype == object else value
        if name in self._labels and isinstance(value, int | np.integer):
            return self._labels[name][int(value)]
        if isinstance(value, bytes):
            return value.decode()
        if isinstance(value, np.ndarray | np.generic):
            return self._plain("", value.tolist())
        return [self._plain("", one) for one in value] if isinstance(value, list | tuple) else value


def _leaves_of(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _leaves_of(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def _encoded(id: str, image: Any) -> bytes:
    """An encoded image as it is; pixels uint8[h, w, 1 or 3] as PNG."""
    if isinstance(image, bytes):
        return image
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim not in (2, 3):
        raise BadItem("malformed", id, f"expected an encoded image or uint8 pixels, got {type(image).__name__}")
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image).save(file, "png")
    return file.getvalue()
