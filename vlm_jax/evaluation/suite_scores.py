"""Scores of a suite's answers: scores.json, and one result row a benchmark and one of the mean."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vlm_jax.core.errors import UserError
from vlm_jax.core.rows import ResultRow
from vlm_jax.evaluation import metrics, suites
from vlm_jax.evaluation.answers import Answer
from vlm_jax.evaluation.benchmarks.items import Answered, Benchmark, Loaded, SuiteOptions
from vlm_jax.evaluation.clusters import Share, mean_of_ratios
from vlm_jax.evaluation.suites import Suite


class BenchmarkScore(NamedTuple):
    """Scores are fractions in [0, 1]; `sub_scores` are in the publisher's units."""

    benchmark: str
    split: str
    layout: str
    questions: int
    images: int
    official_questions: tuple[int, ...]  # of the official splits: another number means a part
    score: float | None  # None: the answers are hidden, see submissions/
    stderr: float | None
    exact_error: float | None
    exact_stderr: float | None
    parse_failures: float
    unanswered: int  # prompts that are longer than the model's context; they count as ""
    sub_scores: dict[str, float]
    baselines: dict[str, float]


def score(benchmark: Benchmark, loaded: Loaded, answers: Mapping[str, Answer], options: SuiteOptions) -> BenchmarkScore:
    """The score of all items. Raises `UserError` if one has no answer."""
    items = loaded.items
    if missing := [item.id for item in items if item.id not in answers]:
        raise UserError(
            f"{benchmark.name}: {len(missing)} of {len(items)} questions have no answer, the first is {missing[0]!r}"
            " (evaluate without --rescore, or with the --limit of the answers)"
        )
    texts = [answers[item.id].text.strip() for item in items]
    fails = sum(benchmark.fails(item, text, options) for item, text in zip(items, texts, strict=True))
    out = BenchmarkScore(
        benchmark.name, loaded.split, loaded.layout, len(items), len({item.image_id for item in items}),
        benchmark.sizes, None, None, None, None, fails / len(items),
        sum(bool(answers[item.id].note) for item in items), {}, benchmark.baselines(items, options),
    )  # fmt: skip
    if not any(item.references for item in items):
        return out
    answered = [
        Answered(
            item, text, metrics.score(benchmark.metric, text, list(item.references), options.flavour, **item.extra)
        )
        for item, text in zip(items, texts, strict=True)
    ]
    parts = benchmark.parts(answered, options)
    if not parts:
        raise UserError(f"{benchmark.name}: expected questions that its score counts, got none (a larger --limit)")
    value, stderr = mean_of_ratios(parts)
    exact = mean_of_ratios([Share(float(a.score < 1), 1.0, a.item.image_id) for a in answered])
    return out._replace(
        score=value, stderr=_finite(stderr), exact_error=exact[0], exact_stderr=_finite(exact[1]),
        sub_scores=benchmark.sub_scores(answered, options),
    )  # fmt: skip


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def mean(suite: Suite, scores: Sequence[BenchmarkScore]) -> tuple[float, float] | None:
    """(mean score, its standard error, benchmarks being independent); None for a part of the suite, hidden answers, or
    single images.
    """
    if suite.is_part or any(one.score is None or one.stderr is None for one in scores):
        return None
    stderr = math.sqrt(sum(one.stderr**2 for one in scores)) / len(scores)  # type: ignore[operator]
    return sum(one.score for one in scores) / len(scores), stderr  # type: ignore[misc]


def rows(
    suite: Suite,
    scores: Sequence[BenchmarkScore],
    model: Mapping[str, Any],
    costs: Mapping[str, Mapping[str, float]],
    limit: int,
) -> list[ResultRow]:
    """Result rows of the benchmarks with a score and a standard error, then of the suite's mean if there is one.

    Args:
        model: the row's fields about the model (`cell`, `model`, `llm_params`, ...).
        costs: its fields about tokens and FLOPs, by benchmark.
    """  # fmt: skip
    out = []
    for one in scores:
        if one.score is None or one.stderr is None or one.exact_stderr is None:
            continue
        fields = {
            "family": one.benchmark, "task": f"{one.benchmark}:{one.split}", "error": 1 - one.score,
            "stderr": one.stderr, "exact_error": one.exact_error, "exact_stderr": one.exact_stderr,
            "images": one.images, "questions": one.questions, "parse_failures": one.parse_failures,
            **costs[one.benchmark],
        }  # fmt: skip
        out.append(_row(suite, model, fields, limit))
    total = mean(suite, scores)
    if total is None:
        return out
    names = [field.name for field in dataclasses.fields(ResultRow)]
    averaged = [n for n in (*costs[scores[0].benchmark], "exact_error", "parse_failures") if n in names]
    fields = {
        "family": suite.name, "task": f"mean of {', '.join(suite.benchmarks)}", "error": 1 - total[0],
        "stderr": total[1], "exact_stderr": math.sqrt(sum(row.exact_stderr**2 for row in out)) / len(out),
        "images": sum(row.images for row in out), "questions": sum(row.questions for row in out),
        **{name: sum(getattr(row, name) for row in out) / len(out) for name in averaged},
    }  # fmt: skip
    return [*out, _row(suite, model, fields, limit)]


def _row(suite: Suite, model: Mapping[str, Any], fields: Mapping[str, Any], limit: int) -> ResultRow:
    unmeasured = dict.fromkeys(("forced_error", "forced_stderr", "forced_nll"))
    options = suites.described(suite.options)
    identity = [model["params_sha256"], model["visual_tokens"], suite.name, fields["task"], options, limit]
    spec_hash = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    return ResultRow(**{**unmeasured, **model, **fields}, spec_hash=spec_hash, options=options, limit=limit)
