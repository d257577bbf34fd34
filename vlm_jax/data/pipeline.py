"""From a `Split` to batches: Grain orders the examples, one vectorised function packs them.

Promises:
  * every epoch is a permutation of the examples, the same for any number of processes: each of them draws the whole
    order, which is numbers only, and packs the rows of the global batch that its devices hold;
  * which questions are asked depends on the seed and the number of the batch alone;
  * the cursor that comes with a batch resumes with the next one, however far the threads have read ahead.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from jaxtyping import Int

from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import DataSpec, EvaluationSpec
from vlm_jax.core.structs import Inputs, Views, Visual
from vlm_jax.data.sources import Split
from vlm_jax.ops import masks

Cursor = dict[str, Any]  # Grain's iterator state; JSON can hold it
Features = Callable[[Int[np.ndarray, " B"]], Visual]
Rows = Int[np.ndarray, " b"] | None  # of the global batch; None: all of them

_READ_AHEAD = grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)


class RowLayout(NamedTuple):
    """What of the model decides how a row is laid out."""

    visual_tokens: int  # V
    mask: str = "causal"  # or "prefix": image and question see each other both ways
    reads_question: bool = False  # each question has a view of its own, which carries it
    shares_image: bool = False  # the image stands in front of all questions once, else in front of each


class Questions(NamedTuple):
    """A batch to be evaluated: one question a row, and its answer."""

    inputs: Inputs  # up to the end of the question
    answer: Int[np.ndarray, "B A"]  # with its end token, padded with -1
    example: Int[np.ndarray, " B"]  # index of the example in its split, -1 where the row only fills the batch


def pack(
    split: Split,
    example: Int[np.ndarray, " B"],
    chosen: Int[np.ndarray, "B k"],
    layout: RowLayout,
    text_tokens: int,
    answers: bool = True,
) -> Inputs:
    """Rows without their views: each chosen question of an example is a segment of its own, if wanted with its answer
    behind. The image's V tokens stand in front of each, a row then has k V + T tokens, or once in front of all: V + T.

    Rows whose example is -1 stay empty. Raises `UserError` where the text of a row is longer than `text_tokens`.
    """
    visual, count, shared = layout.visual_tokens, chosen.shape[1], layout.visual_tokens * layout.shares_image
    filler = example < 0
    rows = np.where(filler, 0, example)[:, None]
    question, answer = split.question_lengths[rows, chosen], split.answer_lengths[rows, chosen] * answers
    text = np.where(filler[:, None], 0, question + answer)
    if text.size and (needed := int(text.sum(axis=1).max())) > text_tokens:
        raise UserError(
            f"data.text_tokens: expected at least {needed} for {count} questions of {split.name}, got {text_tokens}: "
            f"set it to {longest_row(split, count)}, or pack fewer questions"
        )
    length = np.where(filler[:, None], 0, visual - shared + text)
    ends = shared + np.cumsum(length, axis=1)
    at = np.arange(shared + count * (visual - shared) + text_tokens)
    # Segment s covers [ends[s-1], ends[s]): the number of ends at or before a slot is the segment it lies in.
    nth = (at[None, :, None] >= ends[:, None, :]).sum(axis=2)
    in_front = (at < shared) & ~filler[:, None]
    real = (nth < count) & ~((at < shared) & filler[:, None])
    which = np.where(real, nth, 0)
    position = np.where(
        real, np.where(at < shared, at, at - np.take_along_axis(ends - length, which, axis=1) + shared), 0
    )
    question, length = (np.take_along_axis(a, which, axis=1) for a in (question, shared + length))
    picked = np.take_along_axis(chosen, which, axis=1)
    in_text = position - visual
    is_visual, asked = real & (in_text < 0), real & (in_text < question)
    token = np.where(
        asked,
        split.question_tokens[rows, picked, np.clip(in_text, 0, split.question_tokens.shape[2] - 1)],
        split.answer_tokens[rows, picked, np.clip(in_text - question, 0, split.answer_tokens.shape[2] - 1)],
    )
    learned = real & (in_text >= question - 1) & (position < length - 1)
    return Inputs(
        tokens=np.where(real & ~is_visual, token, 0).astype(np.int32),
        segment=np.where(in_front, masks.SHARED, np.where(real, nth + 1, 0)).astype(np.int32),
        position=position.astype(np.int32),
        order=np.where(asked & (layout.mask == "prefix"), 0, position).astype(np.int32),
        visual=np.where(is_visual, position + visual * which * layout.reads_question, -1).astype(np.int32),
        weight=learned.astype(np.float32) if answers else None,
    )


def _views(
    split: Split, example: np.ndarray, chosen: np.ndarray, layout: RowLayout, features: Features | None
) -> Views | None:
    """One view a row; of compressors that read the question, one for each question."""
    if not layout.visual_tokens:
        return None
    shown, count, question = np.maximum(example, 0), 1, None
    if layout.reads_question:
        count, question = chosen.shape[1], split.bare_questions[shown[:, None], chosen]

    def repeated(leaf: np.ndarray) -> np.ndarray:
        return np.repeat(leaf[:, None], count, axis=1)

    if features is None:
        return Views(pixels=repeated(split.images(shown)), question=question)
    return Views(features=jax.tree.map(repeated, features(shown)), question=question)


def longest_row(split: Split, questions: int) -> int:
    """The T that holds any `questions` questions of one example, with their answers."""
    pairs = np.sort(split.question_lengths + split.answer_lengths, axis=1)
    return int(pairs[:, -questions:].sum(axis=1).max())


def _chosen_rows(rows: Rows) -> Any:
    return slice(None) if rows is None else rows


def check(split: Split, questions: int) -> None:
    """Raises `UserError` where batches of that many questions cannot be made of the split."""
    if not 1 <= questions <= split.questions_per_example:
        raise UserError(
            f"questions_per_example: expected 1 to {split.questions_per_example}, the questions that {split.name} has "
            f"for each image, got {questions}"
        )


def check_training(split: Split, spec: DataSpec) -> None:
    """Raises `UserError` where training batches cannot be made, or their packed rows would not fit in T."""
    questions = spec.questions_per_example
    check(split, questions)
    if (needed := longest_row(split, questions)) > spec.text_tokens:
        raise UserError(
            f"data.text_tokens: expected at least {needed} for {questions} questions of {split.name}, got "
            f"{spec.text_tokens}: set it to {needed}, or pack fewer questions"
        )


def train_batches(
    split: Split,
    spec: DataSpec,
    seed: int,
    layout: RowLayout,
    cursor: Cursor | None = None,
    features: Features | None = None,
    rows: Rows = None,
) -> Iterator[tuple[Inputs, Cursor]]:
    """Batches without end, each with the cursor that resumes after it, whatever the number of processes.

    `features(indices)` gives stored encoder features; without it the views carry pixels. `rows` are those of the
    global batch that are wanted. Raises `UserError` where the spec asks for what the split cannot give.
    """
    questions, mine = spec.questions_per_example, _chosen_rows(rows)
    check_training(split, spec)

    def make(step: int, example: np.ndarray) -> Inputs:
        rng = np.random.default_rng([seed, step])
        order = np.argsort(rng.random((spec.batch_examples, split.questions_per_example)), axis=1)
        example, chosen = example[mine].astype(np.int32), order[mine, :questions]
        inputs = pack(split, example, chosen, layout, spec.text_tokens)
        return inputs._replace(views=_views(split, example, chosen, layout, features))

    iterator = iter(_drawn(split, spec, seed).map_with_index(make).to_iter_dataset(_READ_AHEAD))
    if cursor is not None:
        iterator.set_state(dict(cursor))
    for batch in iterator:
        yield batch, iterator.get_state()


def _drawn(split: Split, spec: DataSpec, seed: int) -> grain.MapDataset:
    """The examples of every global batch."""
    examples = grain.MapDataset.range(split.examples).shuffle(seed=seed).repeat()
    return examples.batch(spec.batch_examples, drop_remainder=True)


def drawn_ids(split: Split, spec: DataSpec, seed: int, step: int) -> tuple[str, ...]:
    """Ids of the examples in the batch of a training step, counted from 1."""
    return tuple(split.ids[i] for i in _drawn(split, spec, seed)[step - 1])


def evaluation_batches(
    split: Split,
    evaluation: EvaluationSpec,
    layout: RowLayout,
    features: Features | None = None,
    rows: Rows = None,
    examples: int | None = None,
) -> Iterator[Questions]:
    """One question a row, in a fixed order. Rows that only fill the last batch have the example -1.

    The first `examples` images (None: `evaluation.examples`; 0: all) are asked `questions_per_example` questions each;
    image i is asked numbers i q, i q + 1, ... modulo K, so that over the images all K stored questions are asked
    equally often. `rows` are those of the global batch that are wanted.
    """
    questions, mine = evaluation.questions_per_example, _chosen_rows(rows)
    check(split, questions)
    example, chosen = _asked(split, evaluation, evaluation.examples if examples is None else examples)
    longest = int(split.question_lengths.max())

    def make(step: int) -> Questions:
        batch = slice(step * evaluation.batch_examples, (step + 1) * evaluation.batch_examples)
        shown, which = example[batch][mine], chosen[batch, None][mine]
        inputs = pack(split, shown, which, layout, longest, answers=False)
        inputs = inputs._replace(views=_views(split, shown, which, layout, features))
        tokens = split.answer_tokens[np.maximum(shown, 0), which[:, 0]]
        length = np.where(shown < 0, 0, split.answer_lengths[np.maximum(shown, 0), which[:, 0]])
        answer = np.where(np.arange(tokens.shape[1]) < length[:, None], tokens, -1)
        return Questions(inputs, answer.astype(np.int32), shown)

    steps = len(example) // evaluation.batch_examples
    yield from grain.MapDataset.range(steps).map(make).to_iter_dataset(_READ_AHEAD)


def _asked(split: Split, evaluation: EvaluationSpec, examples: int) -> tuple[np.ndarray, np.ndarray]:
    """(example, number of the question) of every row, filled up to whole batches."""
    pairs = np.arange(min(examples or split.examples, split.examples) * evaluation.questions_per_example)
    fill = (0, -len(pairs) % evaluation.batch_examples)
    example = np.pad(pairs // evaluation.questions_per_example, fill, constant_values=-1).astype(np.int32)
    return example, np.pad(pairs % split.questions_per_example, fill)
