"""Data sets on disk: built once, read as `Split`s.

`build` is idempotent, and two processes may call it at once: one builds, the other waits. A folder appears under its
final name only when it is complete. `load` reads a split once, turns all text into numbers, and keeps the images as
PNG bytes until they are asked for.
"""

import contextlib
import hashlib
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock
from jaxtyping import Int, UInt8

from vlm_jax.core.errors import UserError, unknown
from vlm_jax.core.specs import EncoderSpec
from vlm_jax.data import glyph_tokenizer, images
from vlm_jax.data.tokenizers import Tokenizer, word_tokenizer

DATASETS = ("glyph_ocr", "glyph_facts", "glyph_scene")


class Split(NamedTuple):
    """One split in memory: n examples with K questions each. Lengths count tokens; an answer's counts its end token."""

    name: str  # "glyph_ocr/rows4:test"
    family: str  # ocr, facts, scene
    sha256: str  # of what the split's content follows from; not of its bytes
    ids: tuple[str, ...]
    pngs: tuple[bytes, ...]
    question_tokens: Int[np.ndarray, "n K Q"]  # int32, padded with 0
    question_lengths: Int[np.ndarray, "n K"]
    answer_tokens: Int[np.ndarray, "n K A"]
    answer_lengths: Int[np.ndarray, "n K"]
    bare_questions: Int[np.ndarray, "n K R"]  # what compressors that read the question are given; padded with -1
    encoder: EncoderSpec | None = None  # whose images are wanted; None: as they are stored, all of one size

    @property
    def examples(self) -> int:
        return len(self.ids)

    @property
    def questions_per_example(self) -> int:
        return self.question_lengths.shape[1]

    def images(self, indices: Int[np.ndarray, " n"]) -> UInt8[np.ndarray, "n H H 3"]:
        """Decodes the images of some examples, and makes them what the encoder takes."""
        decoded = [images.read_image(self.pngs[i], self.ids[i]) for i in np.asarray(indices).tolist()]
        return np.stack(decoded) if self.encoder is None else images.fit(decoded, self.encoder)


def configs(dataset: str) -> tuple[str, ...]:
    """The names of a data set's configs. Raises `UserError` for an unknown data set."""
    return tuple(_builder_class(dataset).builder_configs)


def _builder_class(dataset: str) -> Any:
    # TFDS registers a builder when its class is made, so the classes are imported when they are needed.
    if dataset == "glyph_ocr":
        from vlm_jax.data.glyph_ocr.builder import GlyphOcr as builder_class
    elif dataset == "glyph_facts":
        from vlm_jax.data.glyph_facts.builder import GlyphFacts as builder_class
    elif dataset == "glyph_scene":
        from vlm_jax.data.glyph_scene.builder import GlyphScene as builder_class
    else:
        raise unknown("dataset", dataset, DATASETS)
    return builder_class


def _folder(dataset: str, config: str, data_dir: str | Path) -> Path:
    builder_class = _builder_class(dataset)
    if config not in builder_class.builder_configs:
        raise unknown(f"config of {dataset}", config, builder_class.builder_configs)
    return Path(data_dir) / dataset / config / str(builder_class.VERSION)


def _unreadable(folder: Path, error: object) -> UserError:
    return UserError(
        f"dataset folder {folder} cannot be read ({error}): delete it and run again, it is rebuilt in seconds"
    )


def _open(dataset: str, config: str, data_dir: str | Path) -> Any:
    """The builder; `UserError` if its folder is there but is not what this code would build."""
    folder = _folder(dataset, config, data_dir)
    try:
        builder = _builder_class(dataset)(config=config, data_dir=data_dir)
    except Exception as error:
        raise _unreadable(folder, error) from error
    if folder.exists():
        try:
            found = json.loads((folder / "metadata.json").read_text())["identity"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise _unreadable(folder, "it is incomplete") from error
        if not builder.is_prepared():
            raise _unreadable(folder, "it is incomplete")
        if found != builder.identity:
            raise _unreadable(folder, "it was built by another version of this package")
    return builder


def build(dataset: str, config: str, data_dir: str | Path) -> Path:
    """Builds a data set unless it is there. Returns its folder.

    Raises:
      UserError: unknown data set or config; a folder that is there but unreadable or incomplete.
    """
    import tensorflow_datasets as tfds

    folder = _folder(dataset, config, data_dir)
    try:
        Path(data_dir).mkdir(parents=True, exist_ok=True)
        with FileLock(Path(data_dir) / f".{dataset}-{config}.lock"):
            builder = _open(dataset, config, data_dir)
            if not folder.exists():
                tfds.disable_progress_bar()  # the builder shows its own; TFDS announces downloads, which there are none
                with contextlib.redirect_stdout(io.StringIO()):
                    builder.download_and_prepare(file_format="array_record")
    except OSError as error:
        raise UserError(f"data folder {data_dir} cannot be written ({error}): name another one") from error
    return folder


def load(dataset: str, config: str, split: str, data_dir: str | Path, words: Tokenizer | None = None) -> Split:
    """Reads a split ("train", "test", or a part of it in TFDS's notation, "train[:4096]").

    `words` is a language model's tokenizer, None the project's own. A question is followed by a line break (which the
    project's words do not know), an answer by the tokenizer's first end token.

    Raises:
      UserError: unknown names; a data set that was not built, or a folder that cannot be read.
    """
    import tensorflow_datasets as tfds

    folder = _folder(dataset, config, data_dir)
    if not folder.exists():
        raise UserError(
            f"dataset folder {folder} is not there: build {dataset}/{config} first, or name another data folder"
        )
    builder = _open(dataset, config, data_dir)
    if split.partition("[")[0] not in builder.info.splits:
        raise unknown("split", split, builder.info.splits)
    try:
        source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        records = source.__getitems__(range(len(source)))
    except Exception as error:
        raise _unreadable(folder, error) from error
    shape = len(records), len(records[0]["questions"])
    texts = {name: [text.decode() for r in records for text in r[name]] for name in ("questions", "answers")}
    words = words or word_tokenizer()
    asked = [f"{text}\n" for text in texts["questions"]]
    questions, question_lengths = glyph_tokenizer.encode_table(asked, encode=words.encode)
    answers, answer_lengths = glyph_tokenizer.encode_table(
        texts["answers"], words.eos_ids[:1], words.encode_without_special
    )
    bare, bare_lengths = glyph_tokenizer.encode_table(texts["questions"], encode=words.encode)
    bare = np.where(np.arange(bare.shape[1]) < bare_lengths[:, None], bare, -1)
    return Split(
        name=f"{dataset}/{config}:{split}",
        family=records[0]["family"].decode(),
        sha256=hashlib.sha256(f"{builder.identity}:{split}".encode()).hexdigest(),
        ids=tuple(r["id"].decode() for r in records),
        pngs=tuple(r["image"] for r in records),
        question_tokens=questions.reshape(*shape, -1),
        question_lengths=question_lengths.reshape(shape),
        answer_tokens=answers.reshape(*shape, -1),
        answer_lengths=answer_lengths.reshape(shape),
        bare_questions=bare.reshape(*shape, -1),
    )
