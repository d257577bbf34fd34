"""The study behind the README: four decoders x five token counts and the blind baseline, every family.

Part of the grid has a second seed, so that the noise of one cell is known. Large cells come first, so that no worker
ends on a long one.
"""

from vlm_jax.config.arguments import parse_arg
from vlm_jax.config.sweep import Grid, param, product

FAMILIES = ("ocr", "facts", "scene")


def get_grid(arg: str = "") -> Grid:
    arg = parse_arg(arg, family="")
    families = param("family", *((arg.family,) if arg.family else FAMILIES))
    once = product(
        families, param("llm", "d192", "d96", "d48", "d24"), param("tokens", 16, 8, 4, 2, 1, 0), param("seed", 0)
    )
    again = product(families, param("llm", "d96", "d48", "d24"), param("tokens", 16, 4, 1), param("seed", 1))
    return Grid("configs/vlm.py", once + again)
