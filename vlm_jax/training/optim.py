"""The optimiser of a stage: clipping, AdamW with decay on matrices, warm-up and cosine schedule, per-path rates."""

import functools
import re
from typing import Any

import jax
import optax

from vlm_jax.core.specs import OptimSpec, StageSpec


def schedule(spec: OptimSpec, stage: StageSpec) -> optax.Schedule:
    """Learning rate by step of the stage: linear warm-up, then cosine to `final_lr_share` of the peak."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if stage.warmup_steps else stage.peak_lr,
        peak_value=stage.peak_lr,
        warmup_steps=stage.warmup_steps,
        decay_steps=max(stage.total_steps, stage.warmup_steps + 1),
        end_value=spec.final_lr_share * stage.peak_lr,
    )


@functools.cache
def learning_rate(spec: OptimSpec, stage: StageSpec) -> optax.Schedule:
    """`schedule` under jit, for the host: one program instead of one for each of its operations."""
    return jax.jit(schedule(spec, stage))


def make_optimiser(spec: OptimSpec, stage: StageSpec, moments: str = "float32") -> optax.GradientTransformation:
    """The optimiser of a stage; the learning rate of a parameter is multiplied by its first match in `spec.lr_scale`.

    moments: dtype of Adam's first moment. The second is float32: its relative updates of 1 - b2 underflow in bfloat16.
    """

    def scale(updates: Any, params: Any) -> Any:
        del params
        return jax.tree_util.tree_map_with_path(lambda path, u: u * _factor(spec, _name(path)), updates)

    steps = [
        optax.clip_by_global_norm(spec.clip_norm),
        optax.scale_by_adam(spec.b1, spec.b2, mu_dtype=moments),
        optax.add_decayed_weights(spec.weight_decay, mask=_matrices),
        optax.scale_by_learning_rate(schedule(spec, stage)),
    ]
    return optax.chain(*steps, *([optax.stateless(scale)] if spec.lr_scale else []))


def _matrices(params: Any) -> Any:
    """True for parameters with weight decay: neither biases nor vectors, not counting the axis of scanned blocks."""

    def is_matrix(path: Any, x: jax.Array) -> bool:
        name = _name(path)
        return not name.endswith("bias") and x.ndim - ("blocks" in name.split("/")) >= 2

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def _factor(spec: OptimSpec, name: str) -> float:
    return next((factor for pattern, factor in spec.lr_scale if re.search(pattern, name)), 1.0)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
