"""Batches of a mixture, prefetched by Grain.

The batch of a step is a function of data, seed and step alone: a run resumes at any step, and each of several processes
makes its own rows of the same batches.
"""

import threading
from collections.abc import Iterator
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import Int

from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import EvaluationSpec, views_of_row
from vlm_jax.core.structs import Inputs
from vlm_jax.data import packing
from vlm_jax.data.rows import RowPlan, bucket, pack
from vlm_jax.data.tokenized import TokenizedDataset
from vlm_jax.data.views import Data, make_views

Slots = Int[np.ndarray, " b"] | None  # rows of the global batch; None: all of them

_PREFETCH = grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)


class Questions(NamedTuple):
    """A batch for evaluation: one question and its answer a row."""

    inputs: Inputs  # up to the end of the question
    answer: Int[np.ndarray, "B A"]  # with its end token, padded with -1
    example: Int[np.ndarray, " B"]  # number of the example; -1 for padding rows, and where the image cannot be read


class Batches:
    """Training batches; `[s]` is that of the step s + 1.

    Args:
        slots: the rows of the global batch that are made.

    Raises `UserError` where no conversation fits into a row, or too many items are unusable.
    """

    def __init__(self, data: Data, seed: int, slots: Slots = None):
        self.data, self.seed, self.slots = data, seed, slots
        self.sizes = packing.lengths(data.mixture, data.spec, data.layout)
        packing.check_rows(data.mixture, data.spec, self.sizes, data.layout)
        self._lock = threading.Lock()
        self._epochs: dict[int, packing.Rows] = {}  # the last two
        self._counts: dict[int, int] = {}  # rows of each epoch so far

    def epoch(self, number: int) -> packing.Rows:
        """The rows of an epoch, counted from 0."""
        with self._lock:
            if number not in self._epochs:
                data = self.data
                rows = packing.epoch_rows(data.mixture, data.spec, self.sizes, data.layout, self.seed, number)
                self._epochs = {n: old for n, old in self._epochs.items() if n == number - 1} | {number: rows}
                self._counts[number] = len(rows)
            return self._epochs[number]

    def rows(self, step: int) -> list[RowPlan]:
        """The rows of the global batch of step `step` + 1. Epochs follow each other without a gap."""
        size, epoch, found = self.data.spec.batch_rows, 0, []
        first = step * size
        while len(found) < size:
            count = self._counts.get(epoch) or len(self.epoch(epoch))
            if first < count:
                rows = self.epoch(epoch)
                found += [rows[r] for r in range(first, min(first + size - len(found), count))]
            first, epoch = max(first - count, 0), epoch + 1
        return [RowPlan(row.tolist(), self.sizes.ids[row].tolist()) for row in found]

    def __getitem__(self, step: int) -> Inputs:
        data, rows = self.data, self.rows(step)
        rows = rows if self.slots is None else [rows[slot] for slot in self.slots]
        inputs, views = pack(data.mixture, rows, data.layout, data.spec.row_tokens)
        made = make_views(data, views, len(rows), views_of_row(data.spec, data.layout.own_views))
        if data.bad.found:
            _forget_bad(data, rows, inputs)
        return inputs._replace(views=made)

    def ids(self, step: int) -> tuple[str, ...]:
        """Ids of the items of step `step` + 1."""
        numbers = (number for row in self.rows(step) for number in row.conversation)
        return tuple(dict.fromkeys(self.data.mixture.id_of(number) for number in numbers))


def _forget_bad(data: Data, rows: list[RowPlan], inputs: Inputs) -> None:
    """Weight 0 for conversations with an image that cannot be read."""
    for row, plan in enumerate(rows):
        for segment, number in enumerate(plan.conversation, start=1):
            if data.bad.among(*data.mixture.locate(number)):
                inputs.weight[row, inputs.segment[row] == segment] = 0


def train_batches(batches: Batches, first_step: int, last_step: int) -> Iterator[Inputs]:
    """The batches of the steps `first_step` + 1 to `last_step`."""
    yield from grain.MapDataset.range(first_step, last_step).map(batches.__getitem__).to_iter_dataset(_PREFETCH)


def evaluation_batches(
    data: Data, evaluation: EvaluationSpec, slots: Slots = None, examples: int | None = None
) -> Iterator[Questions]:
    """One question a row, in a fixed order. Padding rows of the last batch have the example -1. A batch is as long as
    its longest question, up to a bucket.

    The first `examples` examples (None: `evaluation.examples`; 0: all) have q = `questions_per_example` questions each,
    example i those of the numbers i q, i q + 1, ... modulo K, so that all of its K questions occur equally often. A
    question is a conversation up to its last answer.
    """
    pairs = evaluation_pairs(data, evaluation, examples)
    size, visual = evaluation.batch_examples, data.layout.visual_tokens
    begin, end = (data.mixture.concatenate(part) for part in (_answer_begin, _answer_end))
    images = data.mixture.concatenate(lambda part: part.images)
    every = np.unique(pairs[:, 1])
    views = max(int(images[every].max()), 1)
    # With padding in place of the tokens of absent views that leave the decoder.
    lengths = begin + images * (visual - 1) + (views - images) * data.layout.leaving
    longest, image_tokens = int(lengths[every].max()), views * visual
    answer_tokens = int((end - begin)[every].max())
    pairs = np.pad(pairs, ((0, -len(pairs) % size), (0, 0)), constant_values=-1)
    local = slice(None) if slots is None else slots

    def make(step: int) -> Questions:
        whole = pairs[step * size : (step + 1) * size]  # of all processes, whose rows are equally long
        length = int(lengths[whole[whole[:, 1] >= 0, 1]].max())
        length = min(image_tokens + bucket(max(length - image_tokens, 1)), longest)
        batch = whole[local]
        answer = np.full((len(batch), answer_tokens), -1, np.int32)
        rows = []
        for row, (_, number) in zip(answer, batch.tolist(), strict=True):
            if number < 0:
                rows.append(RowPlan((), ()))
                continue
            part, index = data.mixture.locate(number)
            ids, _ = data.mixture.parts[part].conversation(index)
            row[: end[number] - begin[number]] = ids[begin[number] : end[number]]
            rows.append(RowPlan((number,), (int(begin[number]),)))
        inputs, seen = pack(data.mixture, rows, data.layout, length, learn=False)
        made = make_views(data, seen, len(rows), views)
        example = batch[:, 0].astype(np.int32)
        for row, plan in enumerate(rows if data.bad.found else ()):  # questions about unreadable images are left out
            if any(data.bad.among(*data.mixture.locate(number)) for number in plan.conversation):
                example[row], answer[row] = -1, -1
        return Questions(inputs._replace(views=made), answer, example)

    yield from grain.MapDataset.range(len(pairs) // size).map(make).to_iter_dataset(_PREFETCH)


def evaluation_pairs(data: Data, evaluation: EvaluationSpec, examples: int | None = None) -> Int[np.ndarray, "n 2"]:
    """(example, conversation) of every question of an evaluation. Conversations that do not fit whole are left out.

    Raises `UserError` where none is left.
    """
    mixture, spec = data.mixture, data.spec
    sizes = packing.lengths(mixture, spec, data.layout)
    whole = np.flatnonzero(sizes.ids == mixture.concatenate(lambda part: np.diff(part.bounds)))
    item = mixture.item_numbers()[whole]
    bounds = np.flatnonzero(np.diff(item, prepend=-1, append=-2))
    limit = (evaluation.examples if examples is None else examples) or len(bounds) - 1
    pairs = []
    for i in range(min(limit, len(bounds) - 1)):
        mine, q = whole[bounds[i] : bounds[i + 1]], evaluation.questions_per_example
        pairs += [(i, mine[(i * q + j) % len(mine)]) for j in range(min(q, len(mine)))]
    if not pairs:
        raise UserError(f"data.row_tokens: expected room for a test question of {mixture.name}, got {spec.row_tokens}")
    return np.array(pairs)


def _answer_end(part: TokenizedDataset) -> Int[np.ndarray, " n"]:
    """Ids of each conversation up to the end of its last answer."""
    last = np.maximum.reduceat(np.where(part.target, np.arange(len(part.target)), -1), part.bounds[:-1])
    return last + 1 - part.bounds[:-1]


def _answer_begin(part: TokenizedDataset) -> Int[np.ndarray, " n"]:
    """Ids of each conversation up to its last answer."""
    number, end = np.arange(len(part.target)), _answer_end(part) + part.bounds[:-1]
    before = ~part.target & (number < np.repeat(end, np.diff(part.bounds)))
    last = np.maximum.reduceat(np.where(before, number, -1), part.bounds[:-1])
    return np.maximum(last + 1, part.bounds[:-1]) - part.bounds[:-1]
