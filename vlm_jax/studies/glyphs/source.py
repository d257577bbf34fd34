"""The glyph suite as a source of examples: `build` writes a data set once, `Glyphs` reads it.

`build` is idempotent and locked: of two processes one builds, the other waits. Folders are written atomically.
"""

import contextlib
import hashlib
import importlib
import io
from pathlib import Path
from typing import Any

from vlm_jax.core import reading
from vlm_jax.core.errors import UserError, unknown
from vlm_jax.core.files import file_lock
from vlm_jax.data.examples import Example, Source, Turn

FAMILIES = {"ocr": "GlyphOcr", "facts": "GlyphFacts", "scene": "GlyphScene"}  # TFDS builder classes


class Glyphs(Source):
    """Examples with one image and a question and its answer for each pair of turns.

    Args:
        path: the family, "ocr", "facts" or "scene".
        config: of its TFDS builder, "rows5".
        split: "train", "test", or a slice such as "train[:64]".
        cache_dir: holds the data sets, which are built first if they are missing.

    Raises `UserError` for unknown names and folders that cannot be read or written.
    """

    def __init__(self, path: str, config: str, split: str, cache_dir: Path):
        import tensorflow_datasets as tfds

        family, data_dir = path, cache_dir / "data"
        folder = build(family, config, data_dir)
        builder = _open(family, config, data_dir)
        if split.partition("[")[0] not in builder.info.splits:
            raise unknown("split", split, builder.info.splits)
        self.name = f"glyph_{family}/{config}:{split}"
        self.fingerprint = hashlib.sha256(f"{builder.identity}:{split}".encode()).hexdigest()
        try:
            self._records = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
            self[0]
        except Exception as error:
            raise _unreadable(folder, error) from error

    def __len__(self) -> int:
        return len(self._records)

    def images_fingerprint(self) -> str:
        return self.fingerprint

    def __getitem__(self, index: Any) -> Example:
        record = self._records[int(index)]
        pairs = zip(record["questions"], record["answers"], strict=True)
        turns = [(Turn("user", f"<image>{q.decode()}"), Turn("assistant", a.decode())) for q, a in pairs]
        return Example(record["id"].decode(), (record["image"],), tuple(turn for pair in turns for turn in pair))


def build(family: str, config: str, data_dir: str | Path) -> Path:
    """Builds a data set unless it exists. Returns its folder. Raises `UserError` for an unknown data set or config, and
    a folder that is unreadable or incomplete.
    """
    import tensorflow_datasets as tfds

    _, folder = _locate(family, config, data_dir)
    try:
        Path(data_dir).mkdir(parents=True, exist_ok=True)
        with file_lock(Path(data_dir) / f".glyph_{family}-{config}.lock"):
            builder = _open(family, config, data_dir)
            if not folder.exists():
                tfds.disable_progress_bar()  # the builder has its own; TFDS prints about downloads
                with contextlib.redirect_stdout(io.StringIO()):
                    builder.download_and_prepare(file_format="array_record")
    except OSError as error:
        raise UserError(f"data folder {data_dir} cannot be written ({error}): choose another one") from error
    return folder


def _locate(family: str, config: str, data_dir: str | Path) -> tuple[Any, Path]:
    """(builder class, folder of a data set)."""
    if family not in FAMILIES:
        raise unknown("family", family, FAMILIES)
    name = f"glyph_{family}"
    # Imported on use: TFDS registers a builder when its class is created.
    builder_class = getattr(importlib.import_module(f"vlm_jax.studies.glyphs.{name}.builder"), FAMILIES[family])
    if config not in builder_class.builder_configs:
        raise unknown(f"config of {name}", config, builder_class.builder_configs)
    return builder_class, Path(data_dir) / name / config / str(builder_class.VERSION)


def _unreadable(folder: Path, error: object) -> UserError:
    return UserError(f"dataset folder {folder} cannot be read ({error}): delete it and run again to rebuild it")


def _open(family: str, config: str, data_dir: str | Path) -> Any:
    """The TFDS builder. Raises `UserError` where its folder exists but was not written by this builder."""
    builder_class, folder = _locate(family, config, data_dir)
    try:
        builder = builder_class(config=config, data_dir=data_dir)
    except Exception as error:
        raise _unreadable(folder, error) from error
    if folder.exists():
        try:
            identity = reading.read_object(folder / "metadata.json")["identity"]
        except (UserError, LookupError) as error:
            raise _unreadable(folder, "it is incomplete") from error
        if not builder.is_prepared():
            raise _unreadable(folder, "it is incomplete")
        if identity != builder.identity:
            raise _unreadable(folder, "it was built by another version of this package")
    return builder
