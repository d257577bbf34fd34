"""Result rows with plausible types, for tests that look at a few of their fields."""

import dataclasses

from vlm_jax.core.rows import FIELDS, ResultRow
from vlm_jax.core.specs import CompressorSpec, DecoderSpec, EncoderSpec, ModelSpec

MODEL = ModelSpec(
    EncoderSpec("test", 16, 4, 16, 3, 2, 24),
    CompressorSpec("pool", 1, (4, 4), 16, 0, 16, 16, 2, 1, 24),
    "linear",
    DecoderSpec("test", 16, 2, 4, 2, 8, 24, 32),
    "causal",
)


def row(**fields: object) -> ResultRow:
    types = {field.name: field.type for field in dataclasses.fields(ResultRow)}
    return ResultRow(**{name: types[name](1) for name in FIELDS if name != "model"} | {"model": MODEL} | fields)
