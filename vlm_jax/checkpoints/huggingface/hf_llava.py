"""Checkpoints of LLaVA's own code, and of the projects that build on it: Llama and a connector in one folder, the
vision tower in another.

    config.json               Llama's fields, and `mm_*` about the rest; `mm_vision_tower` is the tower's folder
    model.layers.*, ...       Llama
    model.mm_projector.*      LLaVA-1.5's projector, TokenPacker (arXiv 2407.02392) or QueCC (arXiv 2411.03312)
    model.vision_tower.*      the tower, where it was trained too; else CLIP's own weights are read

`mm_projector.bin` (or .safetensors) alone is the result of a first stage, which trains the connector only. The kind of
connector is read from its tensors: TokenPacker's code ignores `mm_projector_type`.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_jax.checkpoints.huggingface import fields, hf_decoder, hf_encoder, hf_vlm, processors
from vlm_jax.checkpoints.info import CheckpointInfo
from vlm_jax.checkpoints.tensor_files import TensorFiles, open_weights
from vlm_jax.checkpoints.tensor_tables import TensorTable, check, conv_patch, linear, multi_head, norm, same
from vlm_jax.compress.local import tapped_layers
from vlm_jax.core import reading
from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import CompressorSpec, EncoderSpec

ARCHITECTURE = "LlavaLlamaForCausalLM"
PROJECTOR = "mm_projector"
_MARK, _TOWER, _TOWER_MODEL = f"{PROJECTOR}.", "model.vision_tower.", "model.vision_tower.vision_tower.vision_model."
_HEADS = 8  # of TokenPacker and QueCC
_TAPS = (12, 16, 22, 23)  # of both
_SCALE = 2  # of TokenPacker's first code, whose config does not have it
_READ = {
    "mm_hidden_size", "mm_projector_type", "mm_vision_tower", "mm_vision_select_layer", "image_aspect_ratio",
    "unfreeze_mm_vision_tower", "scale_factor", "down_rate", "mm_vision_token_compression_kernel_size",
    "mm_vision_token_compression_stride", "mm_vision_output_token_count", "mm_vision_output_text_embedding_size",
    # Of training, and tokens that prompts do not use.
    "mm_use_im_patch_token", "image_grid_pinpoints", "image_crop_resolution", "image_split_resolution", "patch_num",
    "tune_mm_mlp_adapter", "freeze_mm_mlp_adapter", "tune_mm_vision_resampler", "freeze_mm_vision_resampler",
    "mm_projector_lr", "mm_vision_tower_lr", "s2_scales", "mm_vision_output_combined_token_count",
}  # fmt: skip
_FIXED: dict[str, tuple[Any, ...]] = {
    "mm_vision_select_feature": ("patch",),
    "mm_use_im_start_end": (False,),
    "mm_patch_merge_type": ("flat",),
    "mm_resampler_type": (None,),
    "mm_vision_token_compression_type": ("quecc",),
    "use_mm_proj": (True,),
    "s2": (False,),
}
_LAYERS = {"linear": 1, "mlp1x_gelu": 1, "mlp2x_gelu": 2, "tokenpacker": 0}  # of `mm_projector_type`
_ASPECTS = ("pad", "square")


def is_projector(weights: TensorFiles) -> bool:
    """Whether the files hold a connector alone."""
    return any(_MARK in name for name in weights.shapes) and not any(".layers." in name for name in weights.shapes)


def llava(weights: TensorFiles, config: dict[str, Any], vision: Path | None) -> CheckpointInfo:
    """A row of `inspection.architectures`. `vision`: the tower's folder, instead of the one that config.json names.
    Where there is no such folder, the encoder is None and `missing` says what was looked for.
    """
    where, mm = str(fields.config_path(weights.path)), _mm_fields(config)
    text = {name: value for name, value in config.items() if name not in mm}
    decoder = hf_decoder.decoder_spec({**text, "model_type": "llama"}, where)
    tables = {"decoder": hf_decoder.decoder_table(decoder, *hf_decoder.prefixes(weights))}
    info = CheckpointInfo(ARCHITECTURE, None, None, decoder, "causal", None, tables, weights, config)
    info = info._replace(ignore=hf_decoder.ignore(decoder))
    return _with_vision(info, mm, decoder.width, vision)


def projector(weights: TensorFiles, config: dict[str, Any], vision: Path | None) -> CheckpointInfo:
    """A connector alone, with the tower that it was trained for, if a config.json beside it names one."""
    info = CheckpointInfo(PROJECTOR, None, None, None, "causal", None, {}, weights, config)
    where, mm = str(fields.config_path(weights.path)), _mm_fields(config)
    width = fields.number(config, "hidden_size", where) if mm and "hidden_size" in config else None
    return _with_vision(info, mm, width, vision)


def _mm_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields about images."""
    names = {*_READ, *_FIXED}
    return {name: value for name, value in config.items() if name in names or name.startswith("mm_")}


def _with_vision(info: CheckpointInfo, mm: dict[str, Any], width: int | None, vision: Path | None) -> CheckpointInfo:
    """The checkpoint with its connector and, where its folder is found, the tower."""
    weights, where = info.weights, str(fields.config_path(info.weights.path))
    fields.check(mm, where, _READ, _FIXED)
    prefix = _prefix(weights)
    method, layers = _connector(weights, prefix, mm, where)
    outer = weights.shapes[f"{prefix}{layers[0]}weight"][0]
    if len(outer) != 2:
        raise UserError(f"{weights.path}: {prefix}{layers[0]}weight: expected two axes, got {list(outer)}")
    inputs, width = fields.number({"mm_hidden_size": outer[1], **mm}, "mm_hidden_size", where), width or outer[0]
    table = hf_vlm.projector_table(tuple(f"{prefix}{name}" for name in layers), inputs, width)
    info = info._replace(projector="mlp" if len(layers) > 1 else "linear", tables={**info.tables, "connector": table})
    folder = vision or _find_tower(weights.path, mm)
    if folder is None:
        # A compressor cannot be described without the patches of its tower.
        tables = {name: table for name, table in info.tables.items() if name != "connector" or method == "none"}
        ignore = (*info.ignore, r"model\.vision_tower\..*", *(() if method == "none" else (rf".*{PROJECTOR}\..*",)))
        return info._replace(tables=tables, ignore=ignore, missing=_not_found(weights.path, mm))
    encoder, weights = _tower(weights, mm, folder, inputs, where)
    compressor = _compressor(method, encoder, width, mm, where)
    if compressor is not None:
        encoder = dataclasses.replace(encoder, taps=_taps(encoder))
        make = {"tokenpacker": _tokenpacker, "quecc": _quecc}[method]
        table = table | {f"compressor/{path}": leaf for path, leaf in make(prefix, compressor).items()}
    tower = hf_encoder.prefix_of(weights)
    tables = {**info.tables, "encoder": hf_encoder.encoder_table(encoder, tower), "connector": table}
    ignore = (*info.ignore, *hf_encoder.IGNORED, *hf_encoder.unused(encoder, tower))
    return info._replace(
        encoder=encoder, compressor=compressor, tables=tables, weights=weights, ignore=ignore, prepared=True
    )


def _prefix(weights: TensorFiles) -> str:
    """What is in front of the connector's names: "model.mm_projector."."""
    found = {name.partition(_MARK)[0] + _MARK for name in weights.shapes if _MARK in name}
    if len(found) != 1:
        raise UserError(f"{weights.path}: expected tensors model.{_MARK}*, got {', '.join(sorted(found)) or 'none'}")
    return found.pop()


def _connector(weights: TensorFiles, prefix: str, mm: Mapping[str, Any], where: str) -> tuple[str, tuple[str, ...]]:
    """(compressor, names of the projector's linear layers), from the tensors behind `prefix`."""
    names = {name.removeprefix(prefix) for name in weights.shapes if name.startswith(prefix)}
    if "q_proj_1.weight" in names:
        return "tokenpacker", ("mlp.0.", "mlp.2.")
    method = "quecc" if "0.q_downsample.weight" in names else "none"
    kind, claimed = mm.get("mm_projector_type"), mm.get("mm_vision_token_compression_type")
    if kind not in (None, *_LAYERS):
        raise UserError(f"{where}: mm_projector_type={kind!r} is not supported: expected {', '.join(_LAYERS)}")
    first = 1 if method == "quecc" else 0
    layers = tuple(f"{i}." for i in range(first, first + 4, 2) if f"{i}.weight" in names)
    layers = ("",) if "weight" in names else layers
    if len(layers) != _LAYERS.get(kind, len(layers) or 1) or (claimed == "quecc") > (method == "quecc"):
        said = f"mm_projector_type={kind!r}" + (f", mm_vision_token_compression_type={claimed!r}" if claimed else "")
        listed = ", ".join(sorted(names)[:4])
        raise UserError(f"{weights.path}: expected the connector of {said}, got the tensors {prefix}{{{listed}, ...}}")
    return method, layers


def _places(path: Path, mm: Mapping[str, Any]) -> list[tuple[str, Path]]:
    """Where the tower may be, (name, folder): `mm_vision_tower` in the working directory or, as the Hub has them, two
    folders above the checkpoint; its last name in the checkpoint's folder and beside it."""
    name, folder = mm.get("mm_vision_tower"), fields.config_path(path).parent.absolute()
    if not isinstance(name, str) or not name:
        return []
    last = Path(name).name
    places = [(name, Path()), (last, folder), (last, folder.parent), (name, folder.parent.parent)]
    return [(name, Path())] if not last else places


def _find_tower(path: Path, mm: Mapping[str, Any]) -> Path | None:
    found = (folder / name for name, folder in _places(path, mm))
    return next((one for one in found if reading.kind(one) == "folder" and reading.kind(one / "config.json")), None)


def _not_found(path: Path, mm: Mapping[str, Any]) -> str:
    looked = ", ".join(name if folder == Path() else f"{name} in {folder}" for name, folder in _places(path, mm))
    return (
        f"{fields.config_path(path)}: mm_vision_tower: expected the folder of a CLIP tower, looked for "
        f"{looked or 'none'}: name it with vision=FOLDER (--vision FOLDER)"
    )


def _tower(
    weights: TensorFiles, mm: Mapping[str, Any], folder: Path, width: int, where: str
) -> tuple[EncoderSpec, TensorFiles]:
    """The tower's spec, with the image preparation of the checkpoint, and all weights as one. Weights of a tower in the
    checkpoint count only where it was trained, as in LLaVA."""
    config = fields.read_json(folder / "config.json")
    if config is None:
        raise UserError(f"{folder / 'config.json'}: missing (it describes the vision tower of {where})")
    own = {name: found for name, found in weights.shapes.items() if not name.startswith(_TOWER)}
    if mm.get("unfreeze_mm_vision_tower"):
        spec = hf_encoder.encoder_spec(hf_encoder.vision_config(config, str(folder)), str(folder / "config.json"))
        joined = weights
    else:
        tower = hf_vlm.encoder_only(open_weights(folder), {"architectures": ["CLIPModel"], **config})
        check(tower.weights, tower.tables.values(), tower.ignore)
        spec, prefix = tower.encoder, hf_encoder.prefix_of(tower.weights)
        names = {_TOWER_MODEL + n.removeprefix(prefix): n for n in tower.weights.shapes if n.startswith(prefix)}
        shapes = {**own, **{name: tower.weights.shapes[theirs] for name, theirs in names.items()}}

        def read(name: str) -> Any:
            return tower.weights.read(names[name]) if name in names else weights.read(name)

        joined = TensorFiles(weights.path, shapes, read)
    if not spec.class_token or spec.width != width:
        got = f"{spec.name} of width {spec.width}"
        raise UserError(f"{folder}: expected a CLIP tower of mm_hidden_size={width} ({where}), got {got}")
    layer = hf_vlm.feature_layer(spec, mm.get("mm_vision_select_layer", -2), f"{where}: mm_vision_select_layer")
    aspect = mm.get("image_aspect_ratio") or "square"
    if aspect not in _ASPECTS:
        raise UserError(
            f"{where}: image_aspect_ratio={aspect!r}, which cuts an image into tiles, is not supported: expected "
            f"{' or '.join(_ASPECTS)}"
        )
    spec = processors.with_processor_files(spec, folder)
    resize = "pad" if aspect == "pad" else spec.resize
    return dataclasses.replace(spec, feature_layer=layer, pooling_head=False, resize=resize), joined


def _taps(encoder: EncoderSpec) -> tuple[int, ...]:
    """The published blocks, or those at the same places of a tower that has fewer."""
    return _TAPS if encoder.depth >= _TAPS[-1] else tapped_layers(encoder)


def _compressor(
    method: str, encoder: EncoderSpec, width: int, mm: Mapping[str, Any], where: str
) -> CompressorSpec | None:
    """The spec of TokenPacker or QueCC; None: all patches are projected."""
    if method == "none":
        return None
    if method == "tokenpacker":
        name = "down_rate" if "scale_factor" not in mm and "down_rate" in mm else "scale_factor"
        side = fields.number({name: _SCALE, **mm}, name, where)
    else:
        kernel, stride, patches, text = (
            "mm_vision_token_compression_kernel_size", "mm_vision_token_compression_stride",
            "mm_vision_output_token_count", "mm_vision_output_text_embedding_size",
        )  # fmt: skip
        name, given = stride, {kernel: 4, stride: 4, patches: encoder.patches, text: width, **mm}
        side = fields.number(given, stride, where)
        for field, value in ((kernel, side), (patches, encoder.patches), (text, width)):
            if given[field] != value:
                raise UserError(f"{where}: {field}={given[field]!r}: expected {value}")
    rows = encoder.grid[0]
    if rows % side:
        divisors = ", ".join(str(n) for n in range(1, rows + 1) if rows % n == 0)
        raise UserError(f"{where}: {name}={side}: expected a divisor of the tower's {rows} patches a side ({divisors})")
    e = encoder.width
    tokens, heads = (rows // side) ** 2, math.gcd(_HEADS, e)
    return CompressorSpec(method, tokens, encoder.grid, e, len(_taps(encoder)), width, e, heads, 1, 0)


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
