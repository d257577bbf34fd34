"""Evaluation of a model on all questions of a task: sums on the device, ratios on the host."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from vlm_jax.data.pipeline import Questions
from vlm_jax.evaluation import clusters, scoring
from vlm_jax.inference import sampling
from vlm_jax.models.vlm import Vlm
from vlm_jax.ops.cross_entropy import token_scores


class Result(NamedTuple):
    """Errors of one task as (value, standard error), and counts."""

    error: tuple[float, float]
    exact: tuple[float, float]
    forced: tuple[float, float]
    forced_nll: float
    images: int
    questions: int
    question_tokens: float  # mean
    answer_tokens: float  # mean, without eos


def make_evaluate(model: Vlm, max_new_tokens: int, eos_id: int) -> Callable[[Any, Questions], scoring.Score]:
    """`(params, batch) -> Score` per row: one prefill, then greedy decoding and teacher-forced scoring of the answer.
    The decoder is unrolled.
    """

    def evaluate(params: Any, batch: Questions) -> scoring.Score:
        answer = jnp.maximum(batch.answer, 0)
        prefilled = sampling.prefill(model, params, batch.inputs, max(max_new_tokens, answer.shape[1]))
        length = max_new_tokens
        generated, _ = sampling.sample(model, params, prefilled, sampling.greedy, (eos_id,), length, length)
        forced = sampling.continuation(answer[:, :-1], prefilled.cache, batch.answer[:, :-1] >= 0)
        hidden, _ = model.forward(params, forced, prefilled.cache)
        hidden = jnp.concatenate([prefilled.hidden, hidden], axis=1)
        head = model.head(params)
        nll, hits = token_scores(hidden, head.table, head.softcap, answer)
        return scoring.score(nll, hits, generated, batch.answer, eos_id)

    return evaluate


class QuestionScores(NamedTuple):
    """Scores of the rows of an evaluation, in order; padding rows have the example -1."""

    scores: scoring.Score
    example: Int[np.ndarray, " n"]
    question_tokens: Int[np.ndarray, " n"]


def run(
    evaluate: Callable[[Any, Any], scoring.Score],
    put: Callable[[Any], Any],
    params: Any,
    batches: Iterable[Questions],
    on_batch: Callable[[int], None] = lambda rows: None,
    fetch: Callable[[Any], np.ndarray] = np.asarray,
) -> QuestionScores:
    """Evaluates host `batches`; `on_batch` is called with the number of rows after each dispatch. `put` shards a
    process's rows, `fetch` gathers the rows of all processes.
    """
    scores, counts = [], []
    for batch in batches:
        scores.append(evaluate(params, put(batch)))
        text = (batch.inputs.segment != 0) & (batch.inputs.visual < 0)
        counts.append(put((batch.example, np.sum(text, axis=1))))
        on_batch(len(batch.example))
    columns = jax.tree.map(fetch, list(zip(scores, counts, strict=True)))
    rows = scoring.Score(*(np.concatenate(parts) for parts in zip(*(score for score, _ in columns), strict=True)))
    return QuestionScores(
        rows, *(np.concatenate(parts) for parts in zip(*(count for _, count in columns), strict=True))
    )


def summarise(questions: QuestionScores) -> Result:
    """Errors over all questions, with standard errors over examples."""
    rows, example, question_tokens = questions
    valid = example >= 0
    return Result(
        error=clusters.ratio(rows.wrong, rows.tokens, example),
        exact=clusters.ratio(rows.inexact, rows.valid, example),
        forced=clusters.ratio(rows.forced_wrong, rows.tokens, example),
        forced_nll=clusters.ratio(rows.nll, rows.tokens, example)[0],
        images=len(np.unique(example[valid])),
        questions=int(valid.sum()),
        question_tokens=float(question_tokens[valid].mean()),
        answer_tokens=float(rows.tokens[valid].mean()),
    )
