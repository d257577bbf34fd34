"""Arrays of official compressors (tests/golden/compressors/README.txt), and their weights in our layout."""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.compress import catalog
from vlm_jax.core.specs import CompressorSpec
from vlm_jax.core.structs import Evidence, Prefix

FOLDER = Path(os.environ.get("VLM_JAX_GOLDEN_COMPRESSORS") or Path(__file__).parents[1] / "golden" / "compressors")
TOLERANCE = 1e-4  # of the largest output

Arrays = dict[str, np.ndarray]


def read(name: str) -> Arrays:
    with np.load(FOLDER / f"{name}.npz") as arrays:
        return dict(arrays)


def outputs(arrays: Arrays, prefix: str = "out") -> dict[int, np.ndarray]:
    """V -> the array `prefix`V."""
    return {int(name[len(prefix) :]): array for name, array in arrays.items() if name[len(prefix) :].isdigit()}


def under(arrays: Arrays, prefix: str) -> Arrays:
    """The arrays whose names start with `prefix`, without it."""
    return {name[len(prefix) :]: array for name, array in arrays.items() if name.startswith(prefix)}


def side(patches: int) -> tuple[int, int]:
    return (round(patches**0.5),) * 2


def linear(arrays: Arrays, name: str) -> dict[str, np.ndarray]:
    kernel = {"kernel": arrays[f"{name}.weight"].reshape(len(arrays[f"{name}.weight"]), -1).T}
    return kernel | ({"bias": arrays[f"{name}.bias"]} if f"{name}.bias" in arrays else {})


def norm(arrays: Arrays, name: str) -> dict[str, np.ndarray]:
    return {"scale": arrays[f"{name}.weight"], "bias": arrays[f"{name}.bias"]}


def depthwise(arrays: Arrays, name: str) -> dict[str, np.ndarray]:
    """[E, 1, r, c] -> [r c, E]."""
    return linear(
        {f"{name}.{part}": arrays[f"{name}.{part}"] for part in ("weight", "bias") if f"{name}.{part}" in arrays}, name
    )


def to_heads(weights: dict[str, np.ndarray], heads: int) -> dict[str, np.ndarray]:
    return {name: array.reshape(*array.shape[:-1], heads, -1) for name, array in weights.items()}


def from_heads(weights: dict[str, np.ndarray], heads: int) -> dict[str, np.ndarray]:
    return weights | {"kernel": weights["kernel"].reshape(heads, -1, weights["kernel"].shape[-1])}


def attention(arrays: Arrays, name: str, heads: int) -> dict[str, Any]:
    """torch's MultiheadAttention."""
    kernels = np.split(arrays[f"{name}.in_proj_weight"], 3)
    biases = np.split(arrays[f"{name}.in_proj_bias"], 3)
    parts = zip(("query", "key", "value"), kernels, biases, strict=True)
    inward = {part: to_heads({"kernel": kernel.T, "bias": bias}, heads) for part, kernel, bias in parts}
    return inward | {"out": from_heads(linear(arrays, f"{name}.out_proj"), heads)}


def projector(arrays: Arrays, first: str, second: str) -> Any:
    """Linear, GELU, Linear."""

    def project(x: jax.Array) -> jax.Array:
        x = jax.nn.gelu(x @ arrays[f"{first}.weight"].T + arrays[f"{first}.bias"], approximate=False)
        return x @ arrays[f"{second}.weight"].T + arrays[f"{second}.bias"]

    return project


def run(spec: CompressorSpec, weights: Any, project: Any = None, **evidence: Any) -> Prefix:
    """`apply` of the spec's row, jitted, in float32."""

    def apply(weights: Any, evidence: Any) -> Prefix:
        return catalog.row(spec.name).apply(weights, Evidence(**evidence, project=project), spec)

    return jax.jit(apply)(*jax.tree.map(jnp.asarray, (weights, evidence)))


def close(out: Any, expected: np.ndarray) -> None:
    assert out.shape == expected.shape
    np.testing.assert_allclose(out, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())
