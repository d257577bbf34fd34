"""What a folder or file of published weights is: our specs of its parts, and the tables that read and write them.

`inspect` reads config.json's `architectures` and asks the row of that name in `architectures`; a row is a function of
(weights, config) that returns a `CheckpointInfo`. Support for an architecture is a row.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from vlm_jax.checkpoints import big_vision
from vlm_jax.checkpoints import tensor_tables as w
from vlm_jax.checkpoints.huggingface import fields, hf_decoder, hf_encoder, hf_vlm
from vlm_jax.checkpoints.info import CheckpointInfo
from vlm_jax.checkpoints.tensor_tables import TensorFiles, TensorTable
from vlm_jax.core.errors import UserError, unknown
from vlm_jax.core.specs import CompressorSpec, ComputeSpec, EncoderSpec, ModelSpec
from vlm_jax.core.structs import AttentionMetadata
from vlm_jax.models import connector
from vlm_jax.models.decoder import Decoder
from vlm_jax.models.vision import Encoder

PARTS = ("encoder", "connector", "decoder")


def inspect(path: str | Path) -> CheckpointInfo:
    """Reads what a folder (or a `.npz`) holds, and checks every name and shape. No tensor is read.

    Raises `UserError` for an architecture that is not supported, a configuration field that our modules cannot
    express, or tensors that do not fit the configuration.
    """
    weights = w.open_weights(path)
    if weights.path.suffix == ".npz":
        found = big_vision.inspect_npz(weights)
    else:
        config = read_config(Path(path))
        kind = architecture(config, Path(path))
        rows = architectures()
        if kind not in rows:
            raise UserError(f"{config_path(Path(path))}: {unknown('architecture', kind, rows, cutoff=0.8)}")
        _check_depth(weights, config, Path(path))
        found = rows[kind](weights, config)
    w.check(weights, found.tables.values(), found.ignore)
    return found


def architectures() -> dict[str, Callable[[TensorFiles, dict[str, Any]], CheckpointInfo]]:
    """Architecture -> the function that reads it."""
    decoders = dict.fromkeys(hf_decoder.ARCHITECTURES, _decoder_only)
    return {**decoders, "Gemma3ForConditionalGeneration": _text_of_gemma3, **hf_vlm.ROWS}


def config_path(path: Path) -> Path:
    """Where the configuration of a folder, or of a file in one, stands."""
    return (path if path.is_dir() else path.parent) / "config.json"


def read_config(folder: Path) -> dict[str, Any]:
    """config.json. Raises `UserError` where there is none, or where it is not JSON."""
    path = config_path(folder)
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: missing; it says which model the weights are") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: an object is wanted, not {type(config).__name__}")
    return config


def architecture(config: Mapping[str, Any], where: Path) -> str:
    """The one architecture that a config.json names."""
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1:
        raise UserError(f"{config_path(where)}: architectures={names!r}: one name in a list is wanted")
    return str(names[0])


def _check_depth(weights: TensorFiles, config: dict[str, Any], path: Path) -> None:
    """Raises `UserError` for more layers than the file has tensors, before names are made of them."""
    for part in (config, config.get("text_config"), config.get("vision_config")):
        depth = part.get("num_hidden_layers") if isinstance(part, dict) else None
        if isinstance(depth, int | float) and depth > len(weights.shapes):
            held = len(weights.shapes)
            raise UserError(f"{config_path(path)}: num_hidden_layers={depth}, but there are only {held} tensors")


def _decoder_only(weights: TensorFiles, config: dict[str, Any], text: dict[str, Any] | None = None) -> CheckpointInfo:
    spec = hf_decoder.decoder_spec(config if text is None else text, str(config_path(weights.path)))
    tables = {"decoder": hf_decoder.decoder_table(spec, *hf_decoder.prefixes(weights))}
    kind = architecture(config, weights.path)
    return CheckpointInfo(kind, None, None, spec, "causal", None, tables, weights, config, hf_decoder.ignore(spec))


def _text_of_gemma3(weights: TensorFiles, config: dict[str, Any]) -> CheckpointInfo:
    """The language model alone: Gemma 3's way with images is not ours."""
    where, text = str(config_path(weights.path)), config.get("text_config")
    read = {*hf_vlm.OUTER, "mm_tokens_per_image"} - {"tie_word_embeddings"}
    fields.check(config, where, read, {**hf_vlm.FIXED, "tie_word_embeddings": (True,)})
    if not isinstance(text, dict):
        raise UserError(f"{where}: text_config={text!r}: an object is wanted")
    found = _decoder_only(weights, config, text)
    return found._replace(ignore=(*found.ignore, r".*vision_tower\..*", r".*multi_modal_projector\..*"))


def with_encoder(found: CheckpointInfo, encoder: EncoderSpec) -> CheckpointInfo:
    """The same files, of whose image tower other layers are looked at (taps, feature layer, pooling head): which
    tensors are read follows from `encoder`.
    """
    if found.weights.path.suffix == ".npz":
        table = big_vision.encoder_table(encoder, *big_vision.tower(found.weights))
    else:
        table = hf_encoder.encoder_table(encoder, hf_encoder.prefix_of(found.weights))
    return found._replace(encoder=encoder, tables={**found.tables, "encoder": table})


def load_parts(
    found: CheckpointInfo,
    parts: Iterable[str] = PARTS,
    plan: Any | None = None,
    dtype: str | None = "float32",
    on_tensor: Callable[[int], None] | None = None,
    scan_layers: bool = True,
) -> dict[str, Any]:
    """{"encoder": ..., "connector": ..., "decoder": ...}, as far as asked for and there; see `weights.load_params`.

    scan_layers: as in `ComputeSpec`: the decoder's layers stacked, or each on its own without ever being stacked.

    Raises `UserError` for a head in the file that config.json says is the embedding, and is not.
    """
    read = {}
    for part in parts:
        if part in found.tables:
            table = found.tables[part]
            if part == "decoder":
                if found.decoder.tied_head:
                    hf_decoder.check_tied(found.weights, table)
                table = table if scan_layers else unstack_table(table, found.decoder.depth)
            shapes = boxed(found, part, scan_layers)
            read[part] = w.load_params(found.weights, table, shapes, plan, dtype, (".*",), on_tensor)
    return read


def size_bytes(found: CheckpointInfo, parts: Iterable[str] = PARTS) -> int:
    """Bytes of the tensors that those parts are read from."""
    names = w.expected(found.tables[part] for part in parts if part in found.tables)
    return sum(math.prod(shape) * found.weights.shapes[name][1].itemsize for name, shape in names.items())


def unstack_table(table: TensorTable, depth: int) -> TensorTable:
    """The table of a decoder with scan_layers=True -> that of the same decoder with scan_layers=False."""
    blocks = {path.removeprefix("blocks/"): leaf for path, leaf in table.items() if path.startswith("blocks/")}
    rest = {path: leaf for path, leaf in table.items() if not path.startswith("blocks/")}
    return {**rest, **{f"blocks_{i}/{name}": leaf.block(i) for i in range(depth) for name, leaf in blocks.items()}}


def boxed(found: CheckpointInfo, part: str, scan_layers: bool = True) -> Any:
    """Boxed shapes of one part of a found model."""
    compute = ComputeSpec("float32", "none", "xla", 1, "replicated", (1, 1, 1), scan_layers=scan_layers)
    key = jax.random.key(0)
    if part == "encoder":
        image = jax.ShapeDtypeStruct((1, found.encoder.image_size, found.encoder.image_size, 3), "float32")
        return jax.eval_shape(Encoder(found.encoder, compute).init, key, image)["params"]
    if part == "connector":
        return jax.eval_shape(lambda key: connector.init_weights(key, model_spec(found)), key)
    text = jax.ShapeDtypeStruct((1, 2), "int32")
    metadata = AttentionMetadata(text, text, text)
    return jax.eval_shape(Decoder(found.decoder, compute).init, key, text, metadata)["params"]


def model_spec(found: CheckpointInfo) -> ModelSpec:
    """A whole model, in which every patch reaches the decoder. Raises `UserError` where a part is missing."""
    encoder, decoder = found.encoder, found.decoder
    if encoder is None or decoder is None or found.projector is None:
        raise UserError(f"{found.weights.path}: {found.kind} is no whole model: it has {', '.join(found.tables)}")
    compressor = CompressorSpec("none", encoder.patches, encoder.grid, encoder.width, 0, decoder.width, 1, 1, 1, 0)
    return ModelSpec(encoder, compressor, found.projector, decoder, found.mask)
