"""Every question of a task through the model; sums on the device, one ratio at the end."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from vlm_jax.core.structs import Batch
from vlm_jax.evaluation import generate, scoring
from vlm_jax.models.vlm import Vlm


class Result(NamedTuple):
    """Errors of one task as (value, standard error) pairs, and the counts behind them."""

    error: tuple[float, float]
    exact: tuple[float, float]
    forced: tuple[float, float]
    forced_nll: float
    images: int
    questions: int
    question_tokens: float  # mean
    answer_tokens: float  # mean, the end token left out


def make_evaluate(model: Vlm, max_new_tokens: int, end: int) -> Callable[[Any, Batch], scoring.Score]:
    """`(params, batch) -> Score` per row: teacher-forced logits and greedy decoding in one program."""

    def evaluate(params: Any, batch: Batch) -> scoring.Score:
        generated = generate.greedy(model, params, batch, max_new_tokens, end)
        return scoring.score(model.forward(params, batch), generated, batch, end)

    return evaluate


def run(
    evaluate: Callable[[Any, Any], scoring.Score],
    put: Callable[[Any], Any],
    params: Any,
    batches: Iterable[Batch],
    on_batch: Callable[[int], None] = lambda rows: None,
    fetch: Callable[[Any], np.ndarray] = np.asarray,
) -> Result:
    """`batches` hold one question a row, on the host; `on_batch` hears how many rows were handed to the device.

    Of several processes each puts rows of its own, and `fetch` brings those of all of them back in one order.
    """
    scores, asked = [], []
    for batch in batches:
        scores.append(evaluate(params, put(batch)))
        asked.append(put((batch.example, np.sum(batch.question, axis=1))))
        on_batch(len(batch.example))
    columns = jax.tree.map(fetch, list(zip(scores, asked, strict=True)))
    rows = scoring.Score(*(np.concatenate(parts) for parts in zip(*(score for score, _ in columns), strict=True)))
    example, question_tokens = (np.concatenate(parts) for parts in zip(*(own for _, own in columns), strict=True))
    valid = example >= 0
    return Result(
        error=scoring.ratio(rows.wrong, rows.tokens, example),
        exact=scoring.ratio(rows.inexact, rows.valid, example),
        forced=scoring.ratio(rows.forced_wrong, rows.tokens, example),
        forced_nll=scoring.ratio(rows.nll, rows.tokens, example)[0],
        images=len(np.unique(example[valid])),
        questions=int(valid.sum()),
        question_tokens=float(question_tokens[valid].mean()),
        answer_tokens=float(rows.tokens[valid].mean()),
    )
