"""Evaluation of a model on all questions of a task: sums on the device, ratios on the host."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.core.structs import Cache
from vlm_jax.data.pipeline import Questions
from vlm_jax.evaluation import clusters, scoring
from vlm_jax.inference import sampling
from vlm_jax.models.vlm import Vlm
from vlm_jax.ops.cross_entropy import token_scores

_PIECE = 8  # answer tokens that are scored at once, at most


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
        room = max(max_new_tokens, batch.answer.shape[1] + _PIECE)
        prefilled = sampling.prefill(model, params, batch.inputs, room)
        nll, hits, cache = teacher_forced(model, params, prefilled, batch.answer)
        prefilled = prefilled._replace(cache=_rewound(cache, prefilled.cache))
        counted = (batch.answer >= 0) & (batch.answer != eos_id)
        limit = jnp.sum(counted, axis=1)  # later tokens count nowhere
        generated, _ = sampling.sample(model, params, prefilled, sampling.greedy, (eos_id,), limit, max_new_tokens)
        return scoring.score(nll, hits, generated, batch.answer, eos_id)

    return evaluate


def teacher_forced(
    model: Vlm, params: Any, prefilled: sampling.Prefilled, answer: Int[Array, "B A"]
) -> tuple[Float[Array, "B A"], Bool[Array, "B A"], Cache]:
    """Negative log-likelihood and arg-max hits of true answers (padded with -1) after their prompts, and a cache with
    them. Runs in pieces, as many as the longest answer needs.
    """
    head, length = model.head(params), answer.shape[1]
    piece = min(_PIECE, max(length - 1, 1))
    padded = jnp.pad(answer, ((0, 0), (0, -(length - 1) % piece)), constant_values=-1)
    longest = jnp.max(jnp.sum(answer >= 0, axis=1))

    def scores(hidden: Float[Array, "B n D"], targets: Int[Array, "B n"]) -> tuple[Array, Array]:
        return token_scores(hidden, head.table, head.softcap, jnp.maximum(targets, 0))

    def put(array: Array, part: Array, start: Any) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(array, part, start, axis=1)

    def step(state: tuple[Array, Array, Array, Cache]) -> tuple[Array, Array, Array, Cache]:
        start, nll, hits, cache = state
        tokens, targets = (jax.lax.dynamic_slice_in_dim(padded, start + i, piece, axis=1) for i in (0, 1))
        inputs = sampling.continuation(jnp.maximum(tokens, 0), cache, tokens >= 0)
        hidden, cache = model.forward(params, inputs, cache)
        part_nll, part_hits = scores(hidden, targets)
        return start + piece, put(nll, part_nll, start + 1), put(hits, part_hits, start + 1), cache

    first_nll, first_hits = scores(prefilled.hidden, padded[:, :1])
    nll, hits = (put(jnp.zeros(padded.shape, part.dtype), part, 0) for part in (first_nll, first_hits))
    start = (jnp.int32(0), nll, hits, prefilled.cache)
    _, nll, hits, cache = jax.lax.while_loop(lambda state: state[0] < longest - 1, step, start)
    return nll[:, :length], hits[:, :length], cache


def _rewound(cache: Cache, before: Cache) -> Cache:
    """The state `before` of a cache that has been extended, in the arrays of the later one: what was written since is
    masked, and overwritten."""
    later = tuple(_rewound(*pair) for pair in zip(cache.later, before.later, strict=True))
    return before._replace(key=cache.key, value=cache.value, later=later)


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
