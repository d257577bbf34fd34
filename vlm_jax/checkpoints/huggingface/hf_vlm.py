"""Vision-language models of Hugging Face folders <-> `ModelSpec`: LLaVA-1.5, PaliGemma 1 and 2.

The tensors' prefixes depend on the version of transformers (`vision_tower.vision_model.encoder...` or
`vision_tower.encoder...`; `language_model.model.layers...` or `model.language_model.layers...`) and are read from the
file.

PaliGemma's reference divides image features by sqrt(D) and then multiplies all embeddings by it; we do neither.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_jax.checkpoints.huggingface import fields, hf_decoder, hf_encoder
from vlm_jax.checkpoints.info import CheckpointInfo
from vlm_jax.checkpoints.tensor_files import TensorFiles
from vlm_jax.checkpoints.tensor_tables import TensorTable, linear, same
from vlm_jax.core.errors import UserError, unknown
from vlm_jax.core.specs import EncoderSpec, ModelSpec

_PROJECTOR = "multi_modal_projector."
LLAVA, PALIGEMMA = "LlavaForConditionalGeneration", "PaliGemmaForConditionalGeneration"
# Fields of a whole model that are read here or by its parts, and those with one supported value.
OUTER = {"text_config", "vision_config", "image_token_index", "image_token_id", "tie_word_embeddings"}
FIXED = {"quantization_config": (None,), "is_encoder_decoder": (False,), "add_cross_attention": (False,)}
_SELECT = {"default": True, "full": False}  # whether the class token is dropped


def encoder_only(weights: TensorFiles, config: dict[str, Any]) -> CheckpointInfo:
    """A row of `inspection.architectures`: SigLIP or CLIP."""
    where, prefix = str(fields.config_path(weights.path)), hf_encoder.prefix_of(weights)
    if str(config.get("model_type")) not in hf_encoder.DEFAULTS:
        read = {*OUTER, "vision_config_dict", "text_config_dict", "projection_dim", "logit_scale_init_value"}
        fields.check(config, where, read, FIXED)
    spec = hf_encoder.encoder_spec(hf_encoder.vision_config(config, where), where)
    tables = {"encoder": hf_encoder.encoder_table(spec, prefix)}
    ignore = (*hf_encoder.IGNORED, *hf_encoder.unused(spec, prefix))
    return CheckpointInfo(config["architectures"][0], spec, None, None, "causal", None, tables, weights, config, ignore)


def llava(weights: TensorFiles, config: dict[str, Any]) -> CheckpointInfo:
    """A row of `inspection.architectures`: LLaVA-1.5 (arXiv 2310.03744). The patches of an inner layer go through an
    MLP with exact GELU and replace the prompt's image tokens; attention is causal.
    """
    where = str(fields.config_path(weights.path))
    fixed = {"projector_hidden_act": ("gelu",), "multimodal_projector_bias": (True,)}
    read = {*OUTER, "vision_feature_layer", "vision_feature_select_strategy", "image_seq_length", "vocab_size"}
    fields.check(config, where, read, {**FIXED, **fixed})
    spec = hf_encoder.encoder_spec(hf_encoder.vision_config(config, where), where)
    layer = feature_layer(spec, config.get("vision_feature_layer", -2), f"{where}: vision_feature_layer")
    select = config.get("vision_feature_select_strategy", "default")
    if str(select) not in _SELECT:
        raise unknown(f"{where}: vision_feature_select_strategy", select, _SELECT)
    if _SELECT[select] != spec.class_token:
        effect = "keeps the class token" if spec.class_token else "drops a patch of a tower that has no class token"
        raise UserError(f"{where}: vision_feature_select_strategy={select!r} {effect}, which is not supported")
    spec = dataclasses.replace(spec, feature_layer=layer, pooling_head=False)
    return _whole(weights, config, LLAVA, spec, "mlp", "causal", 32000)


def feature_layer(encoder: EncoderSpec, value: Any, field: str) -> int:
    """`EncoderSpec.feature_layer` of a field that counts layers from the embeddings, 0, or from the end. Raises
    `UserError` that names the field."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"{field}={value!r}: expected one layer")
    layer = value + encoder.depth + 1 if value < 0 else value
    if not 1 <= layer <= encoder.depth:
        raise UserError(f"{field}={value}: expected a layer of the tower, which has {encoder.depth}")
    return layer


def paligemma(weights: TensorFiles, config: dict[str, Any]) -> CheckpointInfo:
    """A row of `inspection.architectures`: PaliGemma (arXiv 2407.07726) and PaliGemma 2 (arXiv 2412.03555). All patches
    go through one linear layer; attention over image and prompt is bidirectional.
    """
    where = str(fields.config_path(weights.path))
    # Sizes are read from the parts' configs; transformers ignores those of the whole too.
    read = {*OUTER, "projection_dim", "hidden_size", "num_hidden_layers", "vocab_size"}
    fields.check(config, where, read, FIXED)
    spec = hf_encoder.encoder_spec(hf_encoder.vision_config(config, where), where)
    spec = dataclasses.replace(spec, pooling_head=False)
    return _whole(weights, config, PALIGEMMA, spec, "linear", "prefix", 256000)


def _whole(
    weights: TensorFiles,
    config: dict[str, Any],
    kind: str,
    encoder: EncoderSpec,
    projector: str,
    mask: str,
    image_token: int,
) -> CheckpointInfo:
    where = str(fields.config_path(weights.path))
    image_token = config.get("image_token_index", config.get("image_token_id", image_token))
    text = config.get("text_config")
    if not isinstance(image_token, int) or image_token < 0:
        raise UserError(f"{where}: image_token_index={image_token!r}: expected a token id")
    if not isinstance(text, Mapping):
        raise UserError(f"{where}: text_config is missing")
    defaults = {"model_type": "llama" if kind == LLAVA else "gemma"}
    # The whole model's config decides the mask and whether the head is tied.
    text = {**defaults, **{name: value for name, value in text.items() if name != "use_bidirectional_attention"}}
    if "tie_word_embeddings" in config:
        text["tie_word_embeddings"] = bool(config["tie_word_embeddings"] or text.get("tie_word_embeddings"))
    decoder = hf_decoder.decoder_spec(text, where)
    projected = config.get("projection_dim", decoder.width) if kind == PALIGEMMA else decoder.width
    if projected != decoder.width:
        raise UserError(
            f"{where}: projection_dim={projected}: expected the language model's hidden_size, {decoder.width}"
        )
    roots = {name.partition(_PROJECTOR)[0] for name in weights.shapes if _PROJECTOR in name}
    prefix = hf_encoder.prefix_of(weights)
    tables = {
        "encoder": hf_encoder.encoder_table(encoder, prefix),
        "connector": projector_table(_layers(projector, min(roots, default="")), encoder.width, decoder.width),
        "decoder": hf_decoder.decoder_table(decoder, *hf_decoder.prefixes(weights)),
    }
    ignore = (*hf_encoder.IGNORED, *hf_encoder.unused(encoder, prefix), *hf_decoder.ignore(decoder))
    return CheckpointInfo(kind, encoder, projector, decoder, mask, image_token, tables, weights, config, ignore)


ROWS = {
    **dict.fromkeys((*hf_encoder.VISION_ARCHITECTURES, *hf_encoder.DUAL_ARCHITECTURES), encoder_only),
    LLAVA: llava,
    PALIGEMMA: paligemma,
}


def projector_table(layers: Sequence[str], encoder_width: int, width: int) -> TensorTable:
    """The projector of `models.connector`, from the names of its one or two linear layers."""
    table, inputs = {}, encoder_width
    for name, hf_name in zip(("", "out_"), layers, strict=False):
        table[f"projector/{name}kernel"] = linear(f"{hf_name}weight", (inputs,), (width,))
        table[f"projector/{name}bias"] = same(f"{hf_name}bias", (width,))
        inputs = width
    return table


def _layers(projector: str, root: str) -> tuple[str, ...]:
    """Hugging Face's names of a projector's layers."""
    names = {"linear": ("linear.",), "mlp": ("linear_1.", "linear_2.")}[projector]
    return tuple(f"{root}{_PROJECTOR}{name}" for name in names)


def export_kind(spec: ModelSpec) -> str:
    """The architecture of transformers for a model. Raises `UserError` for a compressor or another combination that no
    class of transformers has.
    """
    if spec.compressor.name != "none":
        raise UserError(
            f"compressor {spec.compressor.name}: no transformers class has it (export the decoder or encoder alone)"
        )
    if spec.projector == "mlp" and spec.mask == "causal" and spec.encoder.feature_layer:
        return LLAVA
    gemma = spec.decoder.norm_plus_one and spec.decoder.tied_head and not spec.decoder.qk_norm
    if spec.projector == "linear" and spec.mask == "prefix" and gemma and not spec.encoder.class_token:
        return PALIGEMMA
    raise UserError(
        f"projector {spec.projector}, mask {spec.mask}, feature_layer {spec.encoder.feature_layer}: neither LLaVA "
        "(mlp, causal, an inner layer) nor PaliGemma (linear, prefix, Gemma)"
    )


def export_config(spec: ModelSpec, image_token: int | None) -> dict[str, Any]:
    """config.json of a whole model. The vision tower's depth is the number of layers we have."""
    kind = export_kind(spec)
    if image_token is None:
        raise UserError("the model's vocabulary has no image token (export the decoder or encoder alone)")
    vision = hf_encoder.encoder_config(spec.encoder)
    shared = {
        "architectures": [kind],
        "vision_config": vision,
        "text_config": hf_decoder.hf_config(spec.decoder),
        "image_token_index": image_token,
        "tie_word_embeddings": spec.decoder.tied_head,
        "torch_dtype": "float32",
    }
    if kind == LLAVA:
        return {
            **shared, "model_type": "llava", "projector_hidden_act": "gelu", "multimodal_projector_bias": True,
            "vision_feature_layer": spec.encoder.feature_layer - spec.encoder.blocks - 1,
            "vision_feature_select_strategy": "default" if spec.encoder.class_token else "full",
            "image_seq_length": spec.encoder.patches,
        }  # fmt: skip
    width = spec.decoder.width
    vision["projection_dim"] = width
    return {**shared, "model_type": "paligemma", "projection_dim": width, "hidden_size": width}


def export_tables(spec: ModelSpec) -> dict[str, TensorTable]:
    """Part -> table under the names that every version of transformers reads."""
    return {
        "encoder": hf_encoder.encoder_table(spec.encoder, "vision_tower.vision_model."),
        "connector": projector_table(_layers(spec.projector, ""), spec.encoder.width, spec.decoder.width),
        "decoder": hf_decoder.decoder_table(spec.decoder, "language_model.model.", "language_model.lm_head.weight"),
    }
