"""Vision towers of Hugging Face folders <-> `EncoderSpec`: SigLIP, SigLIP 2 of fixed resolution, and CLIP.

The tower is a model of its own (`SiglipVisionModel`, `CLIPVisionModel`), or part of `SiglipModel`, `CLIPModel` or a
vision-language model; the tensor names differ by a prefix (`prefix_of`).

SigLIP's `last_hidden_state` includes the last norm, CLIP's does not (its last norm belongs to the class token's
projection); a CLIP spec therefore has `feature_layer` = depth, so that our tokens equal `last_hidden_state`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vlm_jax.checkpoints.huggingface import fields
from vlm_jax.checkpoints.tensor_files import TensorFiles
from vlm_jax.checkpoints.tensor_tables import NORM, TensorTable, conv_patch, linear, multi_head, norm, same
from vlm_jax.core.errors import UserError, unknown
from vlm_jax.core.specs import CLIP_MEAN, CLIP_STD, EncoderSpec

VISION_ARCHITECTURES = ("SiglipVisionModel", "CLIPVisionModel", "CLIPVisionModelWithProjection")
DUAL_ARCHITECTURES = ("SiglipModel", "CLIPModel")
# The text tower, and buffers of older files.
IGNORED = (
    r"text_model\..*", r"text_projection\.weight", r"visual_projection\.weight", r"logit_scale", r"logit_bias",
    r".*\.position_ids",
)  # fmt: skip
_ACTIVATIONS = {
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu": "gelu", "quick_gelu": "quick_gelu",
}  # fmt: skip
_SIZES = {
    "image_size": "image_size", "patch_size": "patch_size", "width": "hidden_size", "depth": "num_hidden_layers",
    "heads": "num_attention_heads", "mlp_width": "intermediate_size",
}  # fmt: skip
# Files leave out fields at their defaults.
_SHARED_DEFAULTS = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_channels": 3, "image_size": 224,
}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "siglip_vision_model": {
        **_SHARED_DEFAULTS, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
        "vision_use_head": True,
    },
    "clip_vision_model": {**_SHARED_DEFAULTS, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
}  # fmt: skip
# Fields that change the outputs, and the values that our encoder implements.
_TRUE = ("qkv_bias", "attention_bias", "mlp_bias", "use_bias", "bias", "use_absolute_position_embeddings")
_FIXED: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "is_causal": (False,),
    "position_embedding_type": ("absolute", "learned"),
    **dict.fromkeys(_TRUE, (True,)),
}
# Fields of the whole model or of other classes, on which the tower's tokens do not depend.
_OUTER = {
    "projection_dim", "projection_size", "projector_hidden_act", "num_positions", "vocab_size", "patch_size",
    "logit_scale_init_value", "vision_use_head", "tie_word_embeddings",
}  # fmt: skip
_FIRST = "embeddings.patch_embedding.weight"


def encoder_spec(config: Mapping[str, Any], where: str) -> EncoderSpec:
    """The spec of a config.json or its `vision_config`. `where` names the file in errors. Raises `UserError` with the
    name of a field that our encoder does not implement.
    """
    kind = str(config.get("model_type"))
    if kind not in DEFAULTS:
        raise unknown(f"{where}: model_type of the vision tower", kind, DEFAULTS)
    fixed = {**_FIXED, "use_cls_token": (kind == "clip_vision_model",)}
    fields.check(config, f"{where}: vision tower", {*DEFAULTS[kind], *_OUTER}, fixed)
    values = {**DEFAULTS[kind], **config}
    sizes = {field: _size(values[name], name, where) for field, name in _SIZES.items()}
    width, depth, heads, image_size = (sizes[name] for name in ("width", "depth", "heads", "image_size"))
    if values["num_channels"] != 3:
        raise UserError(f"{where}: num_channels={values['num_channels']}: expected 3")
    if width % heads:
        raise UserError(f"{where}: num_attention_heads={heads}: expected a divisor of hidden_size={width}")
    if image_size < sizes["patch_size"]:
        raise UserError(f"{where}: image_size={image_size}: expected at least patch_size={sizes['patch_size']}")
    if str(values["hidden_act"]) not in _ACTIVATIONS:
        raise unknown(f"{where}: hidden_act", values["hidden_act"], _ACTIVATIONS)
    clip = kind == "clip_vision_model"
    return EncoderSpec(
        name=f"{kind.split('_')[0]}-{width}x{depth}-{sizes['patch_size']}-{image_size}",
        **sizes,
        activation=_ACTIVATIONS[values["hidden_act"]],
        class_token=clip,
        patch_bias=not clip,
        pre_norm=clip,
        pooling_head=not clip and bool(values["vision_use_head"]),
        norm_eps=fields.number(values, "layer_norm_eps", where, float),
        feature_layer=depth if clip else 0,
        interpolation="bicubic",  # the family's preprocessing, for folders without a processor
        **({"pixel_mean": CLIP_MEAN, "pixel_std": CLIP_STD, "resize": "crop"} if clip else {}),
    )


def vision_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The vision tower's part of a config.json, with a missing `model_type` filled in from the outer one."""
    inner = config if str(config.get("model_type")) in DEFAULTS else config.get("vision_config")
    if not isinstance(inner, Mapping):
        raise UserError(f"{where}: vision_config is missing")
    if inner is not config:
        legacy = config.get("vision_config_dict")  # a copy in older files
        if legacy is not None and (
            not isinstance(legacy, Mapping) or any(inner.get(name, value) != value for name, value in legacy.items())
        ):
            raise UserError(f"{where}: vision_config_dict differs from vision_config")
        inner = {**(legacy or {}), **inner}
    outer = {"siglip": "siglip_vision_model", "clip": "clip_vision_model"}.get(str(config.get("model_type")))
    return {**({"model_type": outer} if outer else {}), **inner}


def _size(value: Any, name: str, where: str) -> int:
    """A positive integer; a pair of equal sides counts as one."""
    if isinstance(value, list | tuple) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{where}: {name}={value!r}: expected a positive integer, the same for both sides")
    return value


def prefix_of(weights: TensorFiles) -> str:
    """The prefix of the vision tower's tensors: "", "vision_model.", "model.vision_tower." ..."""
    prefixes = [name.removesuffix(_FIRST) for name in weights.shapes if name.endswith(_FIRST)]
    if len(prefixes) != 1:
        raise UserError(f"{weights.path}: expected one vision tower, got {len(prefixes)} tensors that end in {_FIRST}")
    return prefixes[0]


def encoder_table(spec: EncoderSpec, prefix: str) -> TensorTable:
    """Every parameter of `models.vision.Encoder` under Hugging Face's names, which SigLIP and CLIP share."""
    width, heads = spec.width, (spec.heads, spec.width // spec.heads)
    stem, pool = f"{prefix}embeddings.", f"{prefix}head."
    block, n = f"{prefix}encoder.layers.{{i}}.", spec.blocks
    table = {
        "patch/kernel": conv_patch(f"{stem}patch_embedding.weight", spec.patch_size, width),
        "position": same(f"{stem}position_embedding.weight", (spec.patches + spec.class_token, width)),
        **norm("blocks/attention_norm", f"{block}layer_norm1", width, n),
        **norm("blocks/mlp_norm", f"{block}layer_norm2", width, n),
        **_mlp("blocks/mlp", f"{block}mlp.", spec, n),
        "blocks/attention/out/kernel": linear(f"{block}self_attn.out_proj.weight", heads, (width,), n),
        "blocks/attention/out/bias": same(f"{block}self_attn.out_proj.bias", (width,), n),
    }
    for path, hf_name in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        table[f"blocks/attention/{path}/kernel"] = linear(f"{block}self_attn.{hf_name}.weight", (width,), heads, n)
        table[f"blocks/attention/{path}/bias"] = same(f"{block}self_attn.{hf_name}.bias", (width,), n)
    if spec.patch_bias:
        table["patch/bias"] = same(f"{stem}patch_embedding.bias", (width,))
    if spec.class_token:
        table["class_token"] = same(f"{stem}class_embedding", (width,))
    if spec.pre_norm:
        table |= norm("pre_norm", f"{prefix}pre_layrnorm", width)  # sic
    if not spec.feature_layer:
        table |= norm("norm", f"{prefix}post_layernorm", width)
    if spec.pooling_head:
        table |= {
            "pooling/probe": same(f"{pool}probe", (1, 1, width)),
            **norm("pooling/norm", f"{pool}layernorm", width),
            **_mlp("pooling/mlp", f"{pool}mlp.", spec),
            **multi_head("pooling/attention", f"{pool}attention.", width, spec.heads),
        }
    return table


def _mlp(path: str, hf_name: str, spec: EncoderSpec, blocks: int = 0) -> TensorTable:
    return {
        f"{path}/up/kernel": linear(f"{hf_name}fc1.weight", (spec.width,), (spec.mlp_width,), blocks),
        f"{path}/up/bias": same(f"{hf_name}fc1.bias", (spec.mlp_width,), blocks),
        f"{path}/down/kernel": linear(f"{hf_name}fc2.weight", (spec.mlp_width,), (spec.width,), blocks),
        f"{path}/down/bias": same(f"{hf_name}fc2.bias", (spec.width,), blocks),
    }


def unused(spec: EncoderSpec, prefix: str) -> tuple[str, ...]:
    """Regexes of the tower's tensors that the spec does not use: later blocks, the last norm, the pooling head."""
    later = [str(i) for i in range(spec.blocks, spec.depth)]
    names = [rf"encoder\.layers\.(?:{'|'.join(later)})\..*"] if later else []
    names += [r"post_layernorm\..*"] if spec.feature_layer else []
    names += [] if spec.pooling_head else [r"head\..*"]
    return tuple(prefix.replace(".", r"\.") + name for name in names)


def identity_norm(table: TensorTable, like: Any) -> tuple[dict[str, np.ndarray], TensorTable]:
    """(parameters, table) of a last norm with scale 1 and bias 0, for a tower that ends before it: the classes of
    transformers always have one. The dtype is that of `like` [N, E].
    """
    hf_name = table["position"].hf_name.replace("embeddings.position_embedding.weight", "post_layernorm")
    params = {"scale": np.ones(like.shape[1], like.dtype), "bias": np.zeros(like.shape[1], like.dtype)}
    return params, {name: same(f"{hf_name}.{part}", like.shape[1:]) for name, part in NORM.items()}


def encoder_config(spec: EncoderSpec) -> dict[str, Any]:
    """The `vision_config` of a spec. With an inner `feature_layer` its depth is the number of layers we have."""
    if len({spec.class_token, spec.pre_norm, not spec.patch_bias}) > 1 or (spec.class_token and spec.pooling_head):
        raise UserError(f"encoder {spec.name}: neither SigLIP nor CLIP, so no transformers model has its layers")
    activations = {name: hf_name for hf_name, name in reversed(_ACTIVATIONS.items())}
    config = {
        "model_type": "clip_vision_model" if spec.class_token else "siglip_vision_model",
        **{name: getattr(spec, field) for field, name in _SIZES.items()},
        "num_hidden_layers": spec.blocks,
        "num_channels": 3,
        "hidden_act": activations[spec.activation],
        "layer_norm_eps": spec.norm_eps,
    }
    return config if spec.class_token else {**config, "vision_use_head": spec.pooling_head}
