"""The loop, with fakes for everything it is given."""

import itertools

import jax
import jax.numpy as jnp
import pytest

from vlm_jax.core.structs import TrainState
from vlm_jax.training import loop


def run(first: int, last: int, log_every: int = 3, save_every: int = 0, initial: int = 0):
    """Batch k holds the number k, a step adds it up. Returns (end, logs, saves)."""
    logs, saves = [], []

    def step(state, batch, number):
        return TrainState(state.step + 1, state.params + batch, None), {"sum": batch, "count": jnp.ones(())}, state.step

    end = loop.run(
        TrainState(jnp.asarray(first), jnp.asarray(initial), None), first, last,
        itertools.count(first + 1), jnp.asarray, step,
        log_every_steps=log_every, save_every_steps=save_every, on_log=logs.append,
        on_save=lambda number, state, log_sums: saves.append((number, int(state.params))),
    )  # fmt: skip
    return end.state, logs, saves


def test_logs_at_multiples_and_at_the_end_with_sums_since_the_last() -> None:
    end, logs, _ = run(0, 8)
    assert [(log.step, int(log.sums["sum"]), int(log.sums["count"]), log.steps) for log in logs] == [
        (3, 1 + 2 + 3, 3, 3),
        (6, 4 + 5 + 6, 3, 3),
        (8, 7 + 8, 2, 2),
    ]
    assert (int(end.step), int(end.params)) == (8, 36)


def test_numbers_count_over_the_whole_run_when_it_starts_late() -> None:
    """From step 4, logs fall on the same multiples: the first span is shorter."""
    _, logs, saves = run(4, 10, save_every=4)
    assert [(log.step, int(log.sums["sum"])) for log in logs] == [(6, 5 + 6), (9, 7 + 8 + 9), (10, 10)]
    assert saves == [(8, 5 + 6 + 7 + 8)]


@pytest.mark.parametrize(
    ("save_every", "last", "wanted"), [(0, 8, []), (2, 8, [2, 4, 6]), (3, 8, [3, 6]), (8, 8, []), (1, 3, [1, 2])]
)
def test_saves_at_multiples_and_not_at_the_end(save_every: int, last: int, wanted: list[int]) -> None:
    """What is saved is the state after that step."""
    *_, saves = run(0, last, save_every=save_every)
    assert saves == [(n, n * (n + 1) // 2) for n in wanted]


def test_no_steps_leave_the_state_alone() -> None:
    end, logs, saves = run(5, 5, save_every=1, initial=7)
    assert (int(end.params), logs, saves) == (7, [], [])


def test_nothing_in_the_loop_waits_for_the_device() -> None:
    """The whole loop can be traced: under a trace no array has a value yet, and to ask for one raises."""

    def traced(state):
        logs = []
        end = loop.run(
            state, 0, 7, (jnp.full((), k) for k in itertools.count()), lambda batch: batch,
            lambda state, batch, number: (state._replace(params=state.params + batch), state.params * 2, state.params),
            log_every_steps=2, save_every_steps=3, on_log=logs.append, on_save=lambda *saved: None,
        )  # fmt: skip
        return end.state, [(log.sums, log.norms) for log in logs]

    end, logs = jax.eval_shape(traced, TrainState(jnp.zeros(()), jnp.zeros(()), None))
    assert len(logs) == 4
    assert end.params.shape == ()


def checked(first: int, last: int, stop_at: int = 0, **every: int) -> list:
    """What the loop hears and says, in order: ("log", k), ("check", ks), ("save", k), ("end", k)."""
    calls = []
    end = loop.run(
        TrainState(jnp.asarray(first), jnp.zeros(()), None), first, last, itertools.count(first + 1),
        jnp.asarray, lambda state, batch, number: (state, {"sum": batch}, batch),
        on_log=lambda log: calls.append(("log", log.step)),
        on_save=lambda number, *_: calls.append(("save", number)),
        check=lambda steps, state: calls.append(("check", [(s.number, int(s.sums["sum"])) for s in steps])),
        stop=lambda number: number == stop_at, **every,
    )  # fmt: skip
    return [*calls, ("end", end.step)]


def test_every_step_is_checked_once_and_before_it_is_saved() -> None:
    """At a log those before the log before; at a save, and at the end, all."""
    calls = checked(0, 9, log_every_steps=2, save_every_steps=7)
    pairs = lambda *numbers: [(n, n) for n in numbers]  # noqa: E731
    assert calls == [
        ("log", 2), ("check", []), ("log", 4), ("check", pairs(1, 2)), ("log", 6), ("check", pairs(3, 4)),
        ("check", pairs(5, 6, 7)), ("save", 7), ("log", 8), ("check", []), ("log", 9), ("check", pairs(8)),
        ("check", pairs(9)), ("end", 9),
    ]  # fmt: skip


def test_a_stop_ends_the_loop_behind_its_step() -> None:
    """That step is checked; saving it is left to the caller, and so is what was not logged."""
    calls = checked(3, 9, stop_at=6, log_every_steps=100, save_every_steps=2)
    assert calls == [("check", [(4, 4)]), ("save", 4), ("check", [(5, 5), (6, 6)]), ("end", 6)]


def test_a_log_that_was_cut_in_two_adds_up() -> None:
    """Stopped behind step 5 of a log over steps 4 to 6, and gone on with what it had."""
    step = lambda state, batch, number: (state, {"sum": batch}, batch)  # noqa: E731
    state, logs = TrainState(jnp.zeros(()), jnp.zeros(()), None), []
    every = dict(log_every_steps=3, save_every_steps=0, on_log=logs.append, on_save=print)
    batches = itertools.count
    end = loop.run(state, 0, 9, batches(1), jnp.asarray, step, stop=lambda number: number == 5, **every)
    assert (int(end.log_sums.sums["sum"]), end.log_sums.steps) == (4 + 5, 2)
    loop.run(state, 5, 9, batches(6), jnp.asarray, step, log_sums=end.log_sums, **every)
    assert [(log.step, int(log.sums["sum"]), log.steps) for log in logs] == [(3, 6, 3), (6, 15, 3), (9, 24, 3)]
