"""`glyph_ocr`: the answer is on the canvas, so what limits it is how much of the canvas the visual tokens carry.

    read row two        -> 4 7 1 9
    read column three   -> 0 1 8 8
    read all            -> all cells, row by row

Every cell holds an independent uniform digit, so without the image nothing is known: the blind error of a digit is 0.9.
"""

import dataclasses

import numpy as np

from vlm_jax.studies.glyphs import backdrops, glyphs, layouts, vocabulary
from vlm_jax.studies.glyphs.records import Chunk, GlyphBuilder, GlyphConfig


@dataclasses.dataclass(eq=False)
class OcrConfig(GlyphConfig):
    side: int = 4  # cells a side
    ask: tuple[str, ...] = ("row", "column")  # of row, column, all


def questions(side: int, ask: tuple[str, ...]) -> list[str]:
    """All questions about a grid, in the order in which records hold them."""
    lines = [f"read {what} {vocabulary.ORDINALS[i]}" for what in ask if what != "all" for i in range(side)]
    return lines + ["read all"] * ("all" in ask)


def read(grid: np.ndarray, ask: tuple[str, ...]) -> list[str]:
    """The oracle: the answers about one grid [side, side] of digits, in the order of `questions`."""
    lines = []
    for what in ask:
        lines += {"row": list(grid), "column": list(grid.T), "all": [grid.ravel()]}[what]
    return [" ".join(map(str, line)) for line in lines]


class GlyphOcr(GlyphBuilder):
    """Transcription of handwritten digits on a grid."""

    FAMILY = "ocr"
    DEFAULT_BUILDER_CONFIG_NAME = "rows4"
    BUILDER_CONFIGS = [  # noqa: RUF012
        OcrConfig(name="rows4", ask=("row",)),
        OcrConfig(name="grid4"),
        OcrConfig(name="all4", ask=("all",)),
        OcrConfig(name="rows5", side=5, ask=("row",)),
        OcrConfig(name="rows6", side=6, ask=("row",)),
        OcrConfig(name="grid6", side=6),
        OcrConfig(name="rows8", side=8, ask=("row",)),
        OcrConfig(name="rows4_small", ask=("row",), train=4096, test=512),
        OcrConfig(name="rows6_small", side=6, ask=("row",), train=4096, test=512),
        OcrConfig(name="rows4_photo", ask=("row",), backdrop="photo"),
        OcrConfig(name="rows4_tiny", ask=("row",), train=64, test=32),
    ]

    def chunk(self, split: str, start: int, rng: np.random.Generator, count: int) -> Chunk:
        config = self.builder_config
        side, cell = config.side, glyphs.CANVAS / config.side
        digits = rng.integers(0, 10, (count, side * side))
        glyph = glyphs.write(rng, split, digits)
        ink = np.broadcast_to(glyphs.PALETTE[glyphs.WHITE], (*glyph.shape, 3))
        placed = layouts.jittered(rng, glyph, layouts.grid_centres(side, side), 0.86 * cell, 0.06 * cell, ink)
        canvas = backdrops.backdrop(rng, config.backdrop, split, count)
        images = glyphs.draw(canvas, placed, int(cell) + 2)
        asked = questions(side, config.ask)
        answers = [read(grid, config.ask) for grid in digits.reshape(count, side, side)]
        return Chunk(images, [asked] * count, answers)
