"""`glyph_facts`: identifying the entity takes little vision; holding the table of facts takes parameters.

An entity is an ordered triple of digits. The canvas shows three rows, the first digit of the triple five times in the
first row (by five writings), and so on, so that a single misread glyph does not change the entity. A relation is a
word, and the fact is a person from a table drawn once at random by the config's seed:

    who painted -> nora

Entities appear with Zipf's frequencies, p ~ 1 / (rank + 5), in both splits. The drawing is *systematic*: an
entity's number of images is its expectation, rounded up or down at random, so neither split adds sampling noise
to the frequencies. The test split shows the same entities in handwriting never seen in training. Every record stores
all relations, so the facts of one entity are asked equally often.
"""

import dataclasses
import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from vlm_jax.studies.glyphs import backdrops, glyphs, layouts, vocabulary
from vlm_jax.studies.glyphs.records import Chunk, GlyphBuilder, GlyphConfig

ROWS, COPIES = 3, 5
_SIZE = 12.5  # pixels a side of a glyph
_ZIPF_OFFSET = 5


@dataclasses.dataclass(eq=False)
class FactsConfig(GlyphConfig):
    entities: int = 1000
    relations: int = 16
    people: int = 16  # possible answers


class World(NamedTuple):
    """What is true: entities in order of frequency, and the person that stands in every relation to each."""

    triples: Int[np.ndarray, "entities 3"]
    facts: Int[np.ndarray, "entities relations"]
    frequency: Float[np.ndarray, " entities"]


@functools.cache
def world(entities: int, relations: int, people: int, seed: int) -> World:
    """The table of facts that belongs to a seed."""
    rng = np.random.default_rng([seed, 2])
    codes = rng.permutation(1000)[:entities]
    triples = np.stack([codes // 100, codes // 10 % 10, codes % 10], axis=1)
    weight = 1 / (np.arange(1, entities + 1) + _ZIPF_OFFSET)
    return World(triples, rng.integers(0, people, (entities, relations)), weight / weight.sum())


def systematic(rng: np.random.Generator, frequency: Float[np.ndarray, " k"], count: int) -> Int[np.ndarray, " count"]:
    """`count` draws in random order in which every item appears its expected number of times, rounded up or down."""
    edges = np.cumsum(frequency) * count
    drawn = np.searchsorted(edges, np.arange(count) + rng.random(), side="right")
    return rng.permutation(np.minimum(drawn, len(frequency) - 1))


class GlyphFacts(GlyphBuilder):
    """Facts about entities that are shown as triples of handwritten digits."""

    FAMILY = "facts"
    DEFAULT_BUILDER_CONFIG_NAME = "facts1000"
    BUILDER_CONFIGS = [  # noqa: RUF012
        FactsConfig(name="facts1000"),
        FactsConfig(name="facts1000x8", relations=8),
        FactsConfig(name="facts256", entities=256, relations=8),
        FactsConfig(name="facts256_small", entities=256, relations=8, train=4096, test=512),
        FactsConfig(name="facts1000_photo", backdrop="photo"),
        FactsConfig(name="facts_tiny", entities=10, relations=4, people=4, train=64, test=32),
    ]

    @property
    def world(self) -> World:
        config = self.builder_config
        return world(config.entities, config.relations, config.people, config.seed)

    def drawn(self, split: str) -> Int[np.ndarray, " records"]:
        """The entity of every record of a split."""
        config = self.builder_config
        rng = np.random.default_rng([config.seed, 3, glyphs.SPLITS.index(split)])
        return systematic(rng, self.world.frequency, getattr(config, split))

    def chunk(self, split: str, start: int, rng: np.random.Generator, count: int) -> Chunk:
        config = self.builder_config
        entity = self.drawn(split)[start : start + count]
        digits = np.repeat(self.world.triples[entity], COPIES, axis=1)
        glyph = glyphs.write(rng, split, digits)
        ink = np.broadcast_to(glyphs.PALETTE[glyphs.WHITE], (*glyph.shape, 3))
        placed = layouts.jittered(rng, glyph, layouts.grid_centres(ROWS, COPIES), _SIZE, 0.8, ink)
        canvas = backdrops.backdrop(rng, config.backdrop, split, count)
        asked = [f"who {relation}" for relation in vocabulary.RELATIONS[: config.relations]]
        answers = [[vocabulary.PEOPLE[p] for p in row] for row in self.world.facts[entity]]
        return Chunk(glyphs.draw(canvas, placed, int(_SIZE) + 4), [asked] * count, answers)
