"""big_vision's `.npz` checkpoints: flat arrays under slash-joined names. Reads and writes the image tower of SigLIP.

Our name on the left, big_vision's on the right; `i` counts blocks, which we keep stacked on a leading axis and
big_vision keeps apart (or stacks too, under `encoderblock`, when it was trained with scan).
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.core import tree
from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import EncoderSpec

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
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise UserError(f"no encoder checkpoint {path}") from None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a readable .npz ({error})") from error
    stems = [
        name.removesuffix("embedding/kernel")
        for name in arrays
        if name.endswith("/embedding/kernel") and "txt" not in name
    ]
    prefix = min(stems, key=len) if stems else ""

    def take(name: str) -> np.ndarray:
        if prefix + name not in arrays:
            raise UserError(f"{path}: tensor {prefix + name!r} is missing for encoder {spec.name}")
        return np.asarray(arrays[prefix + name], np.float32)

    flat = {ours: take(theirs) for ours, theirs in _STEM.items()}
    flat["patch/kernel"] = flat["patch/kernel"].reshape(-1, spec.width)
    flat["position"] = flat["position"].reshape(-1, spec.width)
    stacked = f"{prefix}Transformer/encoderblock/LayerNorm_0/scale" in arrays
    for ours, theirs in _BLOCK.items():
        flat[f"blocks/{ours}"] = (
            take(f"Transformer/encoderblock/{theirs}")
            if stacked
            else np.stack([take(f"Transformer/encoderblock_{i}/{theirs}") for i in range(spec.depth)])
        )
    if spec.pooling_head:
        flat |= {f"pooling/{ours}": take(f"MAPHead_0/{theirs}") for ours, theirs in _POOL.items()}
    _check_shapes(path, flat, spec)
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


def _check_shapes(path: Path, flat: Mapping[str, np.ndarray], spec: EncoderSpec) -> None:
    channels = spec.width // spec.heads
    wanted = {
        "patch/kernel": (spec.patch_size**2 * 3, spec.width),
        "position": (spec.patches, spec.width),
        "blocks/attention/query/kernel": (spec.depth, spec.width, spec.heads, channels),
        "blocks/mlp/up/kernel": (spec.depth, spec.width, spec.mlp_width),
    }
    for name, shape in wanted.items():
        if flat[name].shape != shape:
            raise UserError(f"{path}: {name} has shape {flat[name].shape}, encoder {spec.name} wants {shape}")
