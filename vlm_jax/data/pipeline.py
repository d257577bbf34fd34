"""Batches of a `Split`: Grain orders the examples, one vectorised function packs them.

* Every epoch is a permutation of the examples, the same for any number of processes: each computes the order of the
  global batch and packs the rows of its own devices.
* The questions of a batch depend on the seed and the step alone.
* The cursor that comes with a batch resumes with the next one, however many batches were prefetched.
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

Cursor = dict[str, Any]  # Grain's iterator state, JSON-serialisable
Features = Callable[[Int[np.ndarray, " B"]], Visual]
Rows = Int[np.ndarray, " b"] | None  # of the global batch; None: all of them

_PREFETCH = grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)


class RowLayout(NamedTuple):
    """Model settings that decide the layout of a row."""

    visual_tokens: int  # V
    mask: str = "causal"  # or "prefix": bidirectional attention over image and question
    reads_question: bool = False  # the compressor takes the question: one view for each question
    shares_image: bool = False  # one copy of the visual tokens for all questions of a row, else one for each


class Questions(NamedTuple):
    """A batch for evaluation: one question and its answer a row."""

    inputs: Inputs  # up to the end of the question
    answer: Int[np.ndarray, "B A"]  # with its end token, padded with -1
    example: Int[np.ndarray, " B"]  # index of the example in its split, -1 for padding rows


def pack(
    split: Split,
    example: Int[np.ndarray, " B"],
    chosen: Int[np.ndarray, "B k"],
    layout: RowLayout,
    text_tokens: int,
    answers: bool = True,
) -> Inputs:
    """Packed rows without views: one segment for each chosen question of an example, with or without its answer. Each
    segment starts with the V visual tokens, a row of k questions has k V + T tokens; where the image is shared, V + T.

    Rows whose example is -1 are padding. Raises `UserError` where the text of a row is longer than `text_tokens`.
    """
    visual, count = layout.visual_tokens, chosen.shape[1]
    shared = visual if layout.shares_image and count > 1 else 0
    is_padding = example[:, None] < 0
    rows = np.maximum(example, 0)[:, None]
    question, answer = split.question_lengths[rows, chosen], split.answer_lengths[rows, chosen] * answers
    text = np.where(is_padding, 0, question + answer)
    if text.size:
        _check_text_tokens(split, count, text_tokens, int(text.sum(axis=1).max()))
    length = np.where(is_padding, 0, visual - shared + text)
    ends = shared + np.cumsum(length, axis=1)
    slot = np.arange(shared + count * (visual - shared) + text_tokens)
    # Segment s covers [ends[s-1], ends[s]): the number of ends at or before a slot is its segment.
    segment = (slot[None, :, None] >= ends[:, None, :]).sum(axis=2)
    is_shared = (slot < shared) & ~is_padding
    real = (segment < count) & ~((slot < shared) & is_padding)
    index = np.where(real, segment, 0)
    offset = np.take_along_axis(ends - length, index, axis=1) - shared
    position = np.where(real, np.where(slot < shared, slot, slot - offset), 0)
    question, length = (np.take_along_axis(a, index, axis=1) for a in (question, shared + length))
    number = np.take_along_axis(chosen, index, axis=1)
    in_text = position - visual
    is_visual, in_prefix = real & (in_text < 0), real & (in_text < question)
    token = np.where(
        in_prefix,
        split.question_tokens[rows, number, np.clip(in_text, 0, split.question_tokens.shape[2] - 1)],
        split.answer_tokens[rows, number, np.clip(in_text - question, 0, split.answer_tokens.shape[2] - 1)],
    )
    predicts_answer = real & (in_text >= question - 1) & (position < length - 1)
    return Inputs(
        tokens=np.where(real & ~is_visual, token, 0).astype(np.int32),
        segment=np.where(is_shared, masks.SHARED, np.where(real, segment + 1, 0)).astype(np.int32),
        position=position.astype(np.int32),
        order=np.where(in_prefix & (layout.mask == "prefix"), 0, position).astype(np.int32),
        visual=np.where(is_visual, position + visual * index * layout.reads_question, -1).astype(np.int32),
        weight=predicts_answer.astype(np.float32) if answers else None,
    )


def _views(
    split: Split, example: np.ndarray, chosen: np.ndarray, layout: RowLayout, features: Features | None
) -> Views | None:
    """One view a row; one for each question where the compressor reads it."""
    if not layout.visual_tokens:
        return None
    example, count, question = np.maximum(example, 0), 1, None
    if layout.reads_question:
        count, question = chosen.shape[1], split.bare_questions[example[:, None], chosen]

    images = split.images(example) if features is None else features(example)
    images = jax.tree.map(lambda leaf: np.repeat(leaf[:, None], count, axis=1), images)
    return Views(question=question, **{"pixels" if features is None else "features": images})


def longest_row(split: Split, questions: int) -> int:
    """The smallest T for any `questions` questions of one example, with their answers."""
    pairs = np.sort(split.question_lengths + split.answer_lengths, axis=1)
    return int(pairs[:, -questions:].sum(axis=1).max())


def check(split: Split, questions: int) -> None:
    """Raises `UserError` where the split has fewer questions for each image."""
    if not 1 <= questions <= split.questions_per_example:
        raise UserError(
            f"questions_per_example: expected 1 to {split.questions_per_example}, the questions for each image of "
            f"{split.name}, got {questions}"
        )


def check_training(split: Split, spec: DataSpec) -> None:
    """Raises `UserError` where the split has too few questions, or its packed rows are longer than T."""
    check(split, spec.questions_per_example)
    longest = longest_row(split, spec.questions_per_example)
    _check_text_tokens(split, spec.questions_per_example, spec.text_tokens, longest)


def _check_text_tokens(split: Split, questions: int, text_tokens: int, needed: int) -> None:
    if needed > text_tokens:
        raise UserError(
            f"data.text_tokens: expected at least {needed} for {questions} questions of {split.name}, got "
            f"{text_tokens}: set it to {longest_row(split, questions)}, or pack fewer questions"
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
    """Endless batches, each with the cursor that resumes after it, for any number of processes.

    Args:
        features: indices -> stored encoder features; None: the views hold pixels.
        rows: indices into the global batch; None: all.

    Raises `UserError` where the split does not fit the spec.
    """
    check_training(split, spec)
    local = slice(None) if rows is None else rows

    def make(step: int, example: np.ndarray) -> Inputs:
        rng = np.random.default_rng([seed, step])
        order = np.argsort(rng.random((spec.batch_examples, split.questions_per_example)), axis=1)
        example, chosen = example[local].astype(np.int32), order[local, : spec.questions_per_example]
        inputs = pack(split, example, chosen, layout, spec.text_tokens)
        return inputs._replace(views=_views(split, example, chosen, layout, features))

    iterator = iter(_shuffled(split, spec, seed).map_with_index(make).to_iter_dataset(_PREFETCH))
    if cursor is not None:
        iterator.set_state(dict(cursor))
    for batch in iterator:
        yield batch, iterator.get_state()


def _shuffled(split: Split, spec: DataSpec, seed: int) -> grain.MapDataset:
    """The example indices of every global batch."""
    examples = grain.MapDataset.range(split.examples).shuffle(seed=seed).repeat()
    return examples.batch(spec.batch_examples, drop_remainder=True)


def drawn_ids(split: Split, spec: DataSpec, seed: int, step: int) -> tuple[str, ...]:
    """Ids of the examples in the batch of a training step; steps count from 1."""
    return tuple(split.ids[i] for i in _shuffled(split, spec, seed)[step - 1])


def evaluation_batches(
    split: Split,
    evaluation: EvaluationSpec,
    layout: RowLayout,
    features: Features | None = None,
    rows: Rows = None,
    examples: int | None = None,
) -> Iterator[Questions]:
    """One question a row, in a fixed order. Padding rows of the last batch have the example -1.

    The first `examples` images (None: `evaluation.examples`; 0: all) have q = `questions_per_example` questions each,
    image i those of the numbers i q, i q + 1, ... modulo K, so that all K stored questions occur equally often. `rows`
    are indices into the global batch; None: all.
    """
    questions, size = evaluation.questions_per_example, evaluation.batch_examples
    check(split, questions)
    count = (evaluation.examples if examples is None else examples) or split.examples
    pairs = np.arange(min(count, split.examples) * questions)
    padding = (0, -len(pairs) % size)
    all_examples = np.pad(pairs // questions, padding, constant_values=-1).astype(np.int32)
    all_chosen = np.pad(pairs % split.questions_per_example, padding)[:, None]
    longest, local = int(split.question_lengths.max()), slice(None) if rows is None else rows

    def make(step: int) -> Questions:
        batch = slice(step * size, (step + 1) * size)
        example, chosen = all_examples[batch][local], all_chosen[batch][local]
        inputs = pack(split, example, chosen, layout, longest, answers=False)
        inputs = inputs._replace(views=_views(split, example, chosen, layout, features))
        stored = np.maximum(example, 0), chosen[:, 0]
        length = np.where(example < 0, 0, split.answer_lengths[stored])[:, None]
        answer = np.where(np.arange(split.answer_tokens.shape[2]) < length, split.answer_tokens[stored], -1)
        return Questions(inputs, answer.astype(np.int32), example)

    yield from grain.MapDataset.range(len(all_examples) // size).map(make).to_iter_dataset(_PREFETCH)
