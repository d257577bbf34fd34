"""Weights that no golden file has to hold: each tensor is drawn from its own name, for the peer and for us."""

import zlib
from pathlib import Path
from typing import Any

import numpy as np


def weights(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """float32 tensors: kernels keep the scale of what they multiply, norms are near one."""
    out = {}
    for name, shape in shapes.items():
        draw = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
        scale = 0.2 if len(shape) < 2 else max(np.prod(shape[1:]), 1) ** -0.5
        shift = "norm" in name.lower() and not name.endswith("bias")
        out[name] = np.asarray(draw * scale + shift, np.float32)
    return out


def redrawn(model: Any, folder: Path, **how: Any) -> tuple[Any, dict[str, list[int]]]:
    """A model of transformers with its weights drawn, read back from `folder` (as `how` says), and their shapes."""
    from safetensors.numpy import load_file, save_file

    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    shapes = {name: list(leaf.shape) for name, leaf in sorted(load_file(file).items())}
    save_file(weights(shapes), file, metadata={"format": "pt"})
    return type(model).from_pretrained(folder, **how).eval(), shapes
