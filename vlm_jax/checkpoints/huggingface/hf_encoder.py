"""SigLIP, SigLIP 2 of fixed resolution and CLIP in Hugging Face folders: configuration and names, both ways.

The image tower stands alone (`SiglipVisionModel`, `CLIPVisionModel`), beside a text tower (`SiglipModel`, `CLIPModel`),
or inside a vision-language model; its names differ by a prefix, which `prefix_of` finds.

`last_hidden_state` of SigLIP is behind the last norm, that of CLIP is not (its last norm belongs to the class token's
projection); a CLIP tower therefore comes with `feature_layer` = its depth, so that our tokens are hf_name.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vlm_jax.checkpoints.huggingface.fields import check as check_fields
from vlm_jax.checkpoints.tensor_tables import Leaf, TensorFiles, TensorTable, conv_patch, linear, same
from vlm_jax.core.errors import UserError, unknown
from vlm_jax.core.specs import CLIP_MEAN, CLIP_STD, EncoderSpec

ALONE = ("SiglipVisionModel", "CLIPVisionModel", "CLIPVisionModelWithProjection")
BESIDE_TEXT = ("SiglipModel", "CLIPModel")
# What stands beside the image tower, and buffers that older files hold.
IGNORED = (
    r"text_model\..*", r"text_projection\.weight", r"visual_projection\.weight", r"logit_scale", r"logit_bias",
    r".*\.position_ids",
)  # fmt: skip
_ACTIVATIONS = {
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu": "gelu", "quick_gelu": "quick_gelu",
}  # fmt: skip
# Published files leave out what is at its default.
_SHARED_DEFAULTS = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_channels": 3, "image_size": 224,
}  # fmt: skip
_DEFAULTS: dict[str, dict[str, Any]] = {
    "siglip_vision_model": {
        **_SHARED_DEFAULTS, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
        "vision_use_head": True,
    },
    "clip_vision_model": {**_SHARED_DEFAULTS, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
}  # fmt: skip
KINDS = tuple(_DEFAULTS)
# Fields that change what is computed, and the values that mean what our towers do.
_FIXED: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "is_causal": (False,),
    "position_embedding_type": ("absolute", "learned"),
    **dict.fromkeys(
        (
            "qkv_bias", "attention_bias", "mlp_bias", "use_bias", "bias", "use_absolute_position_embeddings",
        ),
        (True,),
    ),
}  # fmt: skip
# Of the model that the tower is part of, or of the classes' other uses (older files say every field that any model
# has); its tokens do not depend on them.
_BESIDE = {
    "projection_dim", "projection_size", "projector_hidden_act", "num_positions", "vocab_size", "patch_size",
    "logit_scale_init_value", "vision_use_head", "tie_word_embeddings",
}  # fmt: skip
_NORM = {"scale": "weight", "bias": "bias"}
_FIRST = "embeddings.patch_embedding.weight"


def encoder_spec(config: Mapping[str, Any], where: str) -> EncoderSpec:
    """A config.json, or the `vision_config` of one, as our spec.

    Raises `UserError` that names the field and file (`where`) for a kind, activation or size that we do not have.
    """
    kind = str(config.get("model_type"))
    if kind not in _DEFAULTS:
        raise unknown(f"{where}: model_type of the image tower", kind, _DEFAULTS)
    fixed = {**_FIXED, "use_cls_token": (kind == "clip_vision_model",)}
    check_fields(config, f"{where}: image tower", {*_DEFAULTS[kind], *_BESIDE}, fixed)
    fields = {**_DEFAULTS[kind], **config}
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    for name in sizes:
        fields[name] = _whole(fields[name], name, where)
    if fields["num_channels"] != 3:
        raise UserError(f"{where}: num_channels={fields['num_channels']}: images have 3")
    if fields["hidden_size"] % fields["num_attention_heads"]:
        raise UserError(f"{where}: num_attention_heads={fields['num_attention_heads']} must divide hidden_size")
    if fields["image_size"] < fields["patch_size"]:
        raise UserError(f"{where}: image_size={fields['image_size']} holds no patch of {fields['patch_size']}")
    eps = fields["layer_norm_eps"]
    if not isinstance(eps, int | float) or isinstance(eps, bool) or not 0 < eps < 1:
        raise UserError(f"{where}: layer_norm_eps={eps!r}: a positive number is wanted")
    if str(fields["hidden_act"]) not in _ACTIVATIONS:
        raise unknown(f"{where}: hidden_act", fields["hidden_act"], _ACTIVATIONS)
    clip, depth = kind == "clip_vision_model", fields["num_hidden_layers"]
    return EncoderSpec(
        name=f"{kind.split('_')[0]}-{fields['hidden_size']}x{depth}-{fields['patch_size']}-{fields['image_size']}",
        image_size=fields["image_size"],
        patch_size=fields["patch_size"],
        width=fields["hidden_size"],
        depth=depth,
        heads=fields["num_attention_heads"],
        mlp_width=fields["intermediate_size"],
        activation=_ACTIVATIONS[fields["hidden_act"]],
        class_token=clip,
        patch_bias=not clip,
        pre_norm=clip,
        pooling_head=not clip and bool(fields["vision_use_head"]),
        norm_eps=float(eps),
        feature_layer=depth if clip else 0,
        interpolation="bicubic",  # the images' preparation is that of the family, where the folder has no processor
        **({"pixel_mean": CLIP_MEAN, "pixel_std": CLIP_STD, "resize": "crop"} if clip else {}),
    )


def vision_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The image tower's part of a config.json; what it leaves out follows from the whole's `model_type`."""
    inner = config if str(config.get("model_type")) in _DEFAULTS else config.get("vision_config")
    if not isinstance(inner, Mapping):
        raise UserError(f"{where}: vision_config is missing")
    if inner is not config:
        legacy = config.get("vision_config_dict")  # older files say the same twice
        if legacy is not None and (
            not isinstance(legacy, Mapping) or any(inner.get(name, value) != value for name, value in legacy.items())
        ):
            raise UserError(f"{where}: vision_config_dict does not say the same as vision_config")
        inner = {**(legacy or {}), **inner}
    outer = {"siglip": "siglip_vision_model", "clip": "clip_vision_model"}.get(str(config.get("model_type")))
    return {**({"model_type": outer} if outer else {}), **inner}


def _whole(value: Any, name: str, where: str) -> int:
    """A positive integer; a pair of equal sides is one side."""
    if isinstance(value, list | tuple) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{where}: {name}={value!r}: a positive whole number is wanted, the same for both sides")
    return value


def prefix_of(weights: TensorFiles) -> str:
    """What stands before the image tower's names: "", "vision_model.", "model.vision_tower." ..."""
    found = [name.removesuffix(_FIRST) for name in weights.shapes if name.endswith(_FIRST)]
    if len(found) != 1:
        raise UserError(f"{weights.path}: {len(found)} tensors end in {_FIRST}; one image tower is wanted")
    return found[0]


def encoder_table(spec: EncoderSpec, prefix: str) -> TensorTable:
    """Every parameter of `models.vision.Encoder` under Hugging Face's names, which SigLIP and CLIP share."""
    width, heads = spec.width, (spec.heads, spec.width // spec.heads)
    stem, pool = f"{prefix}embeddings.", f"{prefix}head."
    block, n = f"{prefix}encoder.layers.{{i}}.", spec.blocks
    table = {
        "patch/kernel": conv_patch(f"{stem}patch_embedding.weight", spec.patch_size, width),
        "position": same(f"{stem}position_embedding.weight", (spec.patches + spec.class_token, width)),
        **_norm("blocks/attention_norm", f"{block}layer_norm1", width, n),
        **_norm("blocks/mlp_norm", f"{block}layer_norm2", width, n),
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
        table |= _norm("pre_norm", f"{prefix}pre_layrnorm", width)  # their spelling
    if not spec.feature_layer:
        table |= _norm("norm", f"{prefix}post_layernorm", width)
    if spec.pooling_head:
        table |= {
            "pooling/probe": same(f"{pool}probe", (1, 1, width)),
            **_norm("pooling/norm", f"{pool}layernorm", width),
            **_mlp("pooling/mlp", f"{pool}mlp.", spec),
            "pooling/attention/out/kernel": linear(f"{pool}attention.out_proj.weight", heads, (width,)),
            "pooling/attention/out/bias": same(f"{pool}attention.out_proj.bias", (width,)),
        }
        for part, path in enumerate(("query", "key", "value")):  # torch keeps the three in one tensor
            one = linear(f"{pool}attention.in_proj_weight", (width,), heads)
            whole = one._replace(file_shape=(3 * width, width), part=(0, part, 3))
            bias = Leaf(f"{pool}attention.in_proj_bias", (3 * width,), (width,), (0,), part=(0, part, 3))
            table |= {f"pooling/attention/{path}/kernel": whole, f"pooling/attention/{path}/bias": bias}
    return table


def _norm(path: str, hf_name: str, width: int, blocks: int = 0) -> TensorTable:
    return {f"{path}/{name}": same(f"{hf_name}.{part}", (width,), blocks) for name, part in _NORM.items()}


def _mlp(path: str, hf_name: str, spec: EncoderSpec, blocks: int = 0) -> TensorTable:
    return {
        f"{path}/up/kernel": linear(f"{hf_name}fc1.weight", (spec.width,), (spec.mlp_width,), blocks),
        f"{path}/up/bias": same(f"{hf_name}fc1.bias", (spec.mlp_width,), blocks),
        f"{path}/down/kernel": linear(f"{hf_name}fc2.weight", (spec.mlp_width,), (spec.width,), blocks),
        f"{path}/down/bias": same(f"{hf_name}fc2.bias", (spec.width,), blocks),
    }


def not_run(spec: EncoderSpec, prefix: str) -> tuple[str, ...]:
    """Regexes of the tower's tensors that the spec does not look at: blocks behind, the last norm, the pooling head."""
    behind = [str(i) for i in range(spec.blocks, spec.depth)]
    names = [rf"encoder\.layers\.(?:{'|'.join(behind)})\..*"] if behind else []
    names += [r"post_layernorm\..*"] if spec.feature_layer else []
    names += [] if spec.pooling_head else [r"head\..*"]
    return tuple(prefix.replace(".", r"\.") + name for name in names)


def idle_norm(table: TensorTable, like: Any) -> tuple[dict[str, np.ndarray], TensorTable]:
    """The last norm of a tower whose tokens are taken before it, as the identity, in the dtype of `like` [N, E]: the
    classes of transformers always have one.
    """
    hf_name = table["position"].hf_name.replace("embeddings.position_embedding.weight", "post_layernorm")
    params = {"scale": np.ones(like.shape[1], like.dtype), "bias": np.zeros(like.shape[1], like.dtype)}
    return params, {name: same(f"{hf_name}.{part}", like.shape[1:]) for name, part in _NORM.items()}


def encoder_config(spec: EncoderSpec) -> dict[str, Any]:
    """The spec as a `vision_config`. A tower cut at an inner layer is written as deep as it is held."""
    activations = {path: hf_name for hf_name, path in reversed(_ACTIVATIONS.items())}
    fields = {
        "model_type": "clip_vision_model" if spec.class_token else "siglip_vision_model",
        "hidden_size": spec.width,
        "intermediate_size": spec.mlp_width,
        "num_hidden_layers": spec.blocks,
        "num_attention_heads": spec.heads,
        "num_channels": 3,
        "image_size": spec.image_size,
        "patch_size": spec.patch_size,
        "hidden_act": activations[spec.activation],
        "layer_norm_eps": spec.norm_eps,
    }
    clip = (spec.class_token, spec.pre_norm, not spec.patch_bias)
    if len(set(clip)) > 1 or (spec.class_token and spec.pooling_head):
        raise UserError(f"encoder {spec.name}: neither SigLIP nor CLIP, so no transformers model has its layers")
    return fields if spec.class_token else {**fields, "vision_use_head": spec.pooling_head}
