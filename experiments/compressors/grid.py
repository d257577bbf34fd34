"""Trained compressors at V = 1, 4, 16 and two seeds on the glyph families, and elastic ones beside them.

    python -m experiments.launch --grid experiments/compressors/grid.py --workdir workdirs/compressors

`grid.py:family=ocr` is one family. Cells of one program lie side by side, so that a worker compiles it once.
"""

from vlm_jax.config.arguments import parse_arg
from vlm_jax.config.sweep import Grid, param, product

FAMILIES = ("ocr", "facts", "scene")
TRAINED = (
    "resampler", "pool", "m3", "pixel_shuffle", "idefics3", "ldpv2", "c_abstractor", "perceiver", "mqt",
    "token_learner", "token_learner_conv", "tokenpacker", "qformer", "quecc", "voco", "victor", "llava_mini",
    "qformer_question",
)  # fmt: skip
ELASTIC = ("resampler", "mqt", "m3")
TOKENS = (16, 4, 1)
SEEDS = (0, 1)


def get_grid(arg: str = "") -> Grid:
    arg = parse_arg(arg, family="", steps=400)
    rest = product(
        param("family", *([arg.family] if arg.family else FAMILIES)), param("steps", arg.steps), param("seed", *SEEDS)
    )
    longer = tuple({**cell, "steps": len(TOKENS) * arg.steps} for cell in rest)  # as many updates for each V
    every = param("elastic", "+".join(map(str, sorted(TOKENS))))
    return Grid(
        "experiments/compressors/config.py",
        product(param("compressor", "none"), param("tokens", 64), rest)  # on which training-free ones are tried
        + product(param("compressor", "blind"), param("tokens", 0), rest)
        + product(param("compressor", *ELASTIC), every, rest)
        + product(param("compressor", "resampler"), every, param("elastic_steps", "most"), rest)
        + product(param("compressor", *ELASTIC), every, longer)
        + product(param("compressor", *TRAINED), param("tokens", *TOKENS), rest),
    )
