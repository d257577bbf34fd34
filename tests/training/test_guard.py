"""A bad step leaves no trace: what follows is what would have followed without it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vlm_jax.core.specs import BadStepSpec
from vlm_jax.core.structs import LossSums
from vlm_jax.training import guard
from vlm_jax.training.step import Norms, init_state, make_step

SKIP = BadStepSpec("skip_update", 0.0, 3)
GOOD = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)


def forward(params: dict, batch: jnp.ndarray) -> LossSums:
    """Loss 2 + w . x: its gradient is the batch."""
    return LossSums(2 + params["decoder"]["w"] @ batch, *[jnp.ones(())] * 3)


def after(optimiser: optax.GradientTransformation, batches: list) -> tuple:
    step = jax.jit(make_step(forward, optimiser, ("decoder",)))
    state, sums = init_state({"decoder": {"w": jnp.zeros(4)}}, optimiser, ("decoder",)), []
    for batch in batches:
        state, new, norms = step(state, jnp.asarray(batch))
        sums.append(new)
    return state, sums, norms


def with_bad(*values: float) -> list:
    """The good batches, and behind the second one batch for each value, which stands in one place of it."""
    bad = [np.where(np.arange(4) == 1, value, GOOD[2]).astype(np.float32) for value in values]
    return [*GOOD[:2], *bad, *GOOD[2:]]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_step_that_is_not_finite_is_as_if_it_had_not_been(value: float) -> None:
    """Adam with momentum and a rate that follows its own count: parameters and moments bit for bit, step counted."""
    adam = optax.adam(optax.linear_schedule(0.1, 0.0, 10))
    plain, *_ = after(adam, list(GOOD))
    state, sums, norms = after(guard.guarded(adam, SKIP), with_bad(value, value))
    jax.tree.map(np.testing.assert_array_equal, state.params, plain.params)
    jax.tree.map(np.testing.assert_array_equal, state.opt_state.inner, plain.opt_state)
    assert (int(state.step), int(norms.skipped)) == (7, 2)
    assert [float(s.count) for s in sums] == [1, 1, 0, 0, 1, 1, 1]
    assert all(np.isfinite(float(s.nll)) for s in sums)


def test_a_spike_is_relative_to_the_mean_of_the_good_losses() -> None:
    """Against the mean by hand: 0.98 of the old and 0.02 of the new, from the first loss on."""
    spec = BadStepSpec("skip_update", 1.5, 3)
    losses = [2.0, 3.1, 2.9, 4.0, 3.0, 2.0]
    optimiser = guard.guarded(optax.sgd(0.0), spec)
    state, mean, skipped = optimiser.init(jnp.zeros(2)), 0.0, []
    for loss in losses:
        bad = mean > 0 and loss > 1.5 * mean
        skipped.append(bad)
        mean = mean if bad else loss if mean == 0 else 0.98 * mean + 0.02 * loss
        _, state = optimiser.update(jnp.ones(2), state, jnp.zeros(2), loss=jnp.float32(loss))
        assert int(state.skipped) == sum(skipped)
        assert float(state.mean_loss) == pytest.approx(mean, rel=1e-6)
    assert skipped == [False, True, False, True, False, False]


def test_the_default_is_the_optimiser_itself() -> None:
    """Nothing is added to the update of a run that only stops at what is not finite."""
    sgd = optax.sgd(0.1)
    assert guard.guarded(sgd, BadStepSpec()) is sgd


def steps(*of: tuple[float, float, int | None]) -> list[guard.StepRecord]:
    return [
        guard.StepRecord(n, LossSums(nll, 2.0, 0.0, 2.0), Norms(grad, 0.0, skipped))
        for n, (nll, grad, skipped) in enumerate(of, 5)
    ]


@pytest.mark.parametrize(
    ("spec", "of", "number"),
    [
        (BadStepSpec(), ((1, 1, None), (2, 3, None)), None),
        (BadStepSpec(), ((1, 1, None), (np.nan, 1, None), (np.nan, np.nan, None)), 6),
        (BadStepSpec(), ((1, np.inf, None),), 5),
        (BadStepSpec("stop", 2.0), ((1, 1, 0), (0, 1, 1)), 6),
        (SKIP, ((1, 1, 2), (0, np.nan, 3)), None),
        (SKIP, ((1, 1, 3), (0, np.nan, 4), (0, np.nan, 5)), 6),
    ],
)
def test_where_a_run_stops(spec: BadStepSpec, of: tuple, number: int | None) -> None:
    bad = guard.find_stop(steps(*of), spec)
    assert (bad and bad[0]) == number
