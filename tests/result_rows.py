"""Result rows with plausible types, for tests that look at a few of their fields."""

import dataclasses

from vlm_jax.core.rows import FIELDS, ResultRow
from vlm_jax.core.specs import ModelSpec

MODEL = ModelSpec(None, None, None, None, "causal")


def row(**fields: object) -> ResultRow:
    types = {field.name: field.type for field in dataclasses.fields(ResultRow)}
    return ResultRow(**{name: types[name](1) for name in FIELDS if name != "model"} | {"model": MODEL} | fields)
