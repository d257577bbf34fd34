"""The harness adds up rows; how they were batched does not matter."""

import jax
import numpy as np
import pytest

from tests import builders
from vlm_jax.core.structs import Batch
from vlm_jax.evaluation import harness, scoring
from vlm_jax.models.vlm import Vlm


def rows_of(batch: Batch, size: int) -> list[Batch]:
    """The rows in batches of `size`, the last filled up with rows of example -1 that hold nothing."""
    fill = -len(batch.example) % size
    padded = jax.tree.map(lambda x: np.pad(x, ((0, fill),) + ((0, 0),) * (x.ndim - 1)), batch)
    padded.example[len(batch.example) :] = -1
    count = len(padded.example)
    return [jax.tree.map(lambda x, i=i: x[i : i + size], padded) for i in range(0, count, size)]


def test_a_score_does_not_depend_on_the_batch() -> None:
    """Six questions on three images in batches of one and of four (two rows to fill): the same result, to rounding."""
    model = Vlm(builders.model("pool"), builders.COMPUTE)
    params = builders.params(model)
    batch = builders.batch(rows=6, questions=1)
    batch = batch._replace(example=np.arange(6, dtype=np.int32) // 2)
    heard: list[int] = []
    program = jax.jit(harness.make_evaluate(model, 3, end=1))
    apart, together = (harness.run(program, lambda b: b, params, rows_of(batch, size), heard.append) for size in (1, 4))
    assert heard == [1] * 6 + [4] * 2
    for name in harness.Result._fields:
        assert getattr(apart, name) == pytest.approx(getattr(together, name), rel=1e-5), name
    assert (apart.images, apart.questions) == (3, 6)
    assert apart.forced_nll > 0


def test_means_are_over_questions_and_ratios_over_tokens() -> None:
    """Two batches with hand-made scores; the row of example -1 counts nowhere."""
    scores = [
        scoring.Score(*np.array([[1, 0], [1, 0], [2, 0], [3.0, 1.0], [2, 4], [1, 1]], np.float32)),
        scoring.Score(*np.array([[3, 9], [1, 9], [0, 9], [2.0, 9.0], [3, 9], [1, 9]], np.float32)),
    ]
    examples = ([5, 5], [2, -1])
    asked = ([2, 3], [4, 5])
    batches = [
        Batch(*[np.zeros((2, 6))] * 5, np.arange(6) < np.array(q)[:, None], np.array(e))
        for e, q in zip(examples, asked, strict=True)
    ]  # fmt: skip
    queue = iter(scores)
    result = harness.run(lambda params, batch: next(queue), lambda batch: batch, None, batches)
    assert result.error[0] == pytest.approx((1 + 0 + 3) / (2 + 4 + 3))
    assert result.exact[0] == pytest.approx(2 / 3)
    assert result.forced[0] == pytest.approx((2 + 0 + 0) / 9)
    assert result.forced_nll == pytest.approx((3 + 1 + 2) / 9)
    assert (result.images, result.questions) == (2, 3)
    assert result.question_tokens == pytest.approx((2 + 3 + 4) / 3)
    assert result.answer_tokens == pytest.approx(9 / 3)
