"""The study behind the README (experiments/size_by_tokens/DESIGN.md): four decoders x five token counts and the blind
baseline, three families, three seeds.

    python -m experiments.launch --grid configs/grids/size_by_tokens.py --workdir experiments/size_by_tokens

`part=longer` is three corner cells of each family at 1.5 times the steps, `part=elastic` one model of all V for each
decoder. Cells of one program lie side by side, so that a worker compiles it once; within a family large ones come
first, so that no worker ends on a long one.
"""

from vlm_jax.config.arguments import parse_arg
from vlm_jax.config.sweep import Cells, Grid, param, product
from vlm_jax.core.errors import unknown

FAMILIES = ("ocr", "facts", "scene")
LLMS, TOKENS, SEEDS = ("d64", "d32", "d16", "d8"), (16, 8, 4, 2, 1), (0, 1, 2)
CORNERS = (("d64", 16), ("d64", 1), ("d8", 1))
LONGER, ELASTIC = 1.5, 2.0  # times the steps of a cell
PARTS = ("cells", "longer", "elastic")


def get_grid(arg: str = "") -> Grid:
    arg = parse_arg(arg, family="", part="cells")
    if arg.part not in PARTS:
        raise unknown("part", arg.part, PARTS)
    families = (arg.family,) if arg.family else FAMILIES
    return Grid("configs/vlm.py", sum((_cells(family, arg.part) for family in families), ()))


def _cells(family: str, part: str) -> Cells:
    one, llms, seeds = param("family", family), param("llm", *LLMS), param("seed", *SEEDS)
    if part == "cells":
        return product(one, llms, param("tokens", *TOKENS, 0), seeds)
    if part == "longer":
        corners = tuple({"llm": llm, "tokens": tokens} for llm, tokens in CORNERS)
        return product(one, corners, param("steps_factor", LONGER), seeds)
    every = param("elastic", "+".join(map(str, sorted(TOKENS))))
    return product(one, llms, every, param("steps_factor", ELASTIC), param("seed", SEEDS[0]))
