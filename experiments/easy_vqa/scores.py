"""Accuracy on easy-VQA by kind of question, of the questions alone and of a trained cell."""

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.easy_vqa.source import KINDS, EasyVqa, kind_of
from experiments.report import markdown_table
from vlm_jax.evaluation import clusters

ALL = "all"
Accuracy = dict[str, tuple[float, float]]  # kind of question -> (accuracy, standard error clustered by image)


class Asked(NamedTuple):
    image: int  # number of its item in the source
    text: str
    answer: str


def questions(source: Any) -> list[Asked]:
    """The questions of a source, in order."""
    found = []
    for image in range(len(source)):
        turns = [turn.text for turn in source[image].turns if turn.role != "system"]
        found += [Asked(image, q, a) for q, a in zip(turns[::2], turns[1::2], strict=True)]
    return found


def by_kind(asked: list[Asked], right: Any) -> Accuracy:
    """`right` is 1 or 0 for each question."""
    right = np.asarray(right, float)
    image, kind = np.array([q.image for q in asked]), np.array([kind_of(q.answer) for q in asked])
    chosen = {ALL: np.ones(len(asked), bool), **{name: kind == name for name in KINDS}}
    return {name: clusters.ratio(right[mask], np.ones(mask.sum()), image[mask]) for name, mask in chosen.items()}


def baselines(test: list[Asked]) -> dict[str, Accuracy]:
    """The most common training answer, and the most common one to the same question."""
    by_question: dict[str, Counter[str]] = defaultdict(Counter)
    overall: Counter[str] = Counter()
    for question in questions(EasyVqa("train")):
        by_question[question.text][question.answer] += 1
        overall[question.answer] += 1
    common = overall.most_common(1)[0][0]
    guesses = {
        "most common answer": [common for _ in test],
        "question alone": [by_question[q.text].most_common(1)[0][0] if by_question[q.text] else common for q in test],
    }
    return {
        name: by_kind(test, [g == q.answer for g, q in zip(guess, test, strict=True)])
        for name, guess in guesses.items()
    }


def trained(workdir: Path) -> tuple[list[Asked], Accuracy]:
    """The test questions of a trained run, in the order that they are asked, and its accuracy."""
    from vlm_jax import build, job
    from vlm_jax.checkpoints.orbax import read_spec
    from vlm_jax.config.resolve import spec_from_dict
    from vlm_jax.core.specs import total_steps
    from vlm_jax.data import pipeline

    spec, cache = spec_from_dict(read_spec(workdir)), build.default_cache()
    build.use_compilation_cache(cache)
    run = build.open_run(spec, cache)
    params = job.restore(run.network, workdir, least_step=total_steps(spec))
    scores = job.make_evaluator(run)(params).scores
    (part,) = run.test.mixture.parts
    pairs = pipeline.evaluation_pairs(run.test, spec.evaluation)
    whole = questions(part.source)  # each is a conversation of its own, and none is skipped
    asked = [whole[number] for number in pairs[:, 1]]
    return asked, by_kind(asked, scores.inexact[: len(asked)] == 0)


def table(found: dict[str, Accuracy]) -> str:
    """Per cent, ± one standard error."""
    lines = [["", ALL, *KINDS]]
    for name, accuracy in found.items():
        cells = [accuracy[kind] for kind in (ALL, *KINDS)]
        lines.append([name, *(f"{100 * value:.1f} ± {100 * error:.1f}" for value, error in cells)])
    return markdown_table(lines)
