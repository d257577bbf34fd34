"""The arrays of rows: conversations as `core.structs.Inputs`, each image expanded to its visual tokens."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from vlm_jax.core.errors import UserError
from vlm_jax.core.structs import Inputs
from vlm_jax.data.conversations import IMAGE
from vlm_jax.data.packing import RowLayout
from vlm_jax.data.tokenized import Mixture
from vlm_jax.ops import masks


class RowPlan(NamedTuple):
    """Conversations of one row, up to `ids` of each."""

    conversation: Sequence[int]
    ids: Sequence[int]


class ViewOf(NamedTuple):
    """The image of a view."""

    row: int
    view: int
    part: int
    image: int  # number in its part
    conversation: int


def bucket(length: int) -> int:
    """The next of 16, 24, 32, 48, 64, 96, ..., for few compiled programs with little padding."""
    size = 16
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def pack(
    mixture: Mixture, rows: Sequence[RowPlan], layout: RowLayout, length: int, learn: bool = True
) -> tuple[Inputs, list[ViewOf]]:
    """Rows without views, and the image of every view. `learn` False leaves `weight` out.

    Raises `UserError` for a row of more than `length` positions.
    """
    ids, target, segments, views = [], [], [], []
    for row, plan in enumerate(rows):
        view, first_view, shared = 0, {}, _shared_images(mixture, plan, layout)
        for number, (conversation, used) in enumerate(zip(plan.conversation, plan.ids, strict=True)):
            part, index = mixture.locate(conversation)
            dataset = mixture.parts[part]
            row_ids, learned = dataset.conversation(index)
            count = int(dataset.images[index]) if layout.visual_tokens else 0
            key = number if layout.own_views else (part, int(dataset.item[index]))
            if key not in first_view:
                first_view[key] = view
                first = int(dataset.first_image[index])
                views += [ViewOf(row, view + i, part, first + i, conversation) for i in range(count)]
                view += count
            if shared and number == 0:
                segments.append((row, masks.SHARED, shared, first_view[key], 0, part))
                ids.append(row_ids[:shared])
                target.append(learned[:shared])
            ids.append(row_ids[shared:used])
            target.append(learned[shared:used])
            first = shared * layout.visual_tokens
            segments.append((row, number + 1, used - shared, first_view[key] + shared, first, part))
    flat = np.concatenate([np.zeros(0, np.int32), *ids]), np.concatenate([np.zeros(0, bool), *target])
    inputs = _expand(*flat, np.array(segments, int).reshape(-1, 6), len(rows), layout, length)
    inputs = inputs if len(mixture.parts) > 1 and learn else inputs._replace(part=None)
    return inputs if learn else inputs._replace(weight=None), views


def _shared_images(mixture: Mixture, plan: RowPlan, layout: RowLayout) -> int:
    """Images that all of a row's conversations begin with, if they share them."""
    if not layout.shares_image or len(plan.conversation) < 2:
        return 0
    located = [mixture.locate(number) for number in plan.conversation]
    return min(int(np.argmax(mixture.parts[part].conversation(index)[0] != IMAGE)) for part, index in located)


def _expand(
    ids: Int[np.ndarray, " N"],
    target: Bool[np.ndarray, " N"],
    segments: Int[np.ndarray, "S 6"],  # (row, segment, ids, first view, first position, part)
    rows: int,
    layout: RowLayout,
    length: int,
) -> Inputs:
    """Rows of segments, with each image expanded to its visual tokens."""
    visual = layout.visual_tokens
    row, label, sizes, first_view, first_position, part = segments.T
    owner = np.repeat(np.arange(len(segments)), sizes)  # segment of each id
    is_image = ids == IMAGE
    # The number of each image within its segment.
    ordinal = np.cumsum(is_image) - is_image
    starts = np.cumsum(sizes) - sizes
    ordinal = ordinal - ordinal[np.minimum(starts, max(len(ids) - 1, 0))][owner] if len(ids) else ordinal
    counts = np.where(is_image, visual, 1)
    index = np.repeat(np.arange(len(ids)), counts)  # id of each position
    within = np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)  # of an image's tokens
    owner, is_image = owner[index], is_image[index]
    positions = np.bincount(owner, minlength=len(segments))
    offset = np.arange(len(index)) - (np.cumsum(positions) - positions)[owner]
    position = offset + first_position[owner]
    row_sizes = np.bincount(row, positions, minlength=rows).astype(int)
    if row_sizes.max(initial=0) > length:
        raise UserError(f"data.row_tokens: expected at least {row_sizes.max()} for these rows, got {length}")
    row = row[owner]
    slot = np.arange(len(index)) - (np.cumsum(row_sizes) - row_sizes)[row]

    def place(values: np.ndarray, fill: int = 0, dtype: Any = np.int32) -> np.ndarray:
        out = np.full((rows, length), fill, dtype)
        out[row, slot] = values
        return out

    learned = target[index]
    order = position
    if layout.mask == "prefix":
        first = np.full(len(segments), len(index))
        np.minimum.at(first, owner[learned], offset[learned])
        order = np.where(offset < first[owner], 0, position)
    last = np.append(owner[1:] != owner[:-1], True) if len(owner) else np.zeros(0, bool)
    weight = np.append(learned[1:], False) & ~last if len(learned) else learned
    view = (first_view[owner] + ordinal[index]) * visual + within
    return Inputs(
        tokens=place(np.where(is_image, 0, ids[index])),
        segment=place(label[owner]),
        position=place(position),
        order=place(order),
        visual=place(np.where(is_image, view, -1), -1),
        weight=place(weight, dtype=np.float32),
        part=place(part[owner]),
    )
