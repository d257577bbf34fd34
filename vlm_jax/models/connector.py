"""The connector: a compressor of the catalog, and a projector to the decoder's width."""

from typing import Any

import jax
from jaxtyping import Array, Float

from vlm_jax.compress import catalog
from vlm_jax.compress.contract import PROJECTORS, Compressor
from vlm_jax.core.axes import ACT_EMBED, BATCH, EMBED, LENGTH, MLP, VISION, VISION_MLP
from vlm_jax.core.errors import UserError, unknown
from vlm_jax.core.specs import ModelSpec
from vlm_jax.core.structs import Evidence, Prefix
from vlm_jax.ops import initializers as w
from vlm_jax.ops.logical_axes import constrain, gather_for_compute
from vlm_jax.ops.products import dense

_IN, _OUT = (VISION, VISION_MLP), (MLP, EMBED)  # of the projector's kernels


def init_weights(key: Array, spec: ModelSpec) -> dict[str, Any]:
    """Boxed weights of compressor and projector. Raises `UserError` for an unknown projector or unsupported V."""
    catalog.check(spec.compressor)
    if spec.projector not in PROJECTORS:
        raise unknown("projector", spec.projector, PROJECTORS)
    compress_key, first, second = jax.random.split(key, 3)
    inputs, width = catalog.output_width(spec.compressor), spec.decoder.width
    projector = {"kernel": w.dense(first, (inputs, width), _IN), "bias": w.zeros((width,), _IN[1:])}
    if spec.projector != "linear":
        projector["out_kernel"] = w.dense(second, (width, width), _OUT)
        projector["out_bias"] = w.zeros((width,), _OUT[1:])
    return {
        "compressor": catalog.row(spec.compressor.name).init_weights(compress_key, spec.compressor),
        "projector": projector,
    }


def compress(weights: Any, evidence: Evidence, spec: ModelSpec) -> Prefix:
    """P patches -> V tokens of the decoder's width, with their mask (None: all valid)."""
    out = apply(weights, evidence, spec)
    tokens = out.tokens if catalog.row(spec.compressor.name).projects else _project(weights, out.tokens, spec.projector)
    return out._replace(tokens=constrain(tokens, (BATCH, LENGTH, ACT_EMBED)))


def apply(weights: Any, evidence: Evidence, spec: ModelSpec) -> Prefix:
    """P patches -> V tokens of the compressor's `output_width`. Raises `ValueError` for evidence that the compressor
    reads and that is missing, and `UserError` for a compressor that gives something else."""
    method = catalog.row(spec.compressor.name)
    optional = {"project"} | ({"taps"} if spec.compressor.taps == 0 else set())
    optional |= {"class_token"} if method.class_token_optional else set()
    for name in method.reads - optional:
        if getattr(evidence, name) is None:
            raise ValueError(f"compressor {spec.compressor.name!r} reads {name}, which is missing")
    if method.projects:
        evidence = evidence._replace(project=lambda x: _project(weights, x, spec.projector))
    out = method.apply(weights["compressor"], evidence, spec.compressor)
    _check_prefix(out, evidence, spec, method)
    return out


def _check_prefix(out: Any, evidence: Evidence, spec: ModelSpec, method: Compressor) -> None:
    """Raises `UserError` for anything but arrays of the shapes that follow from row and spec."""
    width = spec.decoder.width if method.projects else method.output_width(spec.compressor)
    shape = (evidence.tokens.shape[0], method.entering(spec.compressor), width)
    where = f"compressor {spec.compressor.name!r}: expected apply to give"
    if not isinstance(out, Prefix):
        raise UserError(f"{where} a Prefix, got {type(out).__name__}")
    question = None if evidence.question_tokens is None else evidence.question_tokens.shape
    for name, array, expected in zip(Prefix._fields, out, (shape, shape[:2], question), strict=True):
        got = getattr(array, "shape", None)
        if got != expected and (array is not None or name == "tokens"):
            raise UserError(f"{where} {name} of shape {expected}, got {got}")


def _project(weights: Any, x: Float[Array, "B *rows width"], kind: str) -> Float[Array, "B *rows D"]:
    projector = weights["projector"]
    x = dense(x, gather_for_compute(projector["kernel"], _IN, x.dtype)) + projector["bias"].astype(x.dtype)
    if kind == "linear":
        return x
    inner = jax.nn.silu(x) if kind == "mlp_silu" else jax.nn.gelu(x, approximate=False)
    return dense(inner, gather_for_compute(projector["out_kernel"], _OUT, x.dtype)) + projector["out_bias"].astype(
        x.dtype
    )
