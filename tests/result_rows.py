"""Result rows with plausible types, for tests that look at a few of their fields."""

import dataclasses
from collections.abc import Iterable

import numpy as np

from vlm_jax.core.rows import DEFAULTS, FIELDS, ResultRow
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
    named = {"encoder": MODEL.encoder.name, "compressor": MODEL.compressor.name, "llm": MODEL.decoder.name}
    values = (
        {
            name: (types[name] if callable(types[name]) else float)(1)
            for name in FIELDS
            if name not in ("model", *DEFAULTS)
        }
        | named
        | fields
    )
    compressor = dataclasses.replace(MODEL.compressor, name=values["compressor"], tokens=values["visual_tokens"])
    model = dataclasses.replace(
        MODEL,
        encoder=dataclasses.replace(MODEL.encoder, name=values["encoder"]),
        compressor=compressor,
        decoder=dataclasses.replace(MODEL.decoder, name=values["llm"]),
    )
    return ResultRow(**{"model": model} | values)


def on_a_law(rows: Iterable[ResultRow], alpha: float = 0.2, beta: float = 0.06) -> list[ResultRow]:
    """The same rows with errors from a power law of N and V that is .5 on average, and noise that is .01 for a seed."""
    rows, rng = list(rows), np.random.default_rng(0)
    law = np.array([row.llm_params**-alpha * max(row.visual_tokens, 1) ** -beta for row in rows])
    errors = 0.5 * law / law.mean() + rng.normal(0, 0.01, len(rows))
    return [
        dataclasses.replace(row, error=float(error) if row.visual_tokens else 0.95)
        for row, error in zip(rows, errors, strict=True)
    ]
