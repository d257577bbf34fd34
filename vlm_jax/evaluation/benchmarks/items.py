"""The items of a benchmark, and what a benchmark is.

A benchmark's file has `read` (files -> items with prompts), and where the defaults here do not fit, `parts` (how item
scores make the score), `sub_scores`, `fails` (unreadable answers) and `baselines`.
"""

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vlm_jax.evaluation.clusters import Share
from vlm_jax.evaluation.metrics import yes_no

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
PROMPTS = ("llava", "lmms-eval")


@dataclass(frozen=True)
class SuiteOptions:
    """What papers choose differently; recorded with every score. `suites.VALUES` lists the values."""

    prompt: str  # "llava", "lmms-eval": whose prompts and answer lengths
    flavour: str  # of `evaluation.metrics`
    system: str = "none"  # "vicuna_v1": LLaVA's system prompt before the question
    mme: str = "perception"  # of 2000; or "all", of 2800
    pope: str = "f1"  # mean F1 of the three subsets; or "accuracy", or "random_accuracy" (of the random subset)
    ocr_tokens: str = "none"  # "given": TextVQA's prompt lists the strings that an OCR system read
    scienceqa: str = "image"  # questions with an image; or "all"
    seed: str = "image"  # questions about images; or "all"
    new_tokens: int = 0  # longest answer; 0: that of the prompt style for each benchmark


class ParquetImage(NamedTuple):
    """An image in a parquet file, read when it is needed (`files.read_image`)."""

    path: Path
    row: int
    column: str
    index: int = 0  # in a list of images


Image = Path | bytes | ParquetImage


class Item(NamedTuple):
    """One question."""

    id: str  # unique in its benchmark
    question_id: str  # of the source; with the prompt it identifies an answer
    prompt: str  # the user's text
    references: tuple[str, ...]  # () where the publisher keeps them
    images: tuple[Image, ...]
    image_id: str  # questions with one image_id are a cluster of the standard error
    groups: tuple[str, ...] = ()  # "kind/group", for sub-scores
    extra: Mapping[str, Any] = {}  # fields that the metric reads


class Loaded(NamedTuple):
    """The items of a split, and where they come from."""

    split: str
    layout: str
    items: list[Item]


class Answered(NamedTuple):
    """An item with the model's answer and its score in [0, 1]."""

    item: Item
    text: str
    score: float


def item_parts(answers: Sequence[Answered], options: SuiteOptions) -> list[Share]:
    """Plain mean of the item scores."""
    return [Share(answer.score, 1.0, answer.item.image_id) for answer in answers]


def group_means(answers: Sequence[Answered], options: SuiteOptions) -> dict[str, float]:
    """The mean score of each group."""
    sums: dict[str, list[float]] = {}
    for answer in answers:
        for group in answer.item.groups:
            sums.setdefault(group, []).append(answer.score)
    return {name: sum(values) / len(values) for name, values in sorted(sums.items())}


def is_empty(item: Item, text: str, options: SuiteOptions) -> bool:
    """Free-form answers cannot be read only if there is none."""
    return not text.strip()


def is_neither(item: Item, text: str, options: SuiteOptions) -> bool:
    """Neither of the words yes and no, or both, whatever the flavour makes of it."""
    return yes_no.word_label(text) == "Unknown"


def no_baselines(items: Sequence[Item], options: SuiteOptions) -> dict[str, float]:
    return {}


class Benchmark(NamedTuple):
    """How a benchmark is read, asked and scored."""

    name: str
    metric: str  # a name of `metrics.RULES`
    read: Callable[[Path, SuiteOptions], Loaded]  # raises UserError for files that are missing or do not match
    new_tokens: Mapping[str, int]  # by prompt style
    sizes: tuple[int, ...]  # numbers of questions of the official splits
    fails: Callable[[Item, str, SuiteOptions], bool] = is_empty  # whether an answer cannot be read
    parts: Callable[[Sequence[Answered], SuiteOptions], list[Share]] = item_parts
    sub_scores: Callable[[Sequence[Answered], SuiteOptions], dict[str, float]] = group_means
    baselines: Callable[[Sequence[Item], SuiteOptions], dict[str, float]] = no_baselines  # chance, prior, published


def lettered(choices: Sequence[str]) -> str:
    """ "A. cat\\nB. dog"."""
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(string.ascii_uppercase, choices, strict=False))


def letter_chance(items: Sequence[Item], options: SuiteOptions) -> dict[str, float]:
    """Chance of a random letter: the mean of 1 / options."""
    return {"chance": sum(1 / max(len(item.extra["options"]), 1) for item in items) / len(items)}


def without(text: str, *suffixes: str) -> str:
    """The text without these suffixes, in order, and surrounding white space."""
    for suffix in suffixes:
        text = text.strip().removesuffix(suffix.strip())
    return text.strip()
