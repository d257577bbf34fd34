"""The train step, a pure function. Only trainable parts get gradients; microbatch sums are accumulated and divided
once, so they equal the full batch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from vlm_jax.core.structs import LossSums, TrainState
from vlm_jax.training.guard import GuardState

Forward = Callable[..., LossSums]
Step = Callable[..., tuple[TrainState, LossSums, "Norms"]]


class Norms(NamedTuple):
    """Global norms of gradients and updates, and the updates that a guarded optimiser has skipped in the stage."""

    grad: Float[Array, ""]
    update: Float[Array, ""]
    skipped: Int[Array, ""] | None = None


def init_state(
    params: Any, optimiser: optax.GradientTransformation, train: tuple[str, ...], step: int = 0
) -> TrainState:
    """The state at the start of a stage, with optimiser state for the parts in `train` only."""
    return TrainState(jnp.asarray(step, jnp.int32), params, optimiser.init(_part(params, train)))


def make_step(
    forward: Forward, optimiser: optax.GradientTransformation, train: tuple[str, ...], microbatches: int = 1
) -> Step:
    """`(state, batch, ...) -> (state, sums, norms)` for a model's `forward(params, batch, ...) -> LossSums`. More
    arguments are passed on."""

    def total(trained: Any, frozen: Any, batch: Any, *more: Any) -> tuple[Array, LossSums]:
        out = forward({**frozen, **trained}, batch, *more)
        return out.nll, out

    def step(state: TrainState, batch: Any, *more: Any) -> tuple[TrainState, LossSums, Norms]:
        trained = _part(state.params, train)
        frozen = {name: part for name, part in state.params.items() if name not in train}
        value_and_grad = jax.value_and_grad(total, has_aux=True)
        if microbatches == 1:
            (_, sums), grads = value_and_grad(trained, frozen, batch, *more)
        else:
            parts = jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch)

            def add(carry: Any, part: Any) -> tuple[Any, None]:
                (_, sums), grads = value_and_grad(trained, frozen, part, *more)
                return jax.tree.map(jnp.add, carry, (sums, grads)), None

            first = jax.tree.map(lambda x: x[0], parts)
            shapes = jax.eval_shape(lambda *args: value_and_grad(*args, *more), trained, frozen, first)
            (_, shape), shapes = shapes
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (shape, shapes))
            (sums, grads), _ = jax.lax.scan(add, zeros, parts)
        grads = jax.tree.map(lambda g: g / jnp.maximum(sums.count, 1), grads)
        if isinstance(state.opt_state, GuardState):
            mean = sums.nll / jnp.maximum(sums.count, 1)
            updates, opt_state = optimiser.update(grads, state.opt_state, trained, loss=mean)
            good = opt_state.skipped == state.opt_state.skipped
            sums = jax.tree.map(lambda total: jnp.where(good, total, 0), sums)
            skipped = opt_state.skipped
        else:
            updates, opt_state = optimiser.update(grads, state.opt_state, trained)
            skipped = None
        norms = Norms(optax.tree.norm(grads), optax.tree.norm(updates), skipped)
        params = {**frozen, **optax.apply_updates(trained, updates)}
        return TrainState(state.step + 1, params, opt_state), sums, norms

    return step


def _part(params: Any, train: tuple[str, ...]) -> Any:
    return {name: params[name] for name in train}
