"""Connectors of LLaVA's own code and of the projects that build on it, as specs and as tables of tensors: projectors,
TokenPacker (arXiv 2407.02392) and QueCC (arXiv 2411.03312).

    mm_projector.{weight, bias}                     "linear", LLaVA-1
    mm_projector.{0, 2}.*                           "mlp2x_gelu", LLaVA-1.5
    mm_projector.{q_proj_1, clip_attn, mlp.0, ...}  TokenPacker, whatever `mm_projector_type` says
    mm_projector.0.*, mm_projector.{1, 3}.*         QueCC in front of the projector
"""

import math
from collections.abc import Mapping
from typing import Any

from vlm_jax.checkpoints.huggingface import fields
from vlm_jax.checkpoints.tensor_files import TensorFiles
from vlm_jax.checkpoints.tensor_tables import TensorTable, conv_patch, linear, multi_head, norm, same
from vlm_jax.compress.local import tapped_layers
from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import CompressorSpec, EncoderSpec

_HEADS = 8  # of TokenPacker and QueCC
_TAPS = (12, 16, 22, 23)  # of both
_SCALE = 2  # of TokenPacker's first code, whose config does not have it
_KERNEL, _STRIDE, _PATCHES, _TEXT = (
    "mm_vision_token_compression_kernel_size", "mm_vision_token_compression_stride", "mm_vision_output_token_count",
    "mm_vision_output_text_embedding_size",
)  # fmt: skip
READ = {"mm_projector_type", "scale_factor", "down_rate", _KERNEL, _STRIDE, _PATCHES, _TEXT}
FIXED: dict[str, tuple[Any, ...]] = {"mm_vision_token_compression_type": ("quecc",)}
_LAYERS = {"linear": 1, "mlp1x_gelu": 1, "mlp2x_gelu": 2, "tokenpacker": 0}  # of `mm_projector_type`


def find(weights: TensorFiles, prefix: str, mm: Mapping[str, Any], where: str) -> tuple[str, tuple[str, ...]]:
    """(compressor, names of the projector's linear layers), from the tensors behind `prefix`."""
    names = {name.removeprefix(prefix) for name in weights.shapes if name.startswith(prefix)}
    if {"q_proj_1.weight", "mlp.0.weight", "mlp.2.weight"} <= names:
        return "tokenpacker", ("mlp.0.", "mlp.2.")
    method = "quecc" if "0.q_downsample.weight" in names else "none"
    kind, claimed = mm.get("mm_projector_type"), mm.get("mm_vision_token_compression_type")
    if kind not in (None, *_LAYERS):
        raise UserError(f"{where}: mm_projector_type={kind!r} is not supported: expected {', '.join(_LAYERS)}")
    first = 1 if method == "quecc" else 0
    layers = tuple(f"{i}." for i in range(first, first + 4, 2) if f"{i}.weight" in names)
    layers = ("",) if "weight" in names else layers
    if not layers or len(layers) != _LAYERS.get(kind, len(layers)) or (claimed == "quecc") > (method == "quecc"):
        said = f"mm_projector_type={kind!r}" + (f", mm_vision_token_compression_type={claimed!r}" if claimed else "")
        listed = ", ".join(sorted(names)[:4])
        raise UserError(f"{weights.path}: expected the connector of {said}, got the tensors {prefix}{{{listed}, ...}}")
    return method, layers


def taps(encoder: EncoderSpec) -> tuple[int, ...]:
    """The published blocks, or those at the same places of a tower that has fewer."""
    return _TAPS if encoder.depth >= _TAPS[-1] else tapped_layers(encoder)


def compressor_spec(
    method: str, encoder: EncoderSpec, width: int, mm: Mapping[str, Any], where: str
) -> CompressorSpec | None:
    """The spec of TokenPacker or QueCC before a language model of that width; None: all patches are projected."""
    if method == "none":
        return None
    if method == "tokenpacker":
        name = "down_rate" if "scale_factor" not in mm and "down_rate" in mm else "scale_factor"
        side = fields.number({name: _SCALE, **mm}, name, where)
    else:
        given = {_KERNEL: 4, _STRIDE: 4, _PATCHES: encoder.patches, _TEXT: width, **mm}
        name, side = _STRIDE, fields.number(given, _STRIDE, where)
        for field, value in ((_KERNEL, side), (_PATCHES, encoder.patches), (_TEXT, width)):
            if given[field] != value:
                raise UserError(f"{where}: {field}={given[field]!r}: expected {value}")
    rows, e = encoder.grid[0], encoder.width
    if rows % side:
        divisors = ", ".join(str(n) for n in range(1, rows + 1) if rows % n == 0)
        raise UserError(f"{where}: {name}={side}: expected a divisor of the tower's {rows} patches a side ({divisors})")
    tokens, heads = (rows // side) ** 2, math.gcd(_HEADS, e)
    return CompressorSpec(method, tokens, encoder.grid, e, len(taps(encoder)), width, e, heads, 1, 0)


def compressor_table(prefix: str, spec: CompressorSpec) -> TensorTable:
    """The compressor's weights, under `prefix`."""
    table = {"tokenpacker": _tokenpacker, "quecc": _quecc}[spec.name](prefix, spec)
    return {f"compressor/{path}": leaf for path, leaf in table.items()}


def _tokenpacker(prefix: str, spec: CompressorSpec) -> TensorTable:
    """The weights of `compress.local.tokenpacker` in `TokenPacker`."""
    e, w, z = (spec.encoder_width,), (spec.width,), (spec.taps * spec.encoder_width,)
    table = {
        "query/kernel": linear(f"{prefix}q_proj_1.weight", e, w),
        **norm("query_norm", f"{prefix}ln_q_1", spec.width),
    }
    for part, name in (("keys", "k"), ("values", "v")):
        table |= _mlp(part, f"{prefix}{name}_proj_1.", z, w) | norm(f"{part}_norm", f"{prefix}ln_{name}_1", spec.width)
    return table | multi_head("attention", f"{prefix}clip_attn.", spec.width, spec.heads)


def _quecc(prefix: str, spec: CompressorSpec) -> TensorTable:
    """The weights of `compress.local.quecc` in `QueCC`, the first layer of the connector."""
    e, w, z = (spec.encoder_width,), (spec.width,), (spec.taps * spec.encoder_width,)
    side, text, down = (
        spec.grid[0] // math.isqrt(spec.tokens),
        f"{prefix}0.text_projection.",
        f"{prefix}0.q_downsample.",
    )
    table = {
        "text/kernel": linear(f"{text}0.weight", (spec.text_width,), e),
        "text/bias": same(f"{text}0.bias", e),
        **norm("text_norm", f"{text}1", spec.encoder_width),
        "down/kernel": conv_patch(f"{down}weight", side, spec.width, channels=1),  # depthwise
        "down/bias": same(f"{down}bias", w),
    }
    for part, name, inputs in (("query", "q", e), ("keys", "k", z), ("values", "v", z)):
        hf_name = f"{prefix}0.{name}_proj."
        table |= _mlp(part, hf_name, inputs, w) | norm(f"{part}_norm", f"{hf_name}3", spec.width)
    return table | multi_head("attention", f"{prefix}0.clip_attn.", spec.width, spec.heads)


def _mlp(path: str, hf_name: str, inputs: tuple[int, ...], width: tuple[int, ...]) -> TensorTable:
    """Linear, GELU, Linear as a torch Sequential."""
    table = {}
    for name, number, size in (("up", 0, inputs), ("down", 2, width)):
        table[f"{path}/{name}/kernel"] = linear(f"{hf_name}{number}.weight", size, width)
        table[f"{path}/{name}/bias"] = same(f"{hf_name}{number}.bias", width)
    return table
