"""The images of rows: pixels, or stored features of a frozen encoder, and the questions that compressors read."""

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import DataSpec, EncoderSpec
from vlm_jax.core.structs import Views, Visual
from vlm_jax.data import images
from vlm_jax.data.packing import RowLayout
from vlm_jax.data.rows import ViewOf
from vlm_jax.data.tokenized import Mixture, TokenizedDataset, summary

Features = Callable[[Int[np.ndarray, " n"]], Visual]  # numbers of images of a part -> their stored features


class BadImages:
    """The unusable items of a mixture: those skipped before, and images that the threads of a run cannot decode."""

    def __init__(self, mixture: Mixture, max_share: float):
        self.found: dict[tuple[int, int], str] = {}  # (part, image) -> reason
        self._mixture, self._max_share, self._lock = mixture, max_share, threading.Lock()
        self.check()

    def add(self, part: int, image: int, reason: str) -> None:
        """Raises as `check` does."""
        with self._lock:
            self.found[part, image] = reason
            self.check()

    def among(self, part: int, index: int) -> bool:
        """Whether an image of a conversation of a part is one of them."""
        dataset = self._mixture.parts[part]
        first, count = int(dataset.first_image[index]), int(dataset.images[index])
        return any((part, image) in self.found for image in range(first, first + count))

    def check(self) -> None:
        """Raises `UserError` where more than the allowed share of items is unusable."""
        parts = self._mixture.parts
        items = {(part, parts[part].item_of(image)) for part, image in self.found}
        bad = sum(len(ids) for part in parts for ids in part.skipped.values()) + len(items)
        total = sum(len(part.source) for part in parts)
        if bad > self._max_share * total:
            reasons = [f"{part.source.name}: {summary(part.skipped)}" for part in parts if part.skipped]
            reasons += list(self.found.values())[:1]
            raise UserError(
                f"expected at most data.max_bad_share={self._max_share:g} of unusable items, got {bad} of {total}: "
                f"{'; '.join(reasons)} (`python -m vlm_jax.check_data` lists them)"
            )


class Data(NamedTuple):
    """A mixture, and how its conversations and images become rows."""

    mixture: Mixture
    spec: DataSpec
    layout: RowLayout
    encoder: EncoderSpec  # image preparation
    bad: BadImages
    features: tuple[Features, ...] | None = None  # of each part; None: views have pixels


def read_pixels(
    dataset: TokenizedDataset, numbers: Int[np.ndarray, " n"], encoder: EncoderSpec
) -> UInt8[np.ndarray, "n H H 3"]:
    """Images as the encoder's input. Raises `UserError`."""
    name = dataset.source.name
    out = np.empty((len(numbers), encoder.image_size, encoder.image_size, 3), np.uint8)
    for row, number in zip(out, np.asarray(numbers).tolist(), strict=True):
        row[...] = images.read_and_fit(dataset.image(number), encoder, f"{name}, image {number}")
    return out


def make_views(data: Data, views: Sequence[ViewOf], rows: int, count: int) -> Views | None:
    """M = `count` views a row; those that are not named are zero. Images that cannot be read go to `data.bad`."""
    if not data.layout.visual_tokens:
        return None
    question = _questions(data, views, rows, count) if data.layout.reads_question else None
    if data.features is not None:
        return Views(features=_gather(data.features, views, rows, count), question=question)
    pixels = np.zeros((rows, count, data.encoder.image_size, data.encoder.image_size, 3), np.uint8)
    for view in views:
        try:
            part = data.mixture.parts[view.part]
            pixels[view.row, view.view] = read_pixels(part, np.array([view.image]), data.encoder)[0]
        except UserError as error:
            data.bad.add(view.part, view.image, str(error))
    return Views(pixels=pixels, question=question)


def _gather(features: Sequence[Features], views: Sequence[ViewOf], rows: int, count: int) -> Visual:
    table = np.array([(v.row * count + v.view, v.part, v.image) for v in views], int).reshape(-1, 3)
    out: list[Any] = []
    for number, read in enumerate(features):
        slot, image = table[table[:, 1] == number][:, (0, 2)].T
        stored = read(image)
        if len(slot) == rows * count and (slot == np.arange(len(slot))).all():
            out = list(stored)  # every view, in order
            break
        if not out:
            out = [None if leaf is None else np.zeros((rows * count, *leaf.shape[1:]), leaf.dtype) for leaf in stored]
        for all_leaves, leaf in zip(out, stored, strict=True):
            if leaf is not None:
                all_leaves[slot] = leaf
    return Visual(*(leaf if leaf is None else leaf.reshape(rows, count, *leaf.shape[1:]) for leaf in out))


def _questions(data: Data, views: Sequence[ViewOf], rows: int, count: int) -> Int[np.ndarray, "B M Q"]:
    longest = max(int(np.diff(part.question_bounds).max()) for part in data.mixture.parts)
    out = np.full((rows, count, max(min(longest, data.spec.question_tokens), 1)), -1, np.int32)
    for view in views:
        part, index = data.mixture.locate(view.conversation)
        ids = data.mixture.parts[part].question(index)[: out.shape[2]]
        out[view.row, view.view, : len(ids)] = ids
    return out
