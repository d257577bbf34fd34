"""MMBench, dev: single-choice questions, asked again with their options rotated (rows `index` + k 1,000,000).

A question counts if it is answered rightly in all rotations (CircularEval). The official server has ChatGPT read what
no rule reads; here it is wrong.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm_jax.evaluation.benchmarks import mmbench_files
from vlm_jax.evaluation.benchmarks.items import LETTER, Answered, Benchmark, Item, Loaded, SuiteOptions, lettered
from vlm_jax.evaluation.benchmarks.mmbench_files import is_missing
from vlm_jax.evaluation.clusters import Share
from vlm_jax.evaluation.metrics import choices

_ROTATION = 1_000_000


def read(data: Path, options: SuiteOptions) -> Loaded:
    table = mmbench_files.read(data)
    return Loaded(table.split, table.layout, [_item(*row, options) for row in table.rows])


def _item(row: dict[str, Any], images: tuple, image_id: str, options: SuiteOptions) -> Item:
    texts = {letter: str(row[letter]) for letter in "ABCDE" if not is_missing(row.get(letter))}
    hint, question, key = "" if is_missing(row.get("hint")) else row["hint"], row["question"], str(row["index"])
    if options.prompt == "llava":  # up to D, and up to the first option that is missing
        count = next((i for i, letter in enumerate("ABCD") if letter not in texts), 4)
        texts = {letter: texts[letter] for letter in "ABCD"[:count]}
        prompt = f"{hint}\n" * bool(hint) + f"{question}\n{lettered(list(texts.values()))}{LETTER}"
    else:
        listed = "\n".join(f"{letter}. {text}" for letter, text in texts.items())
        prompt = f"{hint} " * bool(hint) + f"{question} There are several options:\n{listed}\n{LETTER}"
    int(key)  # another index has no rotations
    groups = tuple(
        f"{name.lower()}/{row[name]}" for name in ("category", "l2-category", "L2-category") if row.get(name)
    )
    references = () if is_missing(row.get("answer")) else (row["answer"],)
    return Item(key, key, prompt, references, images, image_id, groups, {"options": texts, "row": row})


def _grouped(answers: Sequence[Answered]) -> list[list[Answered]]:
    """The rotations of each question, its first order first."""
    out: dict[int, list[Answered]] = {}
    for answer in sorted(answers, key=lambda answer: int(answer.item.id)):
        out.setdefault(int(answer.item.id) % _ROTATION, []).append(answer)
    return list(out.values())


def parts(answers: Sequence[Answered], options: SuiteOptions) -> list[Share]:
    """A question adds 1 if all its rotations are right."""
    return [Share(min(a.score for a in group), 1.0, group[0].item.image_id) for group in _grouped(answers)]


def sub_scores(answers: Sequence[Answered], options: SuiteOptions) -> dict[str, float]:
    """Circular accuracy by category; `vanilla`: accuracy of the questions in their first order alone."""
    hits: dict[str, list[float]] = {}
    for group in _grouped(answers):
        hits.setdefault("vanilla", []).append(group[0].score)
        for name in group[0].item.groups:
            hits.setdefault(name, []).append(min(answer.score for answer in group))
    return {name: sum(values) / len(values) for name, values in sorted(hits.items())}


def fails(item: Item, text: str, options: SuiteOptions) -> bool:
    read_letter = choices.mmbench_static if options.flavour == "lmms-eval" else choices.mmbench
    return read_letter(text, item.extra["options"]) in (None, "Z")


def baselines(items: Sequence[Item], options: SuiteOptions) -> dict[str, float]:
    """A question of n options asked in k rotations is answered rightly by chance with (1 / n)^k."""
    groups = _grouped([Answered(item, "", 0.0) for item in items])
    return {"chance": sum(math.prod(1 / len(a.item.extra["options"]) for a in group) for group in groups) / len(groups)}


_NEW_TOKENS = {"llava": 1024, "lmms-eval": 1024}
MMBENCH = Benchmark("mmbench", "mmbench", read, _NEW_TOKENS, (4377, 4329), fails, parts, sub_scores, baselines)
