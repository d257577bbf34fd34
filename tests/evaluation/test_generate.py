"""Greedy decoding with a cache against a naive loop that runs the whole model again for every token."""

import jax
import numpy as np
import pytest

from tests import builders
from vlm_jax.core.structs import Batch
from vlm_jax.evaluation import generate
from vlm_jax.models.vlm import Vlm

NEW = 5
QUESTIONS = (2, 3, 5, 1)  # tokens of each row's question
LENGTH = max(QUESTIONS) + NEW

CASES = {
    "causal": dict(compressor="resampler"),
    "prefix": dict(compressor="pool", mask="prefix", qk_norm=True),
    "window": dict(compressor="quecc", window=3, window_pattern=2, sandwich_norm=True, logit_softcap=3.0),
    "blind": dict(compressor="blind", tokens=0),
}


def questions(answers: np.ndarray) -> Batch:
    """One question a row, of different lengths, and behind each the given tokens as its true answer."""
    rng = np.random.default_rng(3)
    rows = len(QUESTIONS)
    asked = np.array(QUESTIONS)[:, None]
    at = np.arange(LENGTH)[None, :]
    question = at < asked
    real = at < asked + answers.shape[1]
    place = np.clip(at - asked, 0, answers.shape[1] - 1)
    text = np.where(question, rng.integers(2, 32, (rows, LENGTH)), np.take_along_axis(answers, place, axis=1))
    return Batch(
        text=np.where(real, text, 0).astype(np.int32),
        target=np.zeros((rows, LENGTH), np.int32),
        weight=np.zeros((rows, LENGTH), np.float32),
        segment=real.astype(np.int32),
        position=np.where(real, at, 0).astype(np.int32),
        question=question,
        example=np.arange(rows, dtype=np.int32),
        image=rng.integers(0, 256, (rows, 16, 16, 3)).astype(np.uint8),
    )


def naive(model: Vlm, params: dict, batch: Batch) -> np.ndarray:
    """Row by row: the question and what was said so far through the full forward pass, once for every token."""
    forward = jax.jit(model.forward)
    out = []
    for row, asked in enumerate(QUESTIONS):
        said = batch.text[row, :asked].tolist()
        for _ in range(NEW):
            real = np.arange(LENGTH) < len(said)
            alone = batch._replace(
                text=np.pad(said, (0, LENGTH - len(said))).astype(np.int32)[None],
                segment=real.astype(np.int32)[None],
                position=np.where(real, np.arange(LENGTH), 0).astype(np.int32)[None],
                question=batch.question[row, None],
                **{f: getattr(batch, f)[row, None] for f in ("target", "weight", "example", "image")},
            )
            said.append(int(np.argmax(forward(params, alone)[0, len(said) - 1])))
        out.append(said[asked:])
    return np.array(out)


@pytest.mark.parametrize("case", CASES)
def test_greedy_equals_the_naive_loop(case: str) -> None:
    """Every row as if it were alone and without its answer; behind the end token, nothing but end tokens."""
    model = Vlm(builders.model(**CASES[case]), builders.COMPUTE)
    params = builders.params(model)
    free = naive(model, params, questions(np.full((4, 3), 7)))
    end = int(free[1, 2])  # so that at least one row ends early
    wanted = free.copy()
    for row in wanted:
        if end in row:
            row[row.tolist().index(end) :] = end
    assert len(np.unique(free)) > 3  # a decoder that repeats one word would prove little
    greedy = jax.jit(lambda params, batch: generate.greedy(model, params, batch, NEW, end))
    np.testing.assert_array_equal(greedy(params, questions(np.full((4, 3), 9))), wanted)
