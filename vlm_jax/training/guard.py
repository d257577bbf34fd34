"""Bad steps: detection, and an optimiser that skips their updates.

A step is bad if its loss or gradient norm is not finite or, with `spike_factor`, if its loss is above that multiple of
the running mean loss of good steps. The mean is optimiser state, so a resumed run makes the same decisions.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from vlm_jax.core.specs import BadStepSpec

_DECAY = 0.98  # of the running mean loss: about fifty steps


class GuardState(NamedTuple):
    """State of a guarded optimiser."""

    inner: Any
    mean_loss: Float[Array, ""]  # of good steps; 0 before the first
    skipped: Int[Array, ""]  # bad steps so far


class StepRecord(NamedTuple):
    """Results of one step: device arrays, or numbers once fetched."""

    number: int
    sums: Any  # LossSums; zero for a skipped step
    norms: Any  # step.Norms


def guarded(optimiser: optax.GradientTransformation, spec: BadStepSpec) -> optax.GradientTransformation:
    """An optimiser whose `update(..., loss=)` returns zeros and keeps its state at a bad step; the optimiser itself if
    the spec only stops at losses and gradients that are not finite."""
    if spec.policy == "stop" and not spec.spike_factor:
        return optimiser

    def init(params: Any) -> GuardState:
        return GuardState(optimiser.init(params), jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32))

    def update(grads: Any, state: GuardState, params: Any = None, *, loss: Array, **_: Any) -> tuple[Any, GuardState]:
        good = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(grads))
        if spec.spike_factor:
            good &= (state.mean_loss == 0) | (loss <= spec.spike_factor * state.mean_loss)
        updates, inner = optimiser.update(grads, state.inner, params)
        updates = jax.tree.map(lambda u: jnp.where(good, u, jnp.zeros_like(u)), updates)
        inner = jax.tree.map(lambda new, old: jnp.where(good, new, old), inner, state.inner)
        mean = jnp.where(state.mean_loss == 0, loss, _DECAY * state.mean_loss + (1 - _DECAY) * loss)
        mean = jnp.where(good, mean, state.mean_loss)
        return updates, GuardState(inner, mean, state.skipped + jnp.where(good, 0, 1))

    return optax.GradientTransformationExtraArgs(init, update)


def skipped(opt_state: Any) -> int:
    """Number of updates skipped so far, of an optimiser state."""
    return int(opt_state.skipped) if isinstance(opt_state, GuardState) else 0


def find_stop(steps: Sequence[StepRecord], spec: BadStepSpec) -> tuple[int, str] | None:
    """(number, reason) of the first step at which the run must stop, or None. Takes numbers, not device arrays."""
    limit = spec.skip_limit if spec.policy == "skip_update" else 0
    for number, sums, norms in steps:
        if norms.skipped is None:
            loss = float(sums.nll) / max(float(sums.count), 1.0)
            if not (math.isfinite(loss) and math.isfinite(norms.grad)):
                return number, f"loss {loss:.4g}, gradient norm {float(norms.grad):.4g}"
        elif norms.skipped > limit:
            return number, f"bad steps in this stage: {int(norms.skipped)}"
    return None
