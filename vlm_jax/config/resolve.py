"""ConfigDict in, `RunSpec` out, strictly both ways: an unknown key raises, a missing key raises, and impossible
choices are refused here, before anything is built. A model is named by its zoo entries; their sizes flow into the
compressor's spec.
"""

import dataclasses
import operator
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from vlm_jax.compress import catalog
from vlm_jax.core.errors import UserError, unknown
from vlm_jax.core.specs import RAMPS, CompressorSpec, ModelSpec, RunSpec, from_dict
from vlm_jax.sizing import zoo

_MODEL_KEYS = ("encoder", "taps", "feature_layer", "compressor", "projector", "llm", "vocab", "mask")
_COMPRESSOR_KEYS = ("name", "tokens", "width", "heads", "depth", "mlp_width")
_CHOICES = {
    "model.mask": ("causal", "prefix"),
    "compute.dtype": ("float32", "bfloat16"),
    "compute.remat": ("none", "dots", "block"),
    "compute.attention": ("xla", "cudnn", "splash"),
    "compute.moments": ("float32", "bfloat16"),
    "bad_step.policy": ("stop", "skip_update"),
}
_LEAST = {
    "compute.microbatches": 1,
    "compute.slices": 1,
    "data.batch_examples": 1,
    "data.questions_per_example": 1,
    "evaluation.batch_examples": 1,
    "evaluation.max_new_tokens": 1,
    "log_every_steps": 1,
    "save_every_steps": 0,
    "keep_checkpoints": 1,
    "keep_every_steps": 0,
    "evaluate_every_steps": 0,
    "evaluation.subset_examples": 1,
    "bad_step.skip_limit": 1,
}
PARTS = ("encoder", "connector", "decoder")


def resolve(config: ConfigDict) -> RunSpec:
    """Raises `UserError` that names the field, its nearest valid name and the fix."""
    values = config.to_dict()
    if "model" not in values:
        raise UserError("config field model is missing")
    spec = from_dict(RunSpec, {**_with_rates(values), "model": _model(values["model"])}, "config field ")
    _check(spec)
    return spec


def _with_rates(values: dict[str, Any]) -> dict[str, Any]:
    """Configs set one `optim.peak_lr`, and each stage a factor of it; specs hold each stage's own peak."""
    optim = dict(values.get("optim", {}))
    if "peak_lr" not in optim:
        raise UserError("config field optim.peak_lr is missing")
    peak, stages = optim.pop("peak_lr"), []
    for i, stage in enumerate(values.get("stages", ())):
        if "lr_factor" not in stage:
            raise UserError(f"config field stages.{i}.lr_factor is missing")
        stages.append({**{k: v for k, v in stage.items() if k != "lr_factor"}, "peak_lr": peak * stage["lr_factor"]})
    return {**values, "optim": optim, "stages": tuple(stages)}


def _model(values: Mapping[str, Any]) -> ModelSpec:
    _keys("model", values, _MODEL_KEYS)
    _keys("model.compressor", values["compressor"], _COMPRESSOR_KEYS)
    encoder, decoder = zoo.encoder(values["encoder"]), zoo.decoder(values["llm"])
    taps = tuple(values["taps"])
    if any(not 1 <= tap <= encoder.depth for tap in taps) or len(set(taps)) < len(taps):
        raise UserError(
            f"config field model.taps={list(taps)}: {encoder.name} has blocks 1 to {encoder.depth}, each once"
        )
    layer = values["feature_layer"]
    if not isinstance(layer, int) or not 0 <= layer <= encoder.depth:
        raise UserError(
            f"config field model.feature_layer={layer!r}: 0 (behind the last norm), or a block of {encoder.name}, 1 to "
            f"{encoder.depth}"
        )
    encoder = dataclasses.replace(encoder, taps=taps, feature_layer=layer)
    if values["vocab"]:
        decoder = dataclasses.replace(decoder, vocab=values["vocab"])
    compressor = CompressorSpec(
        grid=encoder.grid, encoder_width=encoder.width, taps=len(taps), text_width=decoder.width, **values["compressor"]
    )
    catalog.check(compressor)
    return ModelSpec(encoder, compressor, values["projector"], decoder, values["mask"])


def model_group(spec: ModelSpec) -> dict[str, Any]:
    """The group `model` of a config that resolves to this spec, every choice spelled out so that it can be set."""
    compressor = {key: getattr(spec.compressor, key) for key in _COMPRESSOR_KEYS}
    return {
        "encoder": spec.encoder.name, "taps": spec.encoder.taps, "feature_layer": spec.encoder.feature_layer,
        "compressor": compressor, "projector": spec.projector, "llm": spec.decoder.name,
        "vocab": 0,  # as in the zoo
        "mask": spec.mask,
    }  # fmt: skip


def _check(spec: RunSpec) -> None:
    """What the types cannot say."""
    for field, valid in _CHOICES.items():
        part, name = field.split(".")
        value = getattr(getattr(spec, part), name)
        if value not in valid:
            raise unknown(f"config field {field}:", value, valid)
    bands = spec.model.decoder.rope_bands
    if bands is not None and bands.ramp not in RAMPS:
        raise unknown("config field model.decoder.rope_bands.ramp:", bands.ramp, RAMPS)
    for field, least in _LEAST.items():
        value = operator.attrgetter(field)(spec)
        if value < least:
            raise UserError(f"config field {field}={value}: at least {least} is wanted")
    if spec.bad_step.spike_factor and not spec.bad_step.spike_factor > 1:
        raise UserError(f"config field bad_step.spike_factor={spec.bad_step.spike_factor}: above 1, or 0 for none")
    if spec.compute.attention == "splash" and spec.model.mask != "causal":
        raise UserError(
            f"config field compute.attention=splash: expected model.mask=causal, got {spec.model.mask}: set "
            "compute.attention=xla"
        )
    for stage in spec.stages:
        for part in stage.train:
            if part not in PARTS:
                raise unknown(f"stages ({stage.name}) train:", part, PARTS)
        if "encoder" in stage.train and spec.data.frozen_features:
            raise UserError(f"stage {stage.name} trains the encoder: set data.frozen_features=False")
        if stage.total_steps < 1:
            raise UserError(f"stage {stage.name}: total_steps={stage.total_steps}, at least 1 is wanted")
        if not 0 <= stage.warmup_steps <= stage.total_steps:
            raise UserError(f"stage {stage.name}: warmup_steps must lie between 0 and total_steps={stage.total_steps}")
    if not spec.stages:
        raise UserError("config field stages is empty: name at least one stage")


def _keys(where: str, values: Mapping[str, Any], wanted: tuple[str, ...]) -> None:
    for key in values:
        if key not in wanted:
            raise unknown(f"config field {where}.{key}:".replace("..", "."), key, wanted)
    missing = [key for key in wanted if key not in values]
    if missing:
        raise UserError(f"config field {where}.{missing[0]} is missing")


def spec_from_dict(values: Mapping[str, Any]) -> RunSpec:
    """The inverse of `core.specs.to_dict`, for a spec stored beside a checkpoint. As strict as `resolve`."""
    return from_dict(RunSpec, values, "config field ")
