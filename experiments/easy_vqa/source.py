"""easy-VQA (PyPI package `easy-vqa`) as a source: an image, and about ten questions with one-word answers.

data.train = (dict(source="experiments.easy_vqa.source:EasyVqa", split="train", separate=True),)
"""

import importlib.util
import json
from pathlib import Path

from vlm_jax.core.errors import UserError, unknown
from vlm_jax.data.examples import IMAGE_MARKER, Example, Source, Turn

SPLITS = ("train", "test")
KINDS = ("yes or no", "colour", "shape")  # of questions, by their answer
SHAPES = ("circle", "rectangle", "triangle")


def kind_of(answer: str) -> str:
    if answer in ("yes", "no"):
        return "yes or no"
    return "shape" if answer in SHAPES else "colour"


def folder() -> Path:
    """The package's data. Raises `UserError` where it is not installed."""
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise UserError("source easy-VQA: expected the package easy-vqa, got none (pip install easy-vqa)")
    return Path(spec.origin).parent / "data"


class EasyVqa(Source):
    """The images of a split, in order, each with all of its questions, behind `system` if it is given."""

    def __init__(self, split: str, system: str = ""):
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        self.name = f"easy_vqa:{split}"
        self._system = (Turn("system", system),) if system else ()
        self._folder = folder() / split
        self._questions: dict[int, list[tuple[str, str]]] = {}
        for question, answer, image in json.loads((self._folder / "questions.json").read_text()):
            self._questions.setdefault(image, []).append((question, answer))
        self._images = sorted(self._questions)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Example:
        image = self._images[index]
        turns = [turn for q, a in self._questions[image] for turn in (Turn("user", q), Turn("assistant", a))]
        return Example(str(image), (self._folder / "images" / f"{image}.png",), (*self._system, *turns))


class Captions(Source):
    """Images and captions such as "blue circle", made of the answers to the questions about colour and shape: the data
    of LLaVA's first stage. Images without both have none.
    """

    def __init__(self, split: str):
        questions, self._captions, self.name = EasyVqa(split), [], f"easy_vqa_captions:{split}"
        for number in range(len(questions)):
            example = questions[number]
            found = {kind_of(turn.text): turn.text for turn in example.turns[1::2]}
            if {"colour", "shape"} <= set(found):
                answer = Turn("assistant", f" {found['colour']} {found['shape']}")
                self._captions.append(example._replace(turns=(Turn("user", IMAGE_MARKER), answer)))

    def __len__(self) -> int:
        return len(self._captions)

    def __getitem__(self, index: int) -> Example:
        return self._captions[index]
