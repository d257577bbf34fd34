"""Small mixtures of made-up conversations. A word is its token id: "<image> 5 6" -> [IMAGE, 5, 6]; 1 ends an answer."""

import io
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests import builders
from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import DataSpec
from vlm_jax.core.structs import Visual
from vlm_jax.data import tokenized
from vlm_jax.data.conversations import IMAGE, Conversation
from vlm_jax.data.examples import BadItem, Example, Source, Turn
from vlm_jax.data.packing import RowLayout
from vlm_jax.data.pipeline import Batches
from vlm_jax.data.tokenized import Mixture, TokenizedDataset
from vlm_jax.data.views import BadImages, Data

END = 1
LAYOUT = RowLayout(4)


class Listed(Source):
    """Examples of a list; exceptions in it are raised."""

    def __init__(self, items: Sequence[Example | BadItem], name: str = "listed"):
        self.items, self.name = list(items), name

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Example:
        item = self.items[index]
        if isinstance(item, BadItem):
            raise item
        return item


def words(text: str) -> list[int]:
    return [IMAGE if word == "<image>" else int(word) for word in text.split()]


def tokenize(turns: Sequence[Turn], images: int) -> Conversation:
    ids, target, turn_ends = [], [], []
    for turn in turns:
        answer = turn.role == "assistant"
        new = words(turn.text) + [END] * answer
        ids += new
        target += [answer] * len(new)
        turn_ends += [len(ids)] * answer
    if ids.count(IMAGE) != images:
        raise UserError(f"expected {images} images, got {ids.count(IMAGE)}")
    return Conversation(ids, target, turn_ends)


def bare_ids(turns: Sequence[Turn]) -> list[int]:
    """The text of the first question."""
    return [word for word in words(next(turn.text for turn in turns if turn.role == "user")) if word != IMAGE]


def png(value: int, size: int = 16) -> bytes:
    """A random image, the same for the same value."""
    pixels = np.random.default_rng(value).integers(0, 256, (size, size, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def example(id: str, texts: str, images: Sequence[bytes] = ()) -> Example:
    """Turns from "question | answer | question | answer"."""
    roles = ("user", "assistant")
    turns = tuple(Turn(roles[i % 2], text.strip()) for i, text in enumerate(texts.split("|")))
    return Example(id, tuple(images), turns)


def random_examples(
    count: int, seed: int = 0, images: int = 2, turns: int = 3, longest: int = 5, name: str = "id"
) -> list[Example]:
    """`count` examples of up to `images` images, `turns` pairs of turns, and `longest` words a turn."""
    rng, out = np.random.default_rng(seed), []
    for number in range(count):
        text = [
            " ".join(map(str, rng.integers(2, 32, rng.integers(1, longest + 1))))
            for _ in range(2 * rng.integers(1, turns + 1))
        ]
        shown = int(rng.integers(0, images + 1))
        for _ in range(shown):  # anywhere in any question
            turn = 2 * int(rng.integers(0, len(text) // 2))
            parts = text[turn].split()
            parts.insert(int(rng.integers(0, len(parts) + 1)), "<image>")
            text[turn] = " ".join(parts)
        encoded = [png(1000 * seed + 10 * number + i) for i in range(shown)]
        out.append(example(f"{name}{number}", " | ".join(text), encoded))
    return out


def question_sets(count: int, questions: int, seed: int = 0, images: int = 1) -> list[Example]:
    """Examples with equally many questions about the same images, each to be a conversation of its own. The first word
    of an answer is the number of its question, plus 2."""
    rng, out = np.random.default_rng(seed), []
    for number in range(count):
        text = []
        for question in range(questions):
            text.append(" ".join(map(str, rng.integers(2, 32, rng.integers(1, 5)))))
            text.append(" ".join(map(str, [question + 2, *rng.integers(2, 32, rng.integers(0, 3))])))
        encoded = [png(1000 * seed + 10 * number + i) for i in range(images)]
        out.append(example(f"set{number}", " | ".join(text), encoded))
    return out


def dataset(
    items: Sequence[Example | BadItem] | Source, separate: bool = False, folder: Path | None = None
) -> TokenizedDataset:
    source = items if isinstance(items, Source) else Listed(items)
    with tempfile.TemporaryDirectory() as own:  # what is mapped into memory outlives it
        return tokenized.open_tokenized(source, separate, tokenize, bare_ids, "key", folder or Path(own))


def mixture(*parts: TokenizedDataset, passes: Sequence[float] = ()) -> Mixture:
    names = [f"part{number}" for number in range(len(parts))]
    return tokenized.mix(parts, names, passes or [1.0] * len(parts))


def spec(**fields: Any) -> DataSpec:
    return DataSpec(
        **{
            "train": (), "test": (), "format": "template", "pack": "fit", "batch_rows": 4, "row_tokens": 64,
            "row_images": 4, "questions_per_example": 0, "frozen_features": False, **fields,
        }
    )  # fmt: skip


def data(mixed: Mixture, layout: RowLayout = LAYOUT, features: Any = None, **fields: Any) -> Data:
    made = spec(**fields)
    return Data(mixed, made, layout, builders.ENCODER, BadImages(mixed, made.max_bad_share), features)


def batches(mixed: Mixture, layout: RowLayout = LAYOUT, seed: int = 5, slots: Any = None, **fields: Any) -> Batches:
    return Batches(data(mixed, layout, **fields), seed, slots)


def numbered(part: int) -> Callable[[np.ndarray], Visual]:
    """Features that are the image's number, and 1000 for each part."""
    return lambda numbers: Visual(
        (1000 * part + np.asarray(numbers, np.float32))[:, None, None] * np.ones((1, 2, 3), np.float32)
    )
