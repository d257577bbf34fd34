"""The training loop: it is given everything it uses, and nothing in it waits for the device."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vlm_jax.core.structs import TrainState


class Log(NamedTuple):
    """What is known every `log_every_steps`: device arrays, still being computed when the log is handed over."""

    step: int
    sums: Any  # LossSums since the last log
    norms: Any  # of the last step
    steps: int  # since the last log


def run(
    state: TrainState,
    first_step: int,
    last_step: int,
    batches: Iterator[tuple[Any, Any]],
    put: Callable[[Any], Any],
    step: Callable[..., Any],
    *,
    log_every_steps: int,
    save_every_steps: int,
    on_log: Callable[[Log], None],
    on_save: Callable[[int, TrainState, Any], None],
) -> tuple[TrainState, Any]:
    """Steps `first_step` to `last_step`; returns the state and the data cursor behind the last batch.

    `batches` yields (batch, cursor). `on_log` must not block: it gets device arrays. `on_save` is called every
    `save_every_steps` (0: never), never at the last step: what happens there is the caller's to decide.
    """
    sums, cursor, since = None, None, 0
    for number in range(first_step + 1, last_step + 1):
        batch, cursor = next(batches)
        state, new, norms = step(state, put(batch))
        sums = new if sums is None else jax.tree.map(jnp.add, sums, new)
        since += 1
        if number % log_every_steps == 0 or number == last_step:
            on_log(Log(number, sums, norms, since))
            sums, since = None, 0
        if save_every_steps and number % save_every_steps == 0 and number != last_step:
            on_save(number, state, cursor)
    return state, cursor
