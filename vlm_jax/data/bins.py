"""Bin packing: the row of each item, for items of some positions and views.

Best fit in the given order leaves almost nothing open where a row holds many items and views to spare. Where positions
and views run out together, a row is started with the longest item, and each of its views is given the mean of the room
that is left; where it holds two or three items, it is completed with the one or two that leave the least room. `pack`
takes the result with the fewest rows.
"""

import math

import numpy as np
from jaxtyping import Int


def pack(
    sizes: Int[np.ndarray, " n"], views: Int[np.ndarray, " n"], size: int, view_limit: int
) -> Int[np.ndarray, " n"]:
    """The row of each item; no row holds more than `size` positions or `view_limit` views. Every item fits alone."""
    average = math.ceil(size * views.sum() / max(sizes.sum(), 1))  # views of a full row
    least = max(average, int(views.max(initial=0)))
    found = [best_fit(sizes, views, size, view_limit)]
    found += [even_fit(sizes, views, size, min(limit, view_limit)) for limit in (least, least + 1)]
    if len(sizes) <= 6 * (found[0].max(initial=0) + 1):
        found.append(pair_fit(sizes, views, size, view_limit))
    return min(found, key=lambda rows: rows.max(initial=0))


def best_fit(
    sizes: Int[np.ndarray, " n"], views: Int[np.ndarray, " n"], size: int, view_limit: int
) -> Int[np.ndarray, " n"]:
    """Each item in turn goes to the row that it leaves with the least room, or else to a new one."""
    room: dict[int, list[tuple[int, int]]] = {}  # positions left -> (row, views left)
    used = 0  # bit s: a row with s positions left exists
    out, count = np.zeros(len(sizes), np.int64), 0
    for item, (tokens, seen) in enumerate(zip(sizes.tolist(), views.tolist(), strict=True)):
        left, candidates, found = tokens, used >> tokens, None
        while candidates and found is None:
            step = (candidates & -candidates).bit_length() - 1
            left, candidates = left + step, candidates >> step
            rows = room[left]
            found = next((i for i in range(len(rows) - 1, -1, -1) if rows[i][1] >= seen), None)
            if found is None:
                left, candidates = left + 1, candidates >> 1
        if found is None:
            row, free, left = count, view_limit, size
            count += 1
        else:
            row, free = room[left].pop(found)
            if not room[left]:
                used &= ~(1 << left)
        out[item] = row
        if left > tokens and (free > seen or not seen):  # rows without a view left are closed
            room.setdefault(left - tokens, []).append((row, free - seen))
            used |= 1 << (left - tokens)
    return out


def even_fit(
    sizes: Int[np.ndarray, " n"], views: Int[np.ndarray, " n"], size: int, view_limit: int
) -> Int[np.ndarray, " n"]:
    """A row starts with the longest item left. Then, until its views or positions are used, the longest item that takes
    no more than its part of the room, or else the shortest, is added."""
    waiting, used = _waiting(sizes, size), 0  # bit s: an item of that size is left
    for length in set(sizes.tolist()):
        used |= 1 << length
    out, row = np.zeros(len(sizes), np.int64), 0
    while used:
        room, free, length = size, view_limit, used.bit_length() - 1
        while (seen := int(views[waiting[length][-1]])) <= free:
            out[waiting[length].pop()] = row
            if not waiting[length]:
                used &= ~(1 << length)
            room, free = room - length, free - seen
            fitting = used & ((1 << room + 1) - 1)
            if not fitting:
                break
            even = fitting & ((1 << room // max(free, 1) + 1) - 1)
            length = (even or fitting & -fitting).bit_length() - 1
        row += 1
    return out


def _waiting(sizes: Int[np.ndarray, " n"], size: int) -> list[list[int]]:
    """The items of each size; the first in the given order is the last."""
    waiting: list[list[int]] = [[] for _ in range(size + 1)]
    for item in np.arange(len(sizes))[::-1].tolist():
        waiting[sizes[item]].append(item)
    return waiting


def pair_fit(
    sizes: Int[np.ndarray, " n"], views: Int[np.ndarray, " n"], size: int, view_limit: int
) -> Int[np.ndarray, " n"]:
    """A row starts with the longest item left; then the one or two items that leave the least room are added."""
    counts, every = np.bincount(sizes, minlength=size + 1), np.arange(size + 1)
    waiting = _waiting(sizes, size)
    out, left, row = np.zeros(len(sizes), np.int64), len(sizes), 0
    while left:
        room, free, chosen = size, view_limit, [int(every[counts > 0][-1])]
        while chosen:
            for length in chosen:
                if views[waiting[length][-1]] > free:
                    room = 0  # closed
                    break
                item = waiting[length].pop()
                counts[length] -= 1
                out[item], room, free, left = row, room - length, free - int(views[item]), left - 1
            chosen = _best_pair(counts[: room + 1], every[: room + 1])
        row += 1
    return out


def _best_pair(counts: Int[np.ndarray, " r"], every: Int[np.ndarray, " r"]) -> list[int]:
    """The one or two sizes with the largest sum that fits, of those with a count; [] where none fits."""
    lengths = np.flatnonzero(counts)
    if not len(lengths):
        return []
    longest = np.maximum.accumulate(np.where(counts > 0, every, 0))  # that fits into each room
    second = longest[len(every) - 1 - lengths]
    second = np.where((second == lengths) & (counts[lengths] < 2), 0, second)
    best = int(np.argmax((lengths + second)[::-1]))
    pair = (int(lengths[::-1][best]), int(second[::-1][best]))
    return [length for length in pair if length]
