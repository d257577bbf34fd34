"""Data sets on disk: `build` writes them once, `load` reads a `Split`.

`build` is idempotent and locked: of two processes one builds, the other waits. Folders are written atomically. `load`
tokenizes all text and keeps the images as PNG bytes, which are decoded batch by batch.
"""

import contextlib
import hashlib
import importlib
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock
from jaxtyping import Int, UInt8

from vlm_jax.core.errors import UserError, unknown
from vlm_jax.core.specs import EncoderSpec
from vlm_jax.data import images
from vlm_jax.data.glyph_tokenizer import encode_table
from vlm_jax.data.tokenizers import Tokenizer, word_tokenizer

DATASETS = {"glyph_ocr": "GlyphOcr", "glyph_facts": "GlyphFacts", "glyph_scene": "GlyphScene"}  # builder classes


class Split(NamedTuple):
    """One split in memory: n examples with K questions each. Lengths count tokens; an answer's counts its end token."""

    name: str  # "glyph_ocr/rows4:test"
    family: str  # ocr, facts, scene
    sha256: str  # of the builder's version, config and seed and of the split's name, not of its bytes
    ids: tuple[str, ...]
    pngs: tuple[bytes, ...]
    question_tokens: Int[np.ndarray, "n K Q"]  # int32, padded with 0
    question_lengths: Int[np.ndarray, "n K"]
    answer_tokens: Int[np.ndarray, "n K A"]
    answer_lengths: Int[np.ndarray, "n K"]
    bare_questions: Int[np.ndarray, "n K R"]  # input of compressors that read the question; padded with -1
    encoder: EncoderSpec | None = None  # images are preprocessed for it; None: as stored, all of one size

    @property
    def examples(self) -> int:
        return len(self.ids)

    @property
    def questions_per_example(self) -> int:
        return self.question_lengths.shape[1]

    def images(self, indices: Int[np.ndarray, " n"]) -> UInt8[np.ndarray, "n H H 3"]:
        """The images of some examples, decoded and preprocessed for the encoder."""
        decoded = [images.read_image(self.pngs[i], self.ids[i]) for i in np.asarray(indices).tolist()]
        return np.stack(decoded) if self.encoder is None else images.fit(decoded, self.encoder)


def _locate(dataset: str, config: str, data_dir: str | Path) -> tuple[Any, Path]:
    """(builder class, folder of a data set)."""
    if dataset not in DATASETS:
        raise unknown("dataset", dataset, DATASETS)
    # Imported on use: TFDS registers a builder when its class is created.
    module = importlib.import_module(f"vlm_jax.data.{dataset}.builder")
    builder_class = getattr(module, DATASETS[dataset])
    if config not in builder_class.builder_configs:
        raise unknown(f"config of {dataset}", config, builder_class.builder_configs)
    return builder_class, Path(data_dir) / dataset / config / str(builder_class.VERSION)


def _unreadable(folder: Path, error: object) -> UserError:
    return UserError(f"dataset folder {folder} cannot be read ({error}): delete it and run again to rebuild it")


def _open(dataset: str, config: str, data_dir: str | Path) -> Any:
    """The TFDS builder. Raises `UserError` where its folder exists but was not written by this builder."""
    builder_class, folder = _locate(dataset, config, data_dir)
    try:
        builder = builder_class(config=config, data_dir=data_dir)
    except Exception as error:
        raise _unreadable(folder, error) from error
    if folder.exists():
        try:
            identity = json.loads((folder / "metadata.json").read_text())["identity"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise _unreadable(folder, "it is incomplete") from error
        if not builder.is_prepared():
            raise _unreadable(folder, "it is incomplete")
        if identity != builder.identity:
            raise _unreadable(folder, "it was built by another version of this package")
    return builder


def build(dataset: str, config: str, data_dir: str | Path) -> Path:
    """Builds a data set unless it exists. Returns its folder. Raises `UserError` for an unknown data set or config, and
    a folder that is unreadable or incomplete.
    """
    import tensorflow_datasets as tfds

    _, folder = _locate(dataset, config, data_dir)
    try:
        Path(data_dir).mkdir(parents=True, exist_ok=True)
        with FileLock(Path(data_dir) / f".{dataset}-{config}.lock"):
            builder = _open(dataset, config, data_dir)
            if not folder.exists():
                tfds.disable_progress_bar()  # the builder has its own; TFDS prints about downloads
                with contextlib.redirect_stdout(io.StringIO()):
                    builder.download_and_prepare(file_format="array_record")
    except OSError as error:
        raise UserError(f"data folder {data_dir} cannot be written ({error}): choose another one") from error
    return folder


def load(dataset: str, config: str, split: str, data_dir: str | Path, tokenizer: Tokenizer | None = None) -> Split:
    """Reads a split ("train", "test", or a slice in TFDS's notation, "train[:4096]").

    `tokenizer` None is the suite's own. A newline follows each question (which the suite's tokenizer drops), the first
    of `eos_ids` each answer.

    Raises `UserError` for unknown names, a data set that was not built, or a folder that cannot be read.
    """
    import tensorflow_datasets as tfds

    _, folder = _locate(dataset, config, data_dir)
    if not folder.exists():
        raise UserError(f"dataset folder {folder} does not exist: build {dataset}/{config}, or choose another folder")
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
    tokenizer = tokenizer or word_tokenizer()
    lines = [f"{text}\n" for text in texts["questions"]]
    questions, question_lengths = encode_table(lines, encode=tokenizer.encode)
    answers, answer_lengths = encode_table(texts["answers"], tokenizer.eos_ids[:1], tokenizer.encode_without_special)
    bare, bare_lengths = encode_table(texts["questions"], encode=tokenizer.encode)
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
