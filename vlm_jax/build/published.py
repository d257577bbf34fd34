"""Published files that a run starts from: tokenizers, and parts of models, checked against its spec."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import vlm_jax
from vlm_jax.checkpoints import inspection
from vlm_jax.compress import catalog
from vlm_jax.core.errors import UserError
from vlm_jax.core.located import located
from vlm_jax.core.specs import PREPARATION, DecoderSpec, EncoderSpec, ModelSpec
from vlm_jax.data import tokenizers
from vlm_jax.distributed import partitioning
from vlm_jax.sizing import zoo


def tokenizer_folder(folder: str) -> Path:
    """ "" is the tokenizer of the glyph suite."""
    return located(folder) if folder else Path(vlm_jax.__file__).parent / "studies" / "glyphs" / "tokenizer"


@functools.lru_cache(maxsize=4)
def load_tokenizer(folder: str) -> tokenizers.Tokenizer:
    """The tokenizer of a language model's folder; "" is that of the glyph suite."""
    path = tokenizer_folder(folder)
    config = inspection.read_config(path) if (path / "config.json").is_file() else {}
    tokenizer = tokenizers.read_tokenizer(path, config, ("<image>",))
    if not tokenizer.eos_ids:
        raise UserError(f"{folder}: expected an eos_token for training, got none")
    return tokenizer


# Spec fields that do not affect the weights, or are chosen by the run.
_MAY_DIFFER = ("name", "context", "taps", "feature_layer", "pooling_head", *PREPARATION)


def public_params(
    path: Path, part: str, spec: EncoderSpec | DecoderSpec, plan: partitioning.Plan | None, scan_layers: bool = True
) -> Any:
    """float32 weights of one part of a published model. Raises `UserError` where its spec is another one."""
    info = inspection.inspect(path)
    found = getattr(info, part)
    if found is None:
        raise UserError(
            (part == "encoder" and info.missing) or f"{path}: expected a model with a {part}, got one without"
        )
    if differing := _differing(found, spec):
        values = ", ".join(f"{name}={getattr(found, name)} (not {getattr(spec, name)})" for name in differing)
        raise UserError(f"{path}: expected {part} {spec.name}, got {values}: {_advice(part, found, differing)}")
    info = inspection.with_encoder(info, spec) if part == "encoder" else info
    return inspection.load_parts(info, (part,), plan, "float32", scan_layers=scan_layers)[part]


def _differing(found: Any, spec: Any) -> list[str]:
    """Fields that matter and differ; floats that went through JSON or GGUF are equal."""

    def equal(a: Any, b: Any) -> bool:
        return math.isclose(a, b, rel_tol=1e-5) if isinstance(a, float) and isinstance(b, float) else a == b

    names = (field.name for field in dataclasses.fields(spec))
    return [n for n in names if n not in _MAY_DIFFER and not equal(getattr(found, n), getattr(spec, n))]


def _advice(part: str, found: Any, differing: Sequence[str]) -> str:
    """What to write in the config for this checkpoint."""
    if differing == ["vocab"]:
        return f"write --config.model.vocab={found.vocab}"
    zoo_of, field = (zoo.ENCODERS, "encoder") if part == "encoder" else (zoo.DECODERS, "llm")
    names = [name for name, spec in zoo_of.items() if not [n for n in _differing(found, spec) if n != "vocab"]]
    if not names:
        return "no row of sizing/zoo.py describes this checkpoint: add one"
    vocab = (
        f" --config.model.vocab={found.vocab}" if part == "decoder" and zoo_of[names[0]].vocab != found.vocab else ""
    )
    return f"write --config.model.{field}={names[0]}{vocab}"


def public_connector(path: Path, model: ModelSpec, plan: partitioning.Plan, vision: Path | None) -> dict[str, Any]:
    """float32 weights of a published model's projector, and of its compressor where the model has the same. `vision`:
    the folder of a tower, if the checkpoint names none that is there. Raises `UserError` for other sizes."""
    info = inspection.inspect(path)
    if info.missing and "connector" not in info.tables and vision is not None:
        info = inspection.inspect(path, vision)
    if "connector" not in info.tables:
        raise UserError(info.missing or f"{path}: expected a vision-language model with a projector, got one without")
    theirs, ours = info.compressor, model.compressor
    if theirs is not None and ours.name == theirs.name and ours != theirs:
        actual, config = vars(theirs), vars(ours)
        values = [f"{name}={actual[name]} (not {config[name]})" for name in actual if actual[name] != config[name]]
        raise UserError(f"{path}: expected the compressor of the config, got {ours.name} of {', '.join(values)}")
    loaded = inspection.load_connector(info, model, plan, "float32")
    if "projector" not in loaded:
        table = info.tables["connector"]
        expected = (model.projector, catalog.output_width(ours), model.decoder.width)
        actual = (info.projector, table["projector/kernel"].shape[0], table["projector/bias"].shape[0])
        raise UserError(f"{path}: expected a projector {expected} (kind, width in, width out), got {actual}")
    return loaded
