"""big_vision's `.npz` checkpoints: flat arrays under slash-joined names. Reads and writes the image tower of SigLIP.

Our name on the left, big_vision's on the right; `i` counts blocks, which we keep stacked on a leading axis and
big_vision keeps apart (or stacks too, under `encoderblock`, when it was trained with scan).
"""

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from vlm_jax.core import tree
from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import ComputeSpec, EncoderSpec
from vlm_jax.models.vision import Encoder

_ATTENTION = "MultiHeadDotProductAttention_0"
_LEAVES = {
    **{
        f"attention/{name}/{leaf}": f"{_ATTENTION}/{name}/{leaf}"
        for name in ("query", "key", "value", "out")
        for leaf in ("kernel", "bias")
    },
    **{f"mlp/up/{leaf}": f"MlpBlock_0/Dense_0/{leaf}" for leaf in ("kernel", "bias")},
    **{f"mlp/down/{leaf}": f"MlpBlock_0/Dense_1/{leaf}" for leaf in ("kernel", "bias")},
}  # fmt: skip
_BLOCK = _LEAVES | {
    f"{ours}/{leaf}": f"{theirs}/{leaf}"
    for ours, theirs in (("attention_norm", "LayerNorm_0"), ("mlp_norm", "LayerNorm_1"))
    for leaf in ("scale", "bias")
}
_POOL = _LEAVES | {"probe": "probe", "norm/scale": "LayerNorm_0/scale", "norm/bias": "LayerNorm_0/bias"}
_STEM = {
    "patch/kernel": "embedding/kernel",
    "patch/bias": "embedding/bias",
    "position": "pos_embedding",
    "norm/scale": "Transformer/encoder_norm/scale",
    "norm/bias": "Transformer/encoder_norm/bias",
}


def load_encoder(path: str | Path, spec: EncoderSpec) -> dict[str, Any]:
    """Parameters of `models.vision.Encoder` (float32) from a `.npz` of a ViT or of both towers.

    Raises `UserError` for a missing or corrupt file, or a missing or misshapen tensor.
    """
    path = Path(path)
    try:
        if not zipfile.is_zipfile(path) and path.exists():
            raise ValueError("it is no zip archive")
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise UserError(f"no encoder checkpoint {path}") from None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: not a readable .npz ({error})") from error
    stems = [
        name.removesuffix("embedding/kernel")
        for name in arrays
        if name.endswith("/embedding/kernel") and "txt" not in name
    ]
    prefix = min(stems, key=len) if stems else ""

    def take(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if prefix + name not in arrays:
            raise UserError(f"{path}: tensor {prefix + name!r} is missing for encoder {spec.name}")
        found = arrays[prefix + name]
        if found.shape != shape:
            raise UserError(f"{path}: {prefix + name!r} has shape {found.shape}, encoder {spec.name} wants {shape}")
        return np.asarray(found, np.float32)

    wanted = _shapes(spec)
    theirs_only = {
        "patch/kernel": (spec.patch_size, spec.patch_size, 3, spec.width),
        "position": (1, *wanted["position"]),
    }
    flat = {
        ours: take(theirs, theirs_only.get(ours, wanted[ours])).reshape(wanted[ours]) for ours, theirs in _STEM.items()
    }
    stacked = f"{prefix}Transformer/encoderblock/LayerNorm_0/scale" in arrays
    if f"{prefix}Transformer/encoderblock_{spec.depth}/LayerNorm_0/scale" in arrays:
        raise UserError(f"{path}: has more blocks than the {spec.depth} of encoder {spec.name}")
    for ours, theirs in _BLOCK.items():
        shape = wanted[f"blocks/{ours}"]
        flat[f"blocks/{ours}"] = (
            take(f"Transformer/encoderblock/{theirs}", shape)
            if stacked
            else np.stack([take(f"Transformer/encoderblock_{i}/{theirs}", shape[1:]) for i in range(spec.depth)])
        )
    if spec.pooling_head:
        flat |= {
            f"pooling/{ours}": take(f"MAPHead_0/{theirs}", wanted[f"pooling/{ours}"]) for ours, theirs in _POOL.items()
        }
    return tree.unflatten(flat)


def save_encoder(path: str | Path, params: Mapping[str, Any], spec: EncoderSpec) -> None:
    """Writes the encoder as the image side (`params/img/...`) of a big_vision checkpoint."""
    flat = {name: np.asarray(leaf) for name, leaf in tree.flatten(params).items()}
    out = {theirs: flat[ours] for ours, theirs in _STEM.items()}
    out["embedding/kernel"] = out["embedding/kernel"].reshape(spec.patch_size, spec.patch_size, 3, spec.width)
    out["pos_embedding"] = out["pos_embedding"][None]
    for ours, theirs in _BLOCK.items():
        for i in range(spec.depth):
            out[f"Transformer/encoderblock_{i}/{theirs}"] = flat[f"blocks/{ours}"][i]
    if spec.pooling_head:
        out |= {f"MAPHead_0/{theirs}": flat[f"pooling/{ours}"] for ours, theirs in _POOL.items()}
    temporary = Path(path).with_suffix(".partial.npz")
    np.savez(temporary, **{f"params/img/{name}": leaf for name, leaf in out.items()})
    temporary.replace(path)


def _shapes(spec: EncoderSpec) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of the encoder, under our names."""
    encoder = Encoder(spec, ComputeSpec("float32", "none", "xla", 1, "replicated", (1, 1, 1)))
    image = jax.ShapeDtypeStruct((1, spec.image_size, spec.image_size, 3), np.float32)
    params = nn.meta.unbox(jax.eval_shape(encoder.init, jax.random.key(0), image))["params"]
    return {name: leaf.shape for name, leaf in tree.flatten(params).items()}
