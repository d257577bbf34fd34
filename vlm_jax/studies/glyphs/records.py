"""What every builder of the suite shares: the record's fields, and how a split is written without TensorFlow.

A record: id, family, image (PNG), questions and answers (equally many of both, words of the closed vocabulary).
Records are written in the order of their numbers, from chunks that are each a pure function of (config, split, number):
building twice gives the same bytes.
"""

import dataclasses
import hashlib
import io
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import rich.console
import rich.progress
import tensorflow_datasets as tfds
from jaxtyping import UInt8
from PIL import Image

from vlm_jax.studies.glyphs import glyphs

CHUNK = 256  # records drawn at once: large enough to be fast, small enough for the caches
_PNG_LEVEL = 1


@dataclasses.dataclass(eq=False)
class GlyphConfig(tfds.core.BuilderConfig):
    """Sizes and seed of a data set; subclasses add its difficulty. (TFDS's own class is not frozen, so none can be.)"""

    train: int = 8192  # images
    test: int = 1024
    seed: int = 1
    backdrop: str = "paper"  # or "photo": photographs and scans behind the glyphs


class Chunk(NamedTuple):
    """Consecutive records of one split."""

    images: UInt8[np.ndarray, "n H H 3"]
    questions: list[list[str]]
    answers: list[list[str]]


class GlyphBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """A builder of the suite: a subclass names its family and makes chunks."""

    VERSION = tfds.core.Version("1.0.0")
    FAMILY = ""

    @property
    def identity(self) -> str:
        """A fingerprint of everything that decides the records' content: name, version, config with its seed."""
        chosen = [self.name, str(self.VERSION), dataclasses.asdict(self.builder_config)]
        return hashlib.sha256(json.dumps(chosen, sort_keys=True, default=str).encode()).hexdigest()

    def chunk(self, split: str, start: int, rng: np.random.Generator, count: int) -> Chunk:
        """Records `start` ... `start + count - 1` of a split."""
        raise NotImplementedError

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=type(self).__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "family": tfds.features.Text(),
                    "image": tfds.features.Image(shape=(glyphs.CANVAS, glyphs.CANVAS, 3), encoding_format="png"),
                    "questions": tfds.features.Sequence(tfds.features.Text()),
                    "answers": tfds.features.Sequence(tfds.features.Text()),
                }
            ),
            metadata=tfds.core.MetadataDict(identity=self.identity),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        return {split: self._generate_examples(split) for split in glyphs.SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        config = self.builder_config
        total = getattr(config, split)
        console = rich.console.Console(stderr=True)
        starts = rich.progress.track(
            range(0, total, CHUNK),
            description=f"{self.name}/{config.name} {split}",
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        for start in starts:
            rng = np.random.default_rng([config.seed, glyphs.SPLITS.index(split), start])
            chunk = self.chunk(split, start, rng, min(CHUNK, total - start))
            for row, image in enumerate(chunk.images):
                png = io.BytesIO()  # TFDS stores a file untouched
                Image.fromarray(image).save(png, "png", compress_level=_PNG_LEVEL)
                png.seek(0)
                yield (
                    start + row,
                    {
                        "id": f"{config.name}-{split}-{start + row:05d}",
                        "family": self.FAMILY,
                        "image": png,
                        "questions": chunk.questions[row],
                        "answers": chunk.answers[row],
                    },
                )
