"""Endless pages to read, drawn by worker processes. A module of its own, so that those processes import no JAX
program.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import grain
from absl import flags

from experiments.glyph_encoder import reading


class Page(NamedTuple):
    """Images and what lies on their patches."""

    image: Any  # uint8[B, H, H, 3]
    label: Any  # int32[B, P, 3]


class Draw(grain.transforms.Map):
    """Step number -> its page."""

    def __init__(self, seed: int, batch: int):
        self.seed, self.batch = seed, batch

    def map(self, step: int) -> Page:
        return Page(*reading.reading_batch(self.seed, "train", self.batch, int(step)))


def pages(seed: int, batch: int, steps: int) -> Iterator[tuple[Page, None]]:
    """`steps` pages in order, with no cursor: this training is short enough to start over."""
    flags.FLAGS.mark_as_parsed()  # Grain's processes ask absl for flags that our commands do not have
    processes = max(len(os.sched_getaffinity(0)) - 1, 1)
    drawn = grain.MapDataset.range(steps).map(Draw(seed, batch)).to_iter_dataset()
    with contextlib.closing(iter(drawn.mp_prefetch(grain.MultiprocessingOptions(processes)))) as iterator:
        for page in iterator:
            yield page, None
