"""`glyph_scene`: what limits the answer is the computation over what was seen.

Questions are the programs of `programs`; the test split asks only questions that training never asks, about digits that
never stand together in training. Two looks:

    chains2      two coloured digits, each drawn several times, colour by colour: two or three operations on both
    two, three   four digits and two shapes in free cells: two-step (three-step) questions about place and number
"""

import dataclasses

import numpy as np
import tensorflow_datasets as tfds

from vlm_jax.studies.glyphs import backdrops, glyphs, layouts
from vlm_jax.studies.glyphs.glyph_scene import programs, scenes
from vlm_jax.studies.glyphs.records import Chunk, GlyphBuilder, GlyphConfig
from vlm_jax.studies.glyphs.vocabulary import COLOURS

_SIZE, _JITTER = 13.5, 0.9  # pixels


_FREE = scenes.SceneLayout(digits=4, shapes=2, colours=6, copies=1, places="free")
_TWO_DIGITS = scenes.SceneLayout(digits=2, shapes=0, colours=2, copies=8, places="rows")
_CHAINS = ("mixed", "chain")
_TWO = ("pair", "side", "among", "nearer")
_THREE = ("triple", "reach", "tally", "meet")


@dataclasses.dataclass(eq=False)
class SceneConfig(GlyphConfig):
    ask: tuple[str, ...] = ()  # of programs.PROGRAMS
    layout: scenes.SceneLayout = _FREE
    most_common: float = 1.0  # share of scenes in which a question may have one and the same answer
    questions: int = 16


class GlyphScene(GlyphBuilder):
    """Questions of several steps about coloured digits and shapes."""

    FAMILY = "scene"
    VERSION = tfds.core.Version("2.0.0")
    DEFAULT_BUILDER_CONFIG_NAME = "chains2"
    BUILDER_CONFIGS = [  # noqa: RUF012
        SceneConfig(name="chains2", ask=_CHAINS, layout=_TWO_DIGITS, most_common=0.4),
        SceneConfig(name="two", ask=_TWO),
        SceneConfig(name="three", ask=_THREE),
        SceneConfig(name="chains2_small", ask=_CHAINS, layout=_TWO_DIGITS, most_common=0.4, train=4096, test=512),
        SceneConfig(name="two_small", ask=_TWO, train=4096, test=512),
        SceneConfig(name="chains2_photo", ask=_CHAINS, layout=_TWO_DIGITS, most_common=0.4, backdrop="photo"),
        SceneConfig(name="three_photo", ask=_THREE, backdrop="photo"),
        SceneConfig(name="two_tiny", ask=_TWO, questions=4, train=64, test=32),
    ]

    def chunk(self, split: str, start: int, rng: np.random.Generator, count: int) -> Chunk:
        config = self.builder_config
        shown = scenes.sample(rng, split, count, config.layout)
        asked = programs.table(config.ask, config.layout, config.most_common)
        answer = programs.answers(asked, shown)
        chosen = programs.choose(rng, asked, answer, asked.held_out == (split == "test"), config.questions)
        answer = np.take_along_axis(answer, chosen, axis=1)
        return Chunk(
            glyphs.draw(
                backdrops.backdrop(rng, config.backdrop, split, count), _placed(rng, split, shown), int(_SIZE) + 4
            ),
            [[asked.texts[q] for q in row] for row in chosen],
            [[programs.ANSWERS[a] for a in row] for row in answer],
        )


def _placed(rng: np.random.Generator, split: str, shown: scenes.Scenes) -> glyphs.Placed:
    """The objects of scenes as glyphs, each copy of a digit by another instance."""
    count, colours, copies = shown.cells.shape
    value, shape = (np.repeat(a, copies, axis=1) for a in (shown.value, shown.shape))
    cells = shown.cells.reshape(count, colours * copies)
    digit = glyphs.write(rng, split, np.maximum(value, 0))
    glyph = np.where(shape >= 0, glyphs.shape_glyphs(np.maximum(shape, 0)), digit)
    ink = np.broadcast_to(np.repeat(glyphs.PALETTE[: len(COLOURS)], copies, axis=0), (*glyph.shape, 3))
    y, x = layouts.grid_centres(scenes.SIDE, scenes.SIDE)
    placed = layouts.jittered(rng, glyph, (y[cells], x[cells]), _SIZE, _JITTER, ink)
    return placed._replace(size=np.where(cells >= 0, placed.size, 0))
