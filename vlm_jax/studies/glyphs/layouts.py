"""Where glyphs stand: regular grids with jitter."""

import numpy as np
from jaxtyping import Float, Int

from vlm_jax.studies.glyphs import glyphs


def grid_centres(rows: int, columns: int) -> tuple[Float[np.ndarray, " cells"], Float[np.ndarray, " cells"]]:
    """Centres (y, x) in pixels of the cells of a grid that fills the canvas, row by row."""
    y, x = ((np.arange(n) + 0.5) * glyphs.CANVAS / n for n in (rows, columns))
    return np.repeat(y, columns), np.tile(x, rows)


def jittered(
    rng: np.random.Generator,
    glyph: Int[np.ndarray, "n m"],
    centres: tuple[Float[np.ndarray, "*m"], Float[np.ndarray, "*m"]],
    size: float,
    jitter: float,
    colour: Float[np.ndarray, "n m 3"],
) -> glyphs.Placed:
    """Glyphs near their centres: positions vary by `jitter` pixels, sizes and intensities a little."""
    shape = glyph.shape
    y, x = (c + rng.uniform(-jitter, jitter, shape) for c in centres)
    ink = colour * rng.uniform(0.75, 1.0, (*shape, 1))
    return glyphs.Placed(glyph, y, x, size * rng.uniform(0.92, 1.08, shape), ink.astype(np.float32))
