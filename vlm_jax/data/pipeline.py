"""From a `Split` to batches: Grain orders the examples, one vectorised function packs them.

Promises:
  * every epoch is a permutation of the examples, the same for any number of processes: each of them draws the whole
    order, which is numbers only, and packs the rows of the global batch that its devices hold;
  * which questions are asked depends on the seed and the number of the batch alone;
  * the cursor that comes with a batch resumes with the next one, however far the threads have read ahead.
"""

from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
from jaxtyping import Int

from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import DataSpec, EvaluationSpec
from vlm_jax.core.structs import Batch, Visual
from vlm_jax.data.sources import Split

Cursor = dict[str, Any]  # Grain's iterator state; JSON can hold it
Features = Callable[[Int[np.ndarray, " B"]], Visual]
Rows = Int[np.ndarray, " b"] | None  # of the global batch; None: all of them

_READ_AHEAD = grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)


def pack(
    split: Split, example: Int[np.ndarray, " B"], chosen: Int[np.ndarray, "B k"], text_tokens: int
) -> dict[str, Any]:
    """The text arrays of `core.structs.Batch`, [B, T] each: the chosen questions of every example, one after the other.

    Rows whose example is -1 stay empty. Raises `UserError` where a row is longer than `text_tokens`.
    """
    fills = example < 0
    rows = np.where(fills, 0, example)[:, None]
    asked, replied = split.question_lengths[rows, chosen], split.answer_lengths[rows, chosen]
    length = np.where(fills[:, None], 0, asked + replied)
    ends = np.cumsum(length, axis=1)
    if ends.size and (needed := int(ends[:, -1].max())) > text_tokens:
        raise UserError(
            f"data.text_tokens is {text_tokens}, but {chosen.shape[1]} questions of {split.name} take {needed}: "
            f"set it to {longest_row(split, chosen.shape[1])}, or pack fewer questions"
        )
    at = np.arange(text_tokens)
    # Segment s covers [ends[s-1], ends[s]): the number of ends at or before a slot is the segment it lies in.
    slot_segment = (at[None, :, None] >= ends[:, None, :]).sum(axis=2)
    real = slot_segment < chosen.shape[1]
    which = np.where(real, slot_segment, 0)
    position = np.where(real, at - np.take_along_axis(ends - length, which, axis=1), 0)
    asked, length = (np.take_along_axis(a, which, axis=1) for a in (asked, length))
    picked = np.take_along_axis(chosen, which, axis=1)
    question = real & (position < asked)
    token = np.where(
        question,
        split.question_tokens[rows, picked, np.minimum(position, split.question_tokens.shape[2] - 1)],
        split.answer_tokens[rows, picked, np.clip(position - asked, 0, split.answer_tokens.shape[2] - 1)],
    )
    text = np.where(real, token, 0).astype(np.int32)
    last = position == length - 1
    target = np.where(real & ~last, np.roll(text, -1, axis=1), 0)
    return {
        "text": text,
        "target": target,
        "weight": (real & ~last & (position >= asked - 1)).astype(np.float32),
        "segment": np.where(real, slot_segment + 1, 0).astype(np.int32),
        "position": position.astype(np.int32),
        "question": question,
    }


def longest_row(split: Split, questions: int) -> int:
    """The T that holds any `questions` questions of one example, with their answers."""
    pairs = np.sort(split.question_lengths + split.answer_lengths, axis=1)
    return int(pairs[:, -questions:].sum(axis=1).max())


def _batch(split: Split, example: np.ndarray, chosen: np.ndarray, text_tokens: int, features: Features | None) -> Batch:
    arrays = {**pack(split, example, chosen, text_tokens), "example": example}
    shown = np.maximum(example, 0)
    return Batch(**arrays, image=split.images(shown)) if features is None else Batch(**arrays, features=features(shown))


def _chosen_rows(rows: Rows) -> Any:
    return slice(None) if rows is None else rows


def check(split: Split, questions: int) -> None:
    """Raises `UserError` where batches of that many questions cannot be made of the split."""
    if not 1 <= questions <= split.questions_per_example:
        raise UserError(
            f"questions_per_example is {questions}, but {split.name} stores {split.questions_per_example} "
            f"questions an image: choose 1 to {split.questions_per_example}"
        )


def check_training(split: Split, spec: DataSpec) -> None:
    """Raises `UserError` where training batches cannot be made, or their packed rows would not fit in T."""
    questions = spec.questions_per_example
    check(split, questions)
    if (needed := longest_row(split, questions)) > spec.text_tokens:
        raise UserError(
            f"data.text_tokens is {spec.text_tokens}, but {questions} questions of {split.name} take up to {needed}: "
            f"set it to {needed}, or pack fewer questions"
        )


def train_batches(
    split: Split,
    spec: DataSpec,
    seed: int,
    cursor: Cursor | None = None,
    features: Features | None = None,
    rows: Rows = None,
) -> Iterator[tuple[Batch, Cursor]]:
    """Batches without end, each with the cursor that resumes after it, whatever the number of processes.

    `features(indices)` gives stored encoder features; without it the batch carries pixels. `rows` are those of the
    global batch that are wanted. Raises `UserError` where the spec asks for what the split cannot give.
    """
    questions, mine = spec.questions_per_example, _chosen_rows(rows)
    check_training(split, spec)

    def make(step: int, example: np.ndarray) -> Batch:
        rng = np.random.default_rng([seed, step])
        order = np.argsort(rng.random((spec.batch_examples, split.questions_per_example)), axis=1)
        return _batch(split, example[mine].astype(np.int32), order[mine, :questions], spec.text_tokens, features)

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
    spec: DataSpec,
    evaluation: EvaluationSpec,
    features: Features | None = None,
    rows: Rows = None,
) -> Iterator[Batch]:
    """One question a row, in a fixed order; T = `split.pair_tokens`. Rows that only fill the last batch: example -1.

    The first `evaluation.examples` images (0: all) are asked `questions_per_example` questions each; image i is asked
    numbers i q, i q + 1, ... modulo K, so that over the images all K stored questions are asked equally often. `rows`
    are those of the global batch that are wanted.
    """
    questions, mine = evaluation.questions_per_example, _chosen_rows(rows)
    check(split, questions)
    count = min(evaluation.examples or split.examples, split.examples)
    pairs = np.arange(count * questions)
    fill = (0, -len(pairs) % evaluation.batch_examples)
    example = np.pad(pairs // questions, fill, constant_values=-1).astype(np.int32)
    chosen = np.pad(pairs % split.questions_per_example, fill)

    def make(step: int) -> Batch:
        batch = slice(step * evaluation.batch_examples, (step + 1) * evaluation.batch_examples)
        return _batch(split, example[batch][mine], chosen[batch, None][mine], split.pair_tokens, features)

    steps = len(example) // evaluation.batch_examples
    yield from grain.MapDataset.range(steps).map(make).to_iter_dataset(_READ_AHEAD)
