"""Ranges of the numbers in a `ModelSpec` that was read from a file: what a model can have, so that counting its
parameters, tokens and FLOPs neither fails nor takes long."""

import dataclasses

from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import ModelSpec

_LARGEST = 10**7  # of any size: a vocabulary has a quarter of a million entries
# Sizes that may be 0, and the largest of those that work is proportional to.
_MAY_BE_ZERO = (
    "tokens", "taps", "mlp_width", "key_width", "queries", "fusion_heads", "feature_layer", "attention_layer", "merge",
    "shortest_edge", "window_pattern", "context",
)  # fmt: skip
_LIMITS = {
    "image_size": 2**14,
    "grid": 2**10,
    "depth": 2**12,
    "feature_layer": 2**12,
    "attention_layer": 2**12,
    "context": 2**40,
}
_MAX_PATCHES = 2**20
_MAX_NUMBER = 1e30


def check_model(model: ModelSpec, where: str) -> None:
    """Raises `UserError` for a size or number outside its range; messages name it behind the prefix `where`."""
    for part in ("encoder", "compressor", "decoder"):
        spec = getattr(model, part)
        if spec is not None:
            _check_part(spec, f"{where}{part}.")
    if model.encoder is not None:
        encoder = model.encoder
        if encoder.patch_size > encoder.image_size or encoder.patches > _MAX_PATCHES:
            got = f"image_size={encoder.image_size}, patch_size={encoder.patch_size}"
            raise UserError(f"{where}encoder: expected 1 to {_MAX_PATCHES:,} patches, got {got}")
        for name in ("feature_layer", "attention_layer", "taps"):
            layers = getattr(encoder, name)
            deepest = max(layers, default=0) if isinstance(layers, tuple) else layers
            if deepest > encoder.depth:
                raise UserError(f"{where}encoder.{name}: expected at most the depth, {encoder.depth}, got {deepest}")
        grid = None if model.compressor is None else model.compressor.grid
        if grid not in (None, encoder.token_grid):
            raise UserError(f"{where}compressor.grid: expected the encoder's, {encoder.token_grid}, got {grid}")


def _check_part(spec: object, where: str) -> None:
    for field in dataclasses.fields(spec):  # type: ignore[arg-type]
        value = getattr(spec, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            if isinstance(number, float):
                low, high = -_MAX_NUMBER, _MAX_NUMBER
            else:
                low = 0 if field.name in _MAY_BE_ZERO else 1
                high = _LIMITS.get(field.name, _LARGEST)
            if not low <= number <= high:
                raise UserError(f"{where}{field.name}: expected {low} to {high}, got {number}")
