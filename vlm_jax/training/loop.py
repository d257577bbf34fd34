"""The training loop: runs ahead of the device and takes everything it uses as arguments."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vlm_jax.core.structs import TrainState
from vlm_jax.training.guard import StepRecord

_AHEAD_STEPS = 8  # dispatched but unfinished steps: the device never idles, and a stop takes effect soon


class Log(NamedTuple):
    """Metrics of the steps since the last log, as device arrays that may still be computed."""

    step: int
    sums: Any  # LossSums since the last log
    norms: Any  # of the last step
    steps: int  # since the last log


class LogSums(NamedTuple):
    """Sums since the last log, saved in checkpoints so that a resumed run logs the same numbers."""

    sums: Any = None  # LossSums; None: no step
    steps: int = 0


class End(NamedTuple):
    """The state after the last step."""

    step: int
    state: TrainState
    log_sums: LogSums
    stopped: bool


def run(
    state: TrainState,
    first_step: int,
    last_step: int,
    batches: Iterator[Any],
    put: Callable[[Any], Any],
    step: Callable[..., Any],
    *,
    log_every_steps: int,
    save_every_steps: int,
    on_log: Callable[[Log], None],
    on_save: Callable[[int, TrainState, LogSums], None],
    evaluate_every_steps: int = 0,
    on_evaluate: Callable[[int, TrainState], None] = lambda step, state: None,
    check: Callable[[Sequence[StepRecord], TrainState], None] = lambda steps, state: None,
    stop: Callable[[int], bool] = lambda step: False,
    log_sums: LogSums | None = None,
) -> End:
    """Runs steps `first_step` + 1 to `last_step`, or until `stop(step)` is True after a step.

    `step(state, batch, number)` returns the next state, `LossSums` and `Norms`.
    `on_log` gets device arrays and must not block. `on_save` is called every
    `save_every_steps` (0: never), except at the last step, where the caller saves. `on_evaluate` is called every
    `evaluate_every_steps` (0: never) and at the last step, before a save. `check` gets every step once, in order, as
    device arrays: at a log those up to the log before, which are finished, and all before a save and at the end.
    """
    (sums, since), number, stopped = log_sums or LogSums(), first_step, False
    unchecked: list[StepRecord] = []
    logged, ahead = 0, deque()  # `logged`: the unchecked steps up to the last log
    for number in range(first_step + 1, last_step + 1):
        state, new, norms = step(state, put(next(batches)), number)
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
            on_save(number, state, LogSums(sums, since))
    check(unchecked, state)
    return End(number, state, LogSums(sums, since), stopped)
