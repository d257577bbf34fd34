"""Which conversations share a row: a function of lengths, seed and epoch.

    sizes = lengths(mixture, spec, layout)
    rows = epoch_rows(mixture, spec, sizes, layout, seed, epoch)

An epoch draws every example once (or as often as its source's weight says), in an order of its own. With `pack="none"`
an example is a row. With "fit" all examples of an epoch are packed into rows (`bins`), which are then shuffled; an
example with several separate questions stays in one row where it fits.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import DataSpec, views_of_row
from vlm_jax.data import bins
from vlm_jax.data.conversations import IMAGE
from vlm_jax.data.tokenized import Mixture, TokenizedDataset


class RowLayout(NamedTuple):
    """Model settings that decide the layout of a row."""

    visual_tokens: int  # of an image in the row
    mask: str = "causal"  # or "prefix": bidirectional attention over image and question
    reads_question: bool = False  # the compressor takes the question: one view for each question
    shares_image: bool = False  # one copy of the visual tokens for all questions of a row, else one for each
    leaving: int = 0  # visual tokens of a view that leave inside the decoder

    @property
    def own_views(self) -> bool:
        """Whether each question has views of its own."""
        return self.reads_question or (self.leaving > 0 and not self.shares_image)


class Lengths(NamedTuple):
    """Of every conversation of a mixture, after cutting."""

    ids: Int[np.ndarray, " n"]  # ids that are used; 0: the conversation is dropped
    images: Int[np.ndarray, " n"]  # among those ids
    tokens: Int[np.ndarray, " n"]  # positions in a row, visual tokens included
    cut: int  # number of shortened conversations
    dropped: int


class Rows(NamedTuple):
    """Conversations in the order of their rows; row r has those of [bounds[r], bounds[r + 1])."""

    conversation: Int[np.ndarray, " n"]
    bounds: Int[np.ndarray, " R+1"]
    examples: int

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, row: int) -> Int[np.ndarray, " k"]:
        return self.conversation[self.bounds[row] : self.bounds[row + 1]]


def lengths(mixture: Mixture, spec: DataSpec, layout: RowLayout) -> Lengths:
    """Lengths in rows of `spec.row_tokens` positions. Conversations that are too long are cut after the last turn that
    fits, or dropped. Raises `UserError` where none fits.
    """
    visual = layout.visual_tokens
    ids = mixture.concatenate(lambda part: np.diff(part.bounds)).astype(np.int64)
    images = mixture.concatenate(lambda part: part.images).astype(np.int64)
    tokens = ids + images * (visual - 1)
    limit = room(spec, layout)
    long = np.flatnonzero((tokens - images * layout.leaving > limit) | ((images > spec.row_images) & (visual > 0)))
    shortest = int((tokens - images * layout.leaving).min()) + spec.row_tokens - limit
    used_images, cut = images.copy(), 0
    for number in long.tolist():
        part, index = mixture.locate(number)
        used = 0
        if spec.long == "cut" and not (visual and images[number] > spec.row_images):
            used = _cut(mixture.parts[part], index, visual - layout.leaving, limit)
        cut += used > 0
        ids[number] = used
        used_images[number] = np.sum(mixture.parts[part].conversation(index)[0][:used] == IMAGE)
        tokens[number] = used + (visual - 1) * used_images[number]
    if not ids.any():
        if visual and images.min() > spec.row_images:
            raise UserError(
                f"data.row_images: expected at least {images.min()}, the images of a conversation of {mixture.name}, "
                f"got {spec.row_images}"
            )
        raise UserError(
            f"data.row_tokens: expected room for a conversation of {mixture.name}, the shortest of which has "
            f"{shortest} tokens, got {spec.row_tokens}"
        )
    return Lengths(ids, used_images, tokens, cut, len(long) - cut)


def room(spec: DataSpec, layout: RowLayout) -> int:
    """Positions of a row behind the last stage of the decoder. A stage shortens rows by the tokens of all their M
    views, present or not, so a conversation needs as many positions as are left of it there."""
    return spec.row_tokens - views_of_row(spec, layout.own_views) * layout.leaving


def check_rows(mixture: Mixture, spec: DataSpec, sizes: Lengths, layout: RowLayout) -> None:
    """Raises `UserError` where an example with all its questions, or `questions_per_example` of them, exceeds a row."""
    if spec.pack != "none":
        return
    item = mixture.item_numbers()
    order = np.lexsort((-sizes.tokens, item))
    order = order[sizes.ids[order] > 0]  # longest questions of an example first
    first = np.diff(item[order], prepend=-1) != 0
    example = np.cumsum(first) - 1
    rank = np.arange(len(order)) - np.flatnonzero(first)[example]
    drawn = rank < (spec.questions_per_example or len(order))
    order, example, first = order[drawn], example[drawn], np.flatnonzero(rank[drawn] == 0)
    questions = np.bincount(example)
    total = np.bincount(example, sizes.tokens[order]).astype(int)
    images = mixture.concatenate(lambda part: part.images)[order[first]] if layout.visual_tokens else 0 * first
    if layout.shares_image:
        leading = mixture.concatenate(_leading_images)[order]
        total -= (questions - 1) * layout.visual_tokens * np.minimum.reduceat(leading, first)
    present = sizes.images[order]
    present = present[first] if layout.shares_image else np.bincount(example, present).astype(int)
    views, limit = images * (questions if layout.own_views else 1), views_of_row(spec, layout.own_views)
    if (needed := int((total + (limit - present) * layout.leaving).max())) > spec.row_tokens:
        raise UserError(
            f"data.row_tokens: expected at least {needed} for the questions of an example of {mixture.name}, got "
            f"{spec.row_tokens} (or set data.questions_per_example, or data.pack=fit)"
        )
    if layout.own_views and (needed := int(views.max())) > limit:
        raise UserError(
            f"data.row_images: expected at least {needed}, one for each image and question of an example of "
            f"{mixture.name}, got {limit} (or set data.questions_per_example)"
        )


def _leading_images(part: TokenizedDataset) -> Int[np.ndarray, " n"]:
    """The number of images that each conversation begins with."""
    others = np.where(part.ids != IMAGE, np.arange(len(part.ids)), len(part.ids))
    return np.minimum.reduceat(others, part.bounds[:-1]) - part.bounds[:-1]


def _cut(part: TokenizedDataset, index: int, visual: int, limit: int) -> int:
    """The number of ids up to the last turn that fits with its images."""
    ids, _ = part.conversation(index)
    tokens = np.cumsum(np.where(ids == IMAGE, visual, 1))
    ends = part.turn_ends[part.turn_bounds[index] : part.turn_bounds[index + 1]]
    fitting = [int(end) for end in ends if tokens[end - 1] <= limit]
    return max(fitting, default=0)


def epoch_rows(mixture: Mixture, spec: DataSpec, sizes: Lengths, layout: RowLayout, seed: int, epoch: int) -> Rows:
    """The rows of an epoch, shuffled."""
    rng = np.random.default_rng([seed, epoch])
    conversation, example = _drawn(mixture, spec, sizes, rng)
    if not len(conversation):
        raise UserError(
            f"data.train: expected at least one example in an epoch, got none (raise the weights of {mixture.name})"
        )
    bounds = np.flatnonzero(np.diff(example, prepend=-1, append=-2))
    if spec.pack == "none":
        return Rows(conversation, bounds, len(bounds) - 1)
    row = _fit(conversation, bounds, mixture, spec, sizes, layout)
    # Rows in a random order; a stable sort keeps the questions about an image next to each other.
    row = rng.permutation(row.max() + 1)[row]
    order = np.argsort(row, kind="stable")
    row_bounds = np.flatnonzero(np.diff(row[order], prepend=-1, append=-2))
    return Rows(conversation[order], row_bounds, len(bounds) - 1)


def _drawn(
    mixture: Mixture, spec: DataSpec, sizes: Lengths, rng: np.random.Generator
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """(conversations, the number of their draw) of an epoch, examples in random order."""
    numbers, draws, total = [], [], 0
    for part, start, passes in zip(mixture.parts, mixture.starts, mixture.passes, strict=True):
        kept = np.flatnonzero(sizes.ids[start : start + len(part)])
        _, item = np.unique(part.item[kept], return_inverse=True)
        bounds = np.flatnonzero(np.diff(item, prepend=-1, append=-2))
        count = len(bounds) - 1
        whole, rest = int(passes), round((passes % 1) * count)
        chosen = np.concatenate([np.tile(np.arange(count), whole), rng.permutation(count)[:rest]]).astype(np.int64)
        repeats = np.diff(bounds)[chosen]
        first = np.cumsum(repeats) - repeats
        offset = np.arange(repeats.sum()) - np.repeat(first, repeats)
        numbers.append(kept[np.repeat(bounds[:-1][chosen], repeats) + offset] + start)
        draws.append(np.repeat(np.arange(len(chosen)), repeats) + total)
        total += len(chosen)
    number, draw = np.concatenate(numbers), rng.permutation(total)[np.concatenate(draws)]
    # Sorted by draw; the questions of an example are in random order, and only the first ones are kept.
    order = np.lexsort((rng.random(len(draw)), draw))
    number, draw = number[order], draw[order]
    if spec.questions_per_example:
        rank = np.arange(len(draw)) - np.searchsorted(draw, draw)
        keep = rank < spec.questions_per_example
        number, draw = number[keep], draw[keep]
    return number, draw


def _fit(
    conversation: np.ndarray, bounds: np.ndarray, mixture: Mixture, spec: DataSpec, sizes: Lengths, layout: RowLayout
) -> Int[np.ndarray, " n"]:
    """The row of each conversation."""
    images = mixture.concatenate(lambda part: part.images)[conversation] if layout.visual_tokens else 0 * conversation
    tokens = sizes.tokens[conversation] - sizes.images[conversation] * layout.leaving
    groups = _groups(tokens, images, bounds, spec, layout)
    size = np.add.reduceat(tokens, groups[:-1])
    views = np.add.reduceat(images, groups[:-1]) if layout.own_views else images[groups[:-1]]
    assigned = bins.pack(size, views, room(spec, layout), spec.row_images)
    return np.repeat(assigned, np.diff(groups))


def _groups(
    tokens: np.ndarray, images: np.ndarray, bounds: np.ndarray, spec: DataSpec, layout: RowLayout
) -> Int[np.ndarray, " g"]:
    """Bounds of the conversations that stay together: those of an example, split where they exceed a row."""
    total = np.add.reduceat(tokens, bounds[:-1])
    many = np.add.reduceat(images, bounds[:-1]) if layout.own_views else images[bounds[:-1]]
    limit = room(spec, layout)
    splits = []
    for i in np.flatnonzero((total > limit) | (many > spec.row_images)):
        size = views = 0
        for j in range(bounds[i], bounds[i + 1]):
            size, views = size + tokens[j], views + images[j] * layout.own_views
            if j > bounds[i] and (size > limit or views > spec.row_images):
                splits.append(j)
                size, views = tokens[j], images[j] * layout.own_views
    return np.unique(np.concatenate([bounds, np.asarray(splits, bounds.dtype)]))
