"""The harness adds up rows; how they were batched does not matter, and its answers are `sample`'s."""

import jax
import numpy as np
import pytest

from tests import builders
from vlm_jax.core.structs import Inputs
from vlm_jax.data.pipeline import Questions
from vlm_jax.evaluation import harness, scoring
from vlm_jax.inference import sampling
from vlm_jax.models.decoder import unstack_layers
from vlm_jax.models.vlm import Vlm

END = 1
LAST = 6  # position of the last token of each question


def model_and_params() -> tuple[Vlm, dict]:
    model = Vlm(builders.model("pool"), builders.compute(scan_layers=False))
    return model, builders.params(model)


def questions(rows: int) -> Questions:
    """Rows of one question each, with answers of three tokens and the end."""
    inputs = builders.inputs(rows=rows, questions=1)
    prompt = inputs._replace(weight=None, **{f: getattr(inputs, f)[:, :LAST] for f in inputs._fields[:5]})
    answer = np.pad(inputs.tokens[:, LAST : LAST + 3], ((0, 0), (0, 1)), constant_values=END)
    answer[1, 2:] = END, -1
    return Questions(prompt, answer, np.arange(rows, dtype=np.int32) // 2)


def in_batches(whole: Questions, size: int) -> list[Questions]:
    """The rows in batches of `size`, the last filled up with rows of example -1 that hold nothing."""
    fill = -len(whole.example) % size
    padded = jax.tree.map(lambda x: np.pad(x, ((0, fill),) + ((0, 0),) * (x.ndim - 1)), whole)
    padded.example[len(whole.example) :] = -1
    padded.answer[len(whole.example) :] = -1
    count = len(padded.example)
    return [jax.tree.map(lambda x, i=i: x[i : i + size], padded) for i in range(0, count, size)]


def test_a_score_does_not_depend_on_the_batch() -> None:
    """Six questions on three images in batches of one and of four (two rows to fill): the same result, to rounding."""
    model, params = model_and_params()
    sizes: list[int] = []
    program = jax.jit(harness.make_evaluate(model, 3, eos_id=END))
    apart, together = (
        harness.summarise(harness.run(program, lambda b: b, params, in_batches(questions(6), size), sizes.append))
        for size in (1, 4)
    )
    assert sizes == [1] * 6 + [4] * 2
    for name in harness.Result._fields:
        assert getattr(apart, name) == pytest.approx(getattr(together, name), rel=1e-5), name
    assert (apart.images, apart.questions) == (3, 6)
    assert apart.forced_nll > 0
    assert apart.question_tokens == 2


def test_scores_are_those_of_forward_and_of_sample() -> None:
    """From one prefill: forced scores equal the training forward of question and answer in one row, with scanned
    layers, and errors those of the sampler's answers.
    """
    scanned = Vlm(builders.model("pool"), builders.COMPUTE)
    params = builders.params(scanned)
    unrolled = {**params, "decoder": unstack_layers(params["decoder"], 2)}
    model, batch = Vlm(scanned.spec, builders.compute(scan_layers=False)), questions(6)
    score = jax.jit(harness.make_evaluate(model, 4, eos_id=END))(unrolled, batch)
    inputs = builders.inputs(rows=6, questions=1)
    tokens = inputs.tokens.copy()
    tokens[:, LAST : LAST + 4] = np.maximum(batch.answer, 0)
    read = jax.jit(lambda inputs: scanned.logits(params, scanned.forward(params, inputs)[0]))
    logits = np.asarray(read(inputs._replace(tokens=tokens)), np.float64)[:, LAST - 1 : LAST + 3]
    counted = (batch.answer >= 0) & (batch.answer != END)
    truth = np.maximum(batch.answer, 0)
    nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, truth[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(score.nll, (nll * counted).sum(1), rtol=1e-4)
    np.testing.assert_array_equal(score.forced_wrong, ((logits.argmax(-1) != truth) & counted).sum(1))

    @jax.jit
    def sample(inputs: Inputs) -> jax.Array:
        prefilled = sampling.prefill(model, unrolled, inputs, 4)
        return sampling.sample(model, unrolled, prefilled, sampling.greedy, (END,), 4, 4)[0]

    answers = sample(batch.inputs)
    np.testing.assert_array_equal(score.wrong, ((np.asarray(answers) != batch.answer) & counted).sum(1))


def test_long_answers_are_scored_in_pieces() -> None:
    """Answers of 1 to 20 tokens, in pieces of 8: as each alone, whose answer is not padded; to rounding."""
    model, params = model_and_params()
    whole, rng = questions(6), np.random.default_rng(0)
    sizes = np.array([1, 2, 9, 10, 17, 20])
    answer = np.where(np.arange(20) < sizes[:, None], rng.integers(2, 32, (6, 20)), -1).astype(np.int32)
    program = jax.jit(harness.make_evaluate(model, 20, eos_id=END))
    together = program(params, whole._replace(answer=answer))
    for row, size in enumerate(sizes):
        one = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], whole)
        alone = program(params, one._replace(answer=answer[row : row + 1, :size]))
        for name in scoring.Score._fields:
            expected = np.asarray(getattr(alone, name))[0]
            assert getattr(together, name)[row] == pytest.approx(expected, rel=1e-4), (name, size)


def test_no_buffer_holds_the_logits_of_every_position() -> None:
    """Nothing of rows x positions x words numbers, in any order of its axes."""
    model, params = model_and_params()
    batch = questions(6)
    text = jax.jit(harness.make_evaluate(model, 3, eos_id=END)).lower(params, batch).compile().as_text()
    positions = batch.inputs.tokens.shape[1] + batch.answer.shape[1]
    assert f"f32[6,{positions},32]" not in text
    assert f"f32[6,{batch.inputs.tokens.shape[1]},32]" not in text


def test_means_are_over_questions_and_ratios_over_tokens() -> None:
    """Two batches with hand-made scores; the row of example -1 counts nowhere."""
    scores = [
        scoring.Score(*np.array([[1, 0], [1, 0], [2, 0], [3.0, 1.0], [2, 4], [1, 1]], np.float32)),
        scoring.Score(*np.array([[3, 9], [1, 9], [0, 9], [2.0, 9.0], [3, 9], [1, 9]], np.float32)),
    ]
    batches = []
    for example, lengths in (([5, 5], [2, 3]), ([2, -1], [4, 5])):
        inputs = builders.inputs(rows=2, questions=1, visual_tokens=1)._replace(
            segment=(np.arange(7) < np.array(lengths)[:, None] + 1).astype(np.int32)
        )
        batches.append(Questions(inputs, np.zeros((2, 1), np.int32), np.array(example)))
    queue = iter(scores)
    result = harness.summarise(harness.run(lambda params, batch: next(queue), lambda batch: batch, None, batches))
    assert result.error[0] == pytest.approx((1 + 0 + 3) / (2 + 4 + 3))
    assert result.exact[0] == pytest.approx(2 / 3)
    assert result.forced[0] == pytest.approx((2 + 0 + 0) / 9)
    assert result.forced_nll == pytest.approx((3 + 1 + 2) / 9)
    assert (result.images, result.questions) == (2, 3)
    assert result.question_tokens == pytest.approx((2 + 3 + 4) / 3)
    assert result.answer_tokens == pytest.approx(9 / 3)
