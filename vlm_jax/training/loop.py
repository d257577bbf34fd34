"""The training loop: it is given everything it uses, and nothing in it waits for the step that the device is at."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vlm_jax.core.structs import TrainState
from vlm_jax.training.guard import StepRecord

# How many steps the host runs ahead: the device never waits for it, and a request to stop is heard in time.
_AHEAD_STEPS = 8


class Log(NamedTuple):
    """What is known every `log_every_steps`: device arrays, still being computed when the log is handed over."""

    step: int
    sums: Any  # LossSums since the last log
    norms: Any  # of the last step
    steps: int  # since the last log


class Unlogged(NamedTuple):
    """What has been added up since the last log: saved with the state, so that a resumed run logs the same numbers."""

    sums: Any = None  # LossSums; None: nothing
    steps: int = 0


NOTHING = Unlogged()


class End(NamedTuple):
    """Where the loop has come to."""

    step: int
    state: TrainState
    cursor: Any  # of the data, behind the last batch; None where there was no step to take
    unlogged: Unlogged
    stopped: bool


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
    on_save: Callable[[int, TrainState, Any, Unlogged], None],
    evaluate_every_steps: int = 0,
    on_evaluate: Callable[[int, TrainState], None] = lambda step, state: None,
    check: Callable[[Sequence[StepRecord], TrainState], None] = lambda steps, state: None,
    stop: Callable[[int], bool] = lambda step: False,
    unlogged: Unlogged = NOTHING,
) -> End:
    """Steps `first_step` to `last_step`, or until `stop(step)`, which is asked behind every step.

    `batches` yields (batch, cursor). `on_log` must not block: it gets device arrays. `on_save` is called every
    `save_every_steps` (0: never), never at the last step or where the loop stops: what happens there is the caller's
    to decide. `on_evaluate` is called every `evaluate_every_steps` (0: never) and at the last step, ahead of a save.
    `check` gets every step once, in order, as device arrays: at a log those before the log before it, which the device
    has left behind, and all before a save and at the end, so that what is saved has been checked. `unlogged` is what
    was saved with the state.
    """
    (sums, since), cursor, number, stopped = unlogged, None, first_step, False
    unchecked: list[StepRecord] = []
    logged, ahead = 0, deque()  # how many of the unchecked had been logged
    for number in range(first_step + 1, last_step + 1):
        batch, cursor = next(batches)
        state, new, norms = step(state, put(batch))
        sums = new if sums is None else jax.tree.map(jnp.add, sums, new)
        since += 1
        unchecked.append(StepRecord(number, new, norms))
        ahead.append(norms)
        if len(ahead) > _AHEAD_STEPS:
            jax.block_until_ready(ahead.popleft())
        if number % log_every_steps == 0 or number == last_step:
            on_log(Log(number, sums, norms, since))
            sums, since = None, 0
            check(unchecked[:logged], state)
            unchecked = unchecked[logged:]
            logged = len(unchecked)
        if evaluate_every_steps and (number % evaluate_every_steps == 0 or number == last_step):
            on_evaluate(number, state)
        stopped = stop(number)
        if stopped or number == last_step:
            break
        if save_every_steps and number % save_every_steps == 0:
            check(unchecked, state)
            unchecked, logged = [], 0
            on_save(number, state, cursor, Unlogged(sums, since))
    check(unchecked, state)
    return End(number, state, cursor, Unlogged(sums, since), stopped)
