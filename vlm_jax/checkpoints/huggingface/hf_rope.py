"""Rotary embeddings of a Hugging Face config.json <-> the `rope_*` fields of `DecoderSpec`.

Reads `rope_theta` and `rope_scaling` (transformers 4) and `rope_parameters` (transformers 5). YaRN (arXiv 2309.00071)
multiplies cosine and sine of queries and keys by an attention factor; its square is part of our `query_scale`.
"""

import math
from collections.abc import Mapping
from typing import Any

from vlm_jax.checkpoints.huggingface.fields import flag, number
from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import RAMPS, DecoderSpec, RopeBands

_FIELDS = {
    "default": (), "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "beta_slow", "beta_fast", "original_max_position_embeddings"),
}  # fmt: skip
_YARN = {"beta_slow": 1.0, "beta_fast": 32.0}  # the paper's alpha and beta (section 3.2)
_YARN_MORE = ("truncate", "attention_factor", "mscale", "mscale_all_dim")
_RAMPS = {True: RAMPS[2], False: RAMPS[1]}  # by `truncate`
_LAYER_TYPES = ("full_attention", "sliding_attention")


def read(config: Mapping[str, Any], kind: str, where: str) -> tuple[dict[str, Any], float]:
    """(`rope_*` fields of `DecoderSpec`, attention factor). Raises `UserError` for unsupported fields."""
    new, old = config.get("rope_parameters"), config.get("rope_scaling")
    for name, group in (("rope_parameters", new), ("rope_scaling", old)):
        kinds = [group, *((group[one] for one in _LAYER_TYPES if one in group) if isinstance(group, dict) else ())]
        if any(one is not None and not isinstance(one, dict) for one in kinds):
            raise UserError(f"{where}: {name}={group!r}: expected an object")
    if kind == "gemma3_text":
        return _gemma3(config, new or {}, old or {}, where), 1.0
    group = old or new or {}
    if any(one in group for one in _LAYER_TYPES):
        groups = [one for one in group.values() if one is not None] or [{}]
        if any(one != groups[0] for one in groups):
            raise UserError(f"{where}: rope_parameters: expected one group for all layer types of {kind}")
        group = groups[0]
    group, where = {"rope_theta": config.get("rope_theta", 1e4), **group}, f"{where}: {_field(old)}"
    if kind == "gemma2":
        _check_not_yarn(group, where)
    return _rope_fields(group, config, where), _attention_factor(group, where)


def _field(old: Mapping[str, Any] | None) -> str:
    return "rope_scaling" if old else "rope_parameters"


def _gemma3(config: Mapping[str, Any], new: Mapping[str, Any], old: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Gemma 3's sliding-attention layers have a `rope_theta` of their own."""
    if stray := set(new) - set(_LAYER_TYPES):
        raise UserError(f"{where}: rope_parameters: {min(stray)} belongs in one of {', '.join(_LAYER_TYPES)}")
    full = {"rope_theta": config.get("rope_theta", 1e6), **(new.get("full_attention") or {}), **old}
    sliding = {"rope_theta": config.get("rope_local_base_freq", 1e4), **(new.get("sliding_attention") or {})}
    local = _rope_fields(sliding, config, f"{where}: rope_parameters.sliding_attention")
    if local["rope_factor"] != 1 or local["rope_bands"]:
        raise UserError(f"{where}: rope_parameters.sliding_attention: expected rope_type='default'")
    where = f"{where}: {_field(old)}"
    _check_not_yarn(full, where)
    return {**_rope_fields(full, config, where), "local_rope_theta": local["rope_theta"]}


def _check_not_yarn(group: Mapping[str, Any], where: str) -> None:
    """For families with a `query_scale` of their own, from which the attention factor cannot be recovered."""
    if _type(group) == "yarn":
        raise UserError(f"{where}: rope_type='yarn' is not supported for Gemma 2 and 3")


def _type(group: Mapping[str, Any]) -> str:
    return str(group.get("rope_type", group.get("type", "default")))


def _rope_fields(group: Mapping[str, Any], config: Mapping[str, Any], where: str) -> dict[str, Any]:
    kind = _type(group)
    if kind not in _FIELDS:
        raise UserError(f"{where}: rope_type={kind!r} is not supported: expected one of {', '.join(_FIELDS)}")
    yarn = kind == "yarn"
    allowed = ("rope_type", "type", "rope_theta", *_FIELDS[kind], *(_YARN_MORE if yarn else ()))
    for name, value in group.items():
        if name not in allowed and value is not None and not (name == "partial_rotary_factor" and value == 1):
            raise UserError(f"{where}: {name}={value!r} is not supported for rope_type={kind}")
    given = {name: value for name, value in group.items() if not (name in _YARN and value is None)}
    filled = {"original_max_position_embeddings": config["max_position_embeddings"], **(_YARN if yarn else {}), **given}
    values = {}
    for name in ("rope_theta", *_FIELDS[kind]):
        if name not in filled:
            raise UserError(f"{where}: {name} is missing")
        values[name] = number(filled, name, where, float)
    bands = None
    if kind in ("llama3", "yarn"):
        low, high = _FIELDS[kind][1:3]
        if values[high] <= values[low]:
            raise UserError(f"{where}: {high} must be larger than {low}")
        if yarn and values["rope_theta"] <= 1:
            raise UserError(f"{where}: rope_theta={values['rope_theta']} must be larger than 1")
        ramp = _RAMPS[flag({"truncate": True, **group}, "truncate", where)] if yarn else RAMPS[0]
        bands = RopeBands(values[low], values[high], int(values["original_max_position_embeddings"]), ramp)
    return {"rope_theta": values["rope_theta"], "rope_factor": values.get("factor", 1.0), "rope_bands": bands}


def _attention_factor(group: Mapping[str, Any], where: str) -> float:
    """`attention_factor`, else the ratio of both `mscale` fields, else 0.1 ln s + 1 (section 3.4)."""
    if _type(group) != "yarn":
        return 1.0
    factor = number(group, "factor", where, float)
    if group.get("attention_factor") is not None:
        return number(group, "attention_factor", where, float)
    if group.get("mscale") is None or group.get("mscale_all_dim") is None:
        return _mscale(factor)
    scale, scale_all = (number(group, name, where, float) for name in ("mscale", "mscale_all_dim"))
    return _mscale(factor, scale) / _mscale(factor, scale_all)


def _mscale(factor: float, scale: float = 1.0) -> float:
    return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0


def context(trained: int, fields: Mapping[str, Any]) -> int:
    """Context length of a model with `max_position_embeddings` = `trained`, which for YaRN is often the length before
    scaling.
    """
    bands = fields["rope_bands"]
    is_yarn = bands is not None and bands.ramp in _RAMPS.values()
    return max(trained, int(fields["rope_factor"] * bands.original_context)) if is_yarn else trained


def scaling(spec: DecoderSpec, attention_factor: float) -> dict[str, Any]:
    """The `rope_scaling` entry of a spec, {} for rope_type "default"."""
    bands = spec.rope_bands
    if bands is None:
        return {"rope_scaling": {"rope_type": "linear", "factor": spec.rope_factor}} if spec.rope_factor != 1 else {}
    kind = "llama3" if bands.ramp == RAMPS[0] else "yarn"
    low, high = _FIELDS[kind][1:3]
    group = {
        "rope_type": kind, "factor": spec.rope_factor, low: bands.low, high: bands.high,
        "original_max_position_embeddings": bands.original_context,
    }  # fmt: skip
    if kind == "yarn":
        group["truncate"] = bands.ramp == _RAMPS[True]
        if abs(attention_factor - _mscale(spec.rope_factor)) > 1e-9:
            group["attention_factor"] = attention_factor
    return {"rope_scaling": group}
