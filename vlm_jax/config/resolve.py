"""`ConfigDict` -> `RunSpec`. Unknown keys, missing keys and invalid choices raise `UserError` before anything is built.
Encoder and decoder are names of `sizing.zoo`.
"""

import dataclasses
import operator
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from vlm_jax.compress import catalog
from vlm_jax.compress.contract import encoder_for, key_width
from vlm_jax.core.errors import UserError, unknown
from vlm_jax.core.specs import RAMPS, CompressorSpec, ModelSpec, RunSpec, from_dict
from vlm_jax.sizing import zoo

_CHOSEN_KEYS = ("merge",)  # of the model, where the encoder's spec has them
_MODEL_KEYS = ("encoder", "taps", "feature_layer", "compressor", "projector", "llm", "vocab", "mask")
_COMPRESSOR_KEYS = ("name", "tokens", "width", "heads", "depth", "mlp_width")
_METHOD_KEYS = ("queries", "elastic", "fusion_heads")  # of the compressor, where its method has them
_CHOICES = {
    "model.mask": ("causal", "prefix"),
    "compute.dtype": ("float32", "bfloat16"),
    "compute.remat": ("none", "dots", "block"),
    "compute.attention": ("xla", "cudnn", "splash"),
    "compute.moments": ("float32", "bfloat16"),
    "bad_step.policy": ("stop", "skip_update"),
}
_POSITIVE = (
    "compute.microbatches", "compute.slices", "data.batch_examples", "data.questions_per_example",
    "evaluation.batch_examples", "evaluation.max_new_tokens", "evaluation.subset_examples", "log_every_steps",
    "keep_checkpoints", "bad_step.skip_limit",
)  # fmt: skip
_MINIMUM = dict.fromkeys(("save_every_steps", "keep_every_steps", "evaluate_every_steps"), 0) | dict.fromkeys(
    _POSITIVE, 1
)
PARTS = ("encoder", "connector", "decoder")


def resolve(config: ConfigDict) -> RunSpec:
    """The spec of a config. Raises `UserError` that names the field and the fix."""
    values = config.to_dict()
    if "model" not in values:
        raise UserError("config field model is missing")
    spec = from_dict(RunSpec, {**_with_rates(values), "model": _model(values["model"])}, "config field ")
    _check(spec)
    return spec


def _with_rates(values: dict[str, Any]) -> dict[str, Any]:
    """Replaces `optim.peak_lr` and the `lr_factor` of each stage by a `peak_lr` of each stage."""
    optim = dict(values.get("optim", {}))
    if "peak_lr" not in optim:
        raise UserError("config field optim.peak_lr is missing")
    peak, stages = optim.pop("peak_lr"), []
    for i, stage in enumerate(values.get("stages", ())):
        if "lr_factor" not in stage:
            raise UserError(f"config field stages.{i}.lr_factor is missing")
        rest = {name: value for name, value in stage.items() if name != "lr_factor"}
        stages.append({**rest, "peak_lr": peak * stage["lr_factor"]})
    return {**values, "optim": optim, "stages": tuple(stages)}


def _model(values: Mapping[str, Any]) -> ModelSpec:
    _keys("model", values, (*_MODEL_KEYS, *(key for key in _CHOSEN_KEYS if key in values)))
    given = tuple(key for key in _METHOD_KEYS if key in values["compressor"])
    elastic = {"elastic": tuple(values["compressor"]["elastic"])} if "elastic" in given else {}
    _keys("model.compressor", values["compressor"], (*_COMPRESSOR_KEYS, *given))
    encoder, decoder = zoo.encoder(values["encoder"]), zoo.decoder(values["llm"])
    taps = tuple(values["taps"])
    if any(not 1 <= tap <= encoder.depth for tap in taps) or len(set(taps)) < len(taps):
        raise UserError(f"config field model.taps: expected distinct blocks, 1 to {encoder.depth}, got {list(taps)}")
    layer = values["feature_layer"]
    if not isinstance(layer, int) or not 0 <= layer <= encoder.depth:
        raise UserError(f"config field model.feature_layer: expected a block, 0 to {encoder.depth}, got {layer!r}")
    encoder = dataclasses.replace(encoder, feature_layer=layer, merge=tuple(values.get("merge", ())))
    encoder = dataclasses.replace(encoder_for(catalog.row(values["compressor"]["name"]), encoder), taps=taps)
    if values["vocab"]:
        decoder = dataclasses.replace(decoder, vocab=values["vocab"])
    compressor = CompressorSpec(
        grid=encoder.token_grid, encoder_width=encoder.width, taps=len(taps), text_width=decoder.width,
        key_width=key_width(encoder), **{**values["compressor"], **elastic},
    )  # fmt: skip
    catalog.check(compressor)
    model = ModelSpec(encoder, compressor, values["projector"], decoder, values["mask"])
    catalog.check_encoder(model)
    catalog.check_decoder(model)
    return model


def model_group(spec: ModelSpec) -> dict[str, Any]:
    """The config group `model` that resolves to this spec."""
    given = tuple(key for key in _METHOD_KEYS if getattr(spec.compressor, key))
    compressor = {key: getattr(spec.compressor, key) for key in (*_COMPRESSOR_KEYS, *given)}
    return {
        "encoder": spec.encoder.name, "taps": spec.encoder.taps, "feature_layer": spec.encoder.feature_layer,
        **({"merge": spec.encoder.merge} if spec.encoder.merge else {}),
        "compressor": compressor, "projector": spec.projector, "llm": spec.decoder.name,
        "vocab": 0,  # as in the zoo
        "mask": spec.mask,
    }  # fmt: skip


def _check(spec: RunSpec) -> None:
    """Raises `UserError` for invalid values and combinations."""
    for field, valid in _CHOICES.items():
        if (value := operator.attrgetter(field)(spec)) not in valid:
            raise unknown(f"config field {field}:", value, valid)
    bands = spec.model.decoder.rope_bands
    if bands is not None and bands.ramp not in RAMPS:
        raise unknown("config field model.decoder.rope_bands.ramp:", bands.ramp, RAMPS)
    for field, minimum in _MINIMUM.items():
        if (value := operator.attrgetter(field)(spec)) < minimum:
            raise UserError(f"config field {field}: expected at least {minimum}, got {value}")
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
    if spec.data.frozen_features and spec.model.encoder.returns:
        raise UserError(
            f"compressor {spec.model.compressor.name} reads {', '.join(spec.model.encoder.returns)}, which stored "
            "features do not have: set data.frozen_features=False"
        )
    for stage in spec.stages:
        for part in stage.train:
            if part not in PARTS:
                raise unknown(f"stages ({stage.name}) train:", part, PARTS)
        if "encoder" in stage.train and spec.data.frozen_features:
            raise UserError(f"stage {stage.name} trains the encoder: set data.frozen_features=False")
        if stage.total_steps < 1:
            raise UserError(f"stage {stage.name}: expected total_steps of at least 1, got {stage.total_steps}")
        if not 0 <= stage.warmup_steps <= stage.total_steps:
            raise UserError(f"stage {stage.name}: expected warmup_steps <= total_steps, got {stage.warmup_steps}")
    if not spec.stages:
        raise UserError("config field stages: expected at least one stage, got none")


def _keys(where: str, values: Mapping[str, Any], expected: tuple[str, ...]) -> None:
    for key in values:
        if key not in expected:
            raise unknown(f"config field {where}.{key}:".replace("..", "."), key, expected)
    missing = [key for key in expected if key not in values]
    if missing:
        raise UserError(f"config field {where}.{missing[0]} is missing")


def spec_from_dict(values: Mapping[str, Any]) -> RunSpec:
    """The inverse of `core.specs.to_dict`, for a spec stored with a checkpoint. Raises `UserError`."""
    return from_dict(RunSpec, values, "config field ")
