"""The loop, with fakes for everything it is given."""

import itertools

import jax
import jax.numpy as jnp
import pytest

from vlm_jax.core.structs import TrainState
from vlm_jax.training import loop


def run(first: int, last: int, log_every: int = 3, save_every: int = 0, initial: int = 0):
    """Batch k holds the number k, a step adds it up. Returns (end, cursor, logs, saves)."""
    logs, saves = [], []

    def step(state, batch):
        return TrainState(state.step + 1, state.params + batch, None), {"sum": batch, "count": jnp.ones(())}, state.step

    end, cursor = loop.run(
        TrainState(jnp.asarray(first), jnp.asarray(initial), None), first, last,
        ((k, {"next": k + 1}) for k in itertools.count(first + 1)), jnp.asarray, step,
        log_every_steps=log_every, save_every_steps=save_every, on_log=logs.append,
        on_save=lambda number, state, cursor: saves.append((number, int(state.params), cursor)),
    )  # fmt: skip
    return end, cursor, logs, saves


def test_logs_at_multiples_and_at_the_end_with_sums_since_the_last() -> None:
    end, cursor, logs, _ = run(0, 8)
    assert [(log.step, int(log.sums["sum"]), int(log.sums["count"]), log.steps) for log in logs] == [
        (3, 1 + 2 + 3, 3, 3),
        (6, 4 + 5 + 6, 3, 3),
        (8, 7 + 8, 2, 2),
    ]
    assert (int(end.step), int(end.params), cursor) == (8, 36, {"next": 9})


def test_numbers_count_over_the_whole_run_when_it_starts_late() -> None:
    """From step 4, logs fall on the same multiples: the first span is shorter."""
    _, _, logs, saves = run(4, 10, save_every=4)
    assert [(log.step, int(log.sums["sum"])) for log in logs] == [(6, 5 + 6), (9, 7 + 8 + 9), (10, 10)]
    assert saves == [(8, 5 + 6 + 7 + 8, {"next": 9})]


@pytest.mark.parametrize(
    ("save_every", "last", "wanted"), [(0, 8, []), (2, 8, [2, 4, 6]), (3, 8, [3, 6]), (8, 8, []), (1, 3, [1, 2])]
)
def test_saves_at_multiples_and_not_at_the_end(save_every: int, last: int, wanted: list[int]) -> None:
    """What is saved is the state behind that step, with the cursor of the next batch."""
    _, _, _, saves = run(0, last, save_every=save_every)
    assert saves == [(n, n * (n + 1) // 2, {"next": n + 1}) for n in wanted]


def test_no_steps_leave_the_state_alone() -> None:
    end, _, logs, saves = run(5, 5, save_every=1, initial=7)
    assert (int(end.params), logs, saves) == (7, [], [])


def test_nothing_in_the_loop_waits_for_the_device() -> None:
    """The whole loop can be traced: under a trace no array has a value yet, and to ask for one raises."""

    def traced(state):
        logs = []
        end, _ = loop.run(
            state, 0, 7, ((jnp.full((), k), k) for k in itertools.count()), lambda batch: batch,
            lambda state, batch: (state._replace(params=state.params + batch), state.params * 2, state.params),
            log_every_steps=2, save_every_steps=3, on_log=logs.append, on_save=lambda *saved: None,
        )  # fmt: skip
        return end, [(log.sums, log.norms) for log in logs]

    end, logs = jax.eval_shape(traced, TrainState(jnp.zeros(()), jnp.zeros(()), None))
    assert len(logs) == 4
    assert end.params.shape == ()
