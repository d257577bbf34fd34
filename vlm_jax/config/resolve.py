"""`ConfigDict` -> `RunSpec`. Unknown keys, missing keys and invalid choices raise `UserError` before anything is built.
Encoder and decoder are names of `sizing.zoo`.
"""

import dataclasses
import operator
import reprlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from vlm_jax.compress import catalog
from vlm_jax.compress.contract import PROJECTORS, encoder_for, key_width
from vlm_jax.config import ranges
from vlm_jax.core.errors import UserError, unknown
from vlm_jax.core.model_ranges import check_model
from vlm_jax.core.specs import (
    ELASTIC_STEPS,
    RAMPS,
    CompressorSpec,
    DataSpec,
    ModelSpec,
    RunSpec,
    StageSpec,
    data_of,
    from_dict,
    total_steps,
    views_of_row,
)
from vlm_jax.sizing import remat, zoo

_MODEL_KEYS = ("encoder", "taps", "feature_layer", "merge", "compressor", "projector", "llm", "vocab", "mask")
_COMPRESSOR_KEYS = ("name", "tokens", "width", "heads", "depth", "mlp_width")
_METHOD_KEYS = ("queries", "elastic", "fusion_heads")  # of the compressor, where its method has them
_MODEL_TYPES = {
    "encoder": str,
    "llm": str,
    "projector": str,
    "mask": str,
    "taps": tuple,
    "feature_layer": int,
    "vocab": int,
    "merge": tuple,
}
_CHOICES = {
    "model.projector": PROJECTORS,
    "model.mask": ("causal", "prefix"),
    "compute.dtype": ("float32", "bfloat16"),
    "compute.remat": ("auto", *remat.POLICIES),
    "compute.attention": ("xla", "cudnn", "splash"),
    "compute.moments": ("float32", "bfloat16"),
    "bad_step.policy": ("stop", "skip_update"),
    "elastic": ELASTIC_STEPS,
    "data.pack": ("none", "fit"),
    "data.long": ("cut", "drop"),
    "data.resize": ("", "squash", "crop", "pad"),
}
PARTS = ("encoder", "connector", "decoder")


def resolve(config: ConfigDict) -> RunSpec:
    """The spec of a config. Raises `UserError` that names the field and the fix."""
    values = config.to_dict()
    if "model" not in values:
        raise UserError("config field model is missing")
    model = _model(_group(values, "model"))
    spec = from_dict(RunSpec, {**_with_rates(values), "model": model}, "config field ")
    _check(spec)
    return spec


def _with_rates(values: dict[str, Any]) -> dict[str, Any]:
    """Replaces `optim.peak_lr` and the `lr_factor` of each stage by a `peak_lr` of each stage."""
    optim, given = dict(_group(values, "optim")), values.get("stages")
    peak, stages = _rate(optim, "optim.peak_lr"), []
    if not isinstance(given, list | tuple):
        raise UserError(f"config field stages: expected a tuple of stages, got {reprlib.repr(given)}")
    del optim["peak_lr"]
    for i in range(len(given)):
        stage = _group(given, str(i), "stages.")
        _rate(stage, f"stages.{i}.lr_factor")
        rest = {name: value for name, value in stage.items() if name != "lr_factor"}
        stages.append({**rest, "peak_lr": peak * stage["lr_factor"]})
    return {**values, "optim": optim, "stages": tuple(stages)}


def _group(values: Any, name: str, where: str = "") -> Mapping[str, Any]:
    """The group `name` of a group or tuple. Raises `UserError` where it is something else."""
    group = values[int(name)] if isinstance(values, list | tuple) else values.get(name)
    if not isinstance(group, Mapping):
        raise UserError(f"config field {where}{name}: expected a group of fields, got {reprlib.repr(group)}")
    return group


def _rate(group: Mapping[str, Any], field: str) -> float:
    """The rate of that dotted name, the last part of which is in `group`."""
    name = field.rpartition(".")[2]
    if name not in group:
        raise UserError(f"config field {field} is missing")
    ranges.check_number(f"config field {field}", group[name], ranges.RATE)
    return group[name]


def _model(values: Mapping[str, Any]) -> ModelSpec:
    values = {"merge": (), **values}
    _keys("model", values, _MODEL_KEYS)
    sizes = _group(values, "compressor", "model.")
    _keys("model.compressor", sizes, (*_COMPRESSOR_KEYS, *(key for key in _METHOD_KEYS if key in sizes)))
    for name, kind in _MODEL_TYPES.items():
        if not isinstance(values[name], kind) or isinstance(values[name], bool):
            raise UserError(f"config field model.{name}: expected {kind.__name__}, got {reprlib.repr(values[name])}")
    if not isinstance(sizes["name"], str):
        raise UserError(f"config field model.compressor.name: expected str, got {reprlib.repr(sizes['name'])}")
    encoder, decoder = zoo.encoder(values["encoder"]), zoo.decoder(values["llm"])
    taps, layer = values["taps"], values["feature_layer"]
    if any(type(tap) is not int or not 1 <= tap <= encoder.depth for tap in taps) or len(set(taps)) < len(taps):
        raise UserError(f"config field model.taps: expected distinct blocks, 1 to {encoder.depth}, got {list(taps)}")
    if not 0 <= layer <= encoder.depth:
        raise UserError(f"config field model.feature_layer: expected a block, 0 to {encoder.depth}, got {layer!r}")
    if any(type(pairs) is not int for pairs in values["merge"]):
        raise UserError(f"config field model.merge: expected integers, got {reprlib.repr(values['merge'])}")
    encoder = dataclasses.replace(encoder, feature_layer=layer, merge=values["merge"])
    encoder = dataclasses.replace(encoder_for(catalog.row(sizes["name"]), encoder), taps=taps)
    ranges.check_number("config field model.vocab", values["vocab"], ranges.COUNT_OR_NONE)
    if values["vocab"]:
        decoder = dataclasses.replace(decoder, vocab=values["vocab"])
    catalog.check_encoder(sizes["name"], encoder)
    found = dict(grid=encoder.token_grid, encoder_width=encoder.width, taps=len(taps), text_width=decoder.width)
    found["key_width"] = key_width(encoder)
    compressor = from_dict(CompressorSpec, {**sizes, **found}, "config field model.compressor.")
    model = ModelSpec(encoder, compressor, values["projector"], decoder, values["mask"])
    _check_compressor(model)
    return model


def _check_compressor(model: ModelSpec) -> None:
    """Raises `UserError` for a compressor that does not fit the encoder or the decoder."""
    catalog.check_encoder(model.compressor.name, model.encoder)
    catalog.check(model.compressor)
    catalog.check_decoder(model)


def model_group(spec: ModelSpec) -> dict[str, Any]:
    """The config group `model` that resolves to this spec."""
    given = tuple(key for key in _METHOD_KEYS if getattr(spec.compressor, key))
    compressor = {key: getattr(spec.compressor, key) for key in (*_COMPRESSOR_KEYS, *given)}
    return {
        "encoder": spec.encoder.name, "taps": spec.encoder.taps, "feature_layer": spec.encoder.feature_layer,
        "merge": spec.encoder.merge,
        "compressor": compressor, "projector": spec.projector, "llm": spec.decoder.name,
        "vocab": 0,  # as in the zoo
        "mask": spec.mask,
    }  # fmt: skip


def _check(spec: RunSpec) -> None:
    """Raises `UserError` for invalid values and combinations."""
    for part in ("encoder", "compressor", "decoder"):
        if getattr(spec.model, part) is None:
            raise UserError(f"config field model.{part} is missing")
    ranges.check(spec, "config field ")
    _check_compressor(spec.model)
    for i, (pattern, _) in enumerate(spec.optim.lr_scale):
        ranges.check_regex(f"config field optim.lr_scale.{i}.0", pattern)
    for field, valid in _CHOICES.items():
        if (value := operator.attrgetter(field)(spec)) not in valid:
            raise unknown(f"config field {field}:", value, valid)
    bands = spec.model.decoder.rope_bands
    if bands is not None and bands.ramp not in RAMPS:
        raise unknown("config field model.decoder.rope_bands.ramp:", bands.ramp, RAMPS)
    if (factor := spec.bad_step.spike_factor) and not factor > 1:
        raise UserError(f"config field bad_step.spike_factor: expected a number above 1, or 0 for none, got {factor}")
    if spec.compute.attention == "splash" and spec.model.mask != "causal":
        raise UserError(
            f"config field compute.attention=splash: expected model.mask=causal, got {spec.model.mask}: set "
            "compute.attention=xla"
        )
    if catalog.hides_tokens(spec.model) and spec.compute.attention != "xla":
        raise UserError(
            f"config field compute.attention: expected xla for compressor {spec.model.compressor.name}, got "
            f"{spec.compute.attention}"
        )
    compressor = spec.model.compressor
    if spec.elastic != ELASTIC_STEPS[0] and not compressor.elastic:
        raise UserError(
            f"config field elastic={spec.elastic}: expected a compressor with several V (set elastic=1+4+16)"
        )
    if compressor.elastic and compressor.tokens != compressor.elastic[-1]:
        raise UserError(
            f"config field model.compressor.tokens: expected {compressor.elastic[-1]}, the most of "
            f"elastic={list(compressor.elastic)}, got {compressor.tokens}"
        )
    for data in dict.fromkeys([spec.data, *(data_of(spec, stage) for stage in spec.stages)]):
        _check_rows(spec, data)
    for stage in spec.stages:
        if not stage.train:
            raise UserError(f"stages ({stage.name}) train: expected some of {', '.join(PARTS)}, got none")
        for part in stage.train:
            if part not in PARTS:
                raise unknown(f"stages ({stage.name}) train:", part, PARTS)
        if "encoder" in stage.train and spec.data.frozen_features:
            raise UserError(f"stage {stage.name} trains the encoder: set data.frozen_features=False")
        _check_length(stage)
    if not spec.data.train and not all(stage.data and stage.data.train for stage in spec.stages):
        raise UserError("config field data.train: expected at least one source, got none")
    if not spec.stages:
        raise UserError("config field stages: expected at least one stage, got none")
    if total_steps(spec) > ranges.COUNT.high:
        raise UserError(f"config field stages: expected at most {ranges.COUNT.high} steps in all")
    if 0 in spec.compute.mesh:
        raise UserError(f"config field compute.mesh: expected sizes of 1 or more, or one -1, got {spec.compute.mesh}")


def _check_rows(spec: RunSpec, data: DataSpec) -> None:
    """Raises `UserError` for rows that the compressor's tokens cannot be part of."""
    name, own = spec.model.compressor.name, catalog.has_own_views(spec.model, spec.compute, data)
    if catalog.hides_tokens(spec.model):
        if data.pack != "none":
            raise UserError(f"config field data.pack: expected none for compressor {name}, got {data.pack}")
        several = data.questions_per_example != 1 and any(source.separate for source in data.train)
        if own and several:
            raise UserError(
                f"config field data.questions_per_example: expected 1 for compressor {name} and data.format="
                f"{data.format}, got {data.questions_per_example}"
            )
    least = views_of_row(data, own) * catalog.leaving(spec.model) + 1
    if data.row_tokens < least:
        raise UserError(
            f"config field data.row_tokens: expected at least {least} for compressor {name} and "
            f"{views_of_row(data, own)} images a row, got {data.row_tokens} (or set data.row_images)"
        )


def _check_length(stage: StageSpec) -> None:
    lengths = {name: getattr(stage, name) for name in ("total_steps", "epochs", "examples")}
    if sum(value > 0 for value in lengths.values()) != 1:
        raise UserError(
            f"stage {stage.name}: expected one of total_steps, epochs and examples above 0, got "
            f"{', '.join(f'{name}={value}' for name, value in lengths.items())}"
        )
    if stage.warmup_steps and stage.warmup_share:
        raise UserError(
            f"stage {stage.name}: expected warmup_steps or warmup_share, got both ({stage.warmup_steps} and "
            f"{stage.warmup_share:g})"
        )
    if stage.total_steps and stage.warmup_steps >= stage.total_steps:
        raise UserError(
            f"stage {stage.name}: expected warmup_steps from 0 to below its steps, got {stage.warmup_steps} of "
            f"{stage.total_steps or 'those of its data'}"
        )
    if stage.data is not None and stage.data.resize not in _CHOICES["data.resize"]:
        raise unknown(f"stages ({stage.name}) data.resize:", stage.data.resize, _CHOICES["data.resize"])


def _keys(where: str, values: Mapping[str, Any], expected: tuple[str, ...]) -> None:
    for key in values:
        if key not in expected:
            raise unknown(f"config field {where}.{key}:".replace("..", "."), key, expected)
    missing = [key for key in expected if key not in values]
    if missing:
        raise UserError(f"config field {where}.{missing[0]} is missing")


def spec_from_dict(values: Mapping[str, Any]) -> RunSpec:
    """The inverse of `core.specs.to_dict`, for a spec stored with a checkpoint, whose stages have the numbers of steps
    that followed from the data. Raises `UserError`."""
    spec = from_dict(RunSpec, values, "config field ")
    check_model(spec.model, "config field model.")
    _check(dataclasses.replace(spec, stages=tuple(map(_as_given, spec.stages))))
    return spec


def _as_given(stage: StageSpec) -> StageSpec:
    """The stage without the numbers of steps that follow from the data."""
    steps = 0 if stage.epochs or stage.examples else stage.total_steps
    return dataclasses.replace(stage, total_steps=steps, warmup_steps=0 if stage.warmup_share else stage.warmup_steps)
