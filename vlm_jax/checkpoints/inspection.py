"""Reads published checkpoints: `inspect` returns their specs and tables, `load_parts` their parameters.

`inspect` calls the row of `architectures()` for the name in config.json's `architectures`; a row is a function of
(weights, config) that returns a `CheckpointInfo`. A new architecture is a new row.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from vlm_jax.checkpoints import big_vision, foreign, tensor_tables
from vlm_jax.checkpoints.huggingface import fields, hf_decoder, hf_encoder, hf_llava, hf_vlm, processors
from vlm_jax.checkpoints.huggingface.fields import config_path
from vlm_jax.checkpoints.info import CheckpointInfo
from vlm_jax.checkpoints.tensor_files import TensorFiles, open_weights
from vlm_jax.checkpoints.tensor_tables import OnTensor, TensorTable, load_params, noop
from vlm_jax.compress import catalog
from vlm_jax.core import tree
from vlm_jax.core.errors import UserError, unknown
from vlm_jax.core.specs import ComputeSpec, EncoderSpec, ModelSpec
from vlm_jax.core.structs import AttentionMetadata
from vlm_jax.models import connector
from vlm_jax.models.decoder import Decoder
from vlm_jax.models.vision import Encoder

PARTS = ("encoder", "connector", "decoder")


def inspect(path: str | Path, vision: Path | None = None) -> CheckpointInfo:
    """The specs and tables of a folder (or a `.npz`), after a check of every name and shape. No tensor is read.

    vision: the folder of the vision tower, for a checkpoint of LLaVA's own code, instead of the one that it names.

    Raises `UserError` for an unsupported architecture, a config field that our modules cannot express, or tensors that
    do not fit the config.
    """
    path, weights = Path(path), open_weights(path)
    if weights.path.suffix == ".npz":
        info = big_vision.inspect_npz(weights)
    else:
        foreign.check_names(weights.shapes, weights.path)
        info = _inspect_folder(path, weights, vision)
    tensor_tables.check(info.weights, info.tables.values(), info.ignore)
    return info


def _inspect_folder(path: Path, weights: TensorFiles, vision: Path | None) -> CheckpointInfo:
    if hf_llava.is_projector(weights):
        return hf_llava.projector(weights, fields.read_json(config_path(path)) or {}, vision)
    config = read_config(path)
    foreign.check_config(config, config_path(path))
    kind, rows = architecture(config, path), architectures(vision)
    if kind not in rows:
        raise UserError(f"{config_path(path)}: {unknown('architecture', kind, rows, cutoff=0.8)}")
    fields.check_depth(config, len(weights.shapes), str(config_path(path)))
    return rows[kind](weights, config)


def architectures(vision: Path | None = None) -> dict[str, Callable[[TensorFiles, dict[str, Any]], CheckpointInfo]]:
    """Architecture -> the function that reads it; `vision` as in `inspect`."""
    rows = {
        **dict.fromkeys(hf_decoder.ARCHITECTURES, _decoder_only),
        "Gemma3ForConditionalGeneration": _text_of_gemma3,
        **hf_vlm.ROWS,
    }
    return {**rows, hf_llava.ARCHITECTURE: functools.partial(hf_llava.llava, vision=vision)}


def read_config(folder: Path) -> dict[str, Any]:
    """config.json. Raises `UserError` where it is missing or not a JSON object."""
    path = config_path(folder)
    config = fields.read_json(path)
    if config is None:
        raise UserError(f"{path}: missing (it names the weights' architecture)")
    return config


def architecture(config: Mapping[str, Any], where: Path) -> str:
    """The architecture in a config.json."""
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1:
        raise UserError(f"{config_path(where)}: architectures={names!r}: expected a list of one name")
    return str(names[0])


def _decoder_only(weights: TensorFiles, config: dict[str, Any], text: dict[str, Any] | None = None) -> CheckpointInfo:
    spec = hf_decoder.decoder_spec(config if text is None else text, str(config_path(weights.path)))
    tables = {"decoder": hf_decoder.decoder_table(spec, *hf_decoder.prefixes(weights))}
    kind = architecture(config, weights.path)
    return CheckpointInfo(kind, None, None, spec, "causal", None, tables, weights, config, hf_decoder.ignore(spec))


def _text_of_gemma3(weights: TensorFiles, config: dict[str, Any]) -> CheckpointInfo:
    """The language model alone: Gemma 3's image encoding is not supported."""
    where, text = str(config_path(weights.path)), config.get("text_config")
    read = {*hf_vlm.OUTER, "mm_tokens_per_image"} - {"tie_word_embeddings"}
    fields.check(config, where, read, {**hf_vlm.FIXED, "tie_word_embeddings": (True,)})
    if not isinstance(text, dict):
        raise UserError(f"{where}: text_config={text!r}: expected an object")
    info = _decoder_only(weights, config, text)
    return info._replace(ignore=(*info.ignore, r".*vision_tower\..*", r".*multi_modal_projector\..*"))


def with_encoder(info: CheckpointInfo, encoder: EncoderSpec) -> CheckpointInfo:
    """The checkpoint with another encoder spec (taps, feature layer, pooling head), which decides the tensors read."""
    if info.weights.path.suffix == ".npz":
        table = big_vision.encoder_table(encoder, *big_vision.tower(info.weights))
    else:
        table = hf_encoder.encoder_table(encoder, hf_encoder.prefix_of(info.weights))
    return info._replace(encoder=encoder, tables={**info.tables, "encoder": table})


def prepared_encoder(info: CheckpointInfo) -> EncoderSpec | None:
    """The encoder with the image preparation of its weights; None without one. Raises `UserError`."""
    if info.encoder is None or info.prepared:
        return info.encoder
    return processors.with_processor_files(info.encoder, info.weights.path)


def load_connector(
    info: CheckpointInfo, model: ModelSpec, plan: Any | None, dtype: str, on_tensor: OnTensor | None = None
) -> dict[str, Any]:
    """What a model's connector has in common with the checkpoint's: {"projector": ...} of the same kind and widths, and
    {"compressor": ...} of an equal spec."""
    boxed_params = jax.eval_shape(lambda key: connector.init_weights(key, model), jax.random.key(0))
    table, loaded = info.tables.get("connector", {}), {}
    for part in ("projector", "compressor"):
        shapes = {path: leaf.shape for path, leaf in tree.flatten(nn.meta.unbox(boxed_params[part])).items()}
        mine = {path.partition("/")[2]: leaf for path, leaf in table.items() if path.startswith(f"{part}/")}
        if part == "projector":
            is_same = info.projector == model.projector and shapes == {name: leaf.shape for name, leaf in mine.items()}
        else:
            is_same = info.compressor == model.compressor
        if is_same:
            loaded[part] = load_params(info.weights, mine, boxed_params[part], plan, dtype, (".*",), on_tensor or noop)
    return loaded


def load_parts(
    info: CheckpointInfo,
    parts: Iterable[str] = PARTS,
    plan: Any | None = None,
    dtype: str | None = "float32",
    on_tensor: OnTensor | None = None,
    scan_layers: bool = True,
) -> dict[str, Any]:
    """{"encoder": ..., "connector": ..., "decoder": ...}: the parameters of those `parts` that the checkpoint has; see
    `tensor_tables.load_params`. `scan_layers` is that of `ComputeSpec`. Raises `UserError` where the head of a tied
    decoder is not its embedding.
    """
    params = {}
    for part in parts:
        if part in info.tables:
            table = info.tables[part]
            if part == "decoder":
                if info.decoder.tied_head:
                    hf_decoder.check_tied(info.weights, table)
                table = table if scan_layers else unstack_table(table, info.decoder.depth)
            shapes = boxed(info, part, scan_layers)
            params[part] = load_params(info.weights, table, shapes, plan, dtype, (".*",), on_tensor or noop)
    return params


def size_bytes(info: CheckpointInfo, parts: Iterable[str] = PARTS) -> int:
    """Bytes of the tensors of those parts."""
    names = tensor_tables.expected(info.tables[part] for part in parts if part in info.tables)
    return sum(math.prod(shape) * info.weights.shapes[name][1].itemsize for name, shape in names.items())


def unstack_table(table: TensorTable, depth: int) -> TensorTable:
    """A decoder's table for scan_layers=True -> its table for scan_layers=False."""
    blocks = [path for path in table if path.startswith("blocks/")]
    unstacked = {f"blocks_{i}/{path[7:]}": table[path].block(i) for i in range(depth) for path in blocks}
    return {**{path: leaf for path, leaf in table.items() if path not in blocks}, **unstacked}


def boxed(info: CheckpointInfo, part: str, scan_layers: bool = True) -> Any:
    """Shapes of the parameters of one part, with axis names."""
    compute = ComputeSpec("float32", "none", "xla", 1, "replicated", (1, 1, 1), scan_layers=scan_layers)
    key = jax.random.key(0)
    if part == "encoder":
        image = jax.ShapeDtypeStruct((1, info.encoder.image_size, info.encoder.image_size, 3), "float32")
        return jax.eval_shape(Encoder(info.encoder, compute).init, key, image)["params"]
    if part == "connector":
        return jax.eval_shape(lambda key: connector.init_weights(key, model_spec(info)), key)
    text = jax.ShapeDtypeStruct((1, 2), "int32")
    metadata = AttentionMetadata(text, text, text)
    return jax.eval_shape(Decoder(info.decoder, compute).init, key, text, metadata)["params"]


def model_spec(info: CheckpointInfo) -> ModelSpec:
    """The spec of a whole model, with the compressor of the checkpoint or none. Raises `UserError` where a part is
    missing."""
    encoder, decoder = info.encoder, info.decoder
    if encoder is None or decoder is None or info.projector is None:
        actual = f"expected a whole model, got {info.kind} ({', '.join(info.tables)})"
        raise UserError(info.missing or f"{info.weights.path}: {actual}")
    compressor = info.compressor or catalog.row("none").defaults(encoder, decoder, encoder.patches)
    return ModelSpec(encoder, compressor, info.projector, decoder, info.mask)
