"""One update as mathematics, on a model small enough to differentiate by hand."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vlm_jax.core.specs import OptimSpec, StageSpec
from vlm_jax.core.structs import LossSums
from vlm_jax.training import optim
from vlm_jax.training import step as training_step

ROWS, INNER = 8, 3


class Rows(NamedTuple):
    x: np.ndarray
    y: np.ndarray
    weight: np.ndarray
    absent: None = None  # a field that a batch may lack


def forward(params: dict, rows: Rows) -> LossSums:
    """Sum of w (x A b - y)^2: "encoder" is not used, A is the connector and b the decoder."""
    error = rows.x @ params["connector"]["a"] @ params["decoder"]["b"] - rows.y
    return LossSums(
        nll=jnp.sum(rows.weight * error**2),
        count=jnp.sum(rows.weight),
        hits=jnp.sum(rows.weight * (error > 0)),
        answers=jnp.sum(rows.weight),
        part_nll=jnp.sum(rows.weight * error**2, axis=0),  # two sources
        part_count=jnp.sum(rows.weight, axis=0),
    )


def problem() -> tuple[dict, Rows]:
    """Weights differ between rows, so that a mean of the microbatches' means would be wrong."""
    rng = np.random.default_rng(0)
    params = {
        "encoder": {"e": rng.standard_normal((2, 2))},
        "connector": {"a": rng.standard_normal((4, INNER))},
        "decoder": {"b": rng.standard_normal((INNER, 2))},
    }
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    weight = np.array([[5, 1], [0, 0], [1, 0], [2, 2], [0, 1], [0, 0], [9, 1], [1, 1]], np.float32)
    x, y = rng.standard_normal((ROWS, 4)), rng.standard_normal((ROWS, 2))
    return params, Rows(x.astype(np.float32), y.astype(np.float32), weight)


def one_step(params: dict, rows: Rows, optimiser, train: tuple[str, ...], microbatches: int = 1):
    step = jax.jit(training_step.make_step(forward, optimiser, train, microbatches))
    return step(training_step.init_state(params, optimiser, train), rows)


@pytest.mark.parametrize("microbatches", [1, 2, 4, 8])
def test_a_step_against_gradients_by_hand(microbatches: int) -> None:
    """Gradient of the weighted mean in float64; any number of microbatches gives the sums and update of the whole."""
    params, rows = problem()
    a, b = (np.asarray(params[part][leaf], np.float64) for part, leaf in (("connector", "a"), ("decoder", "b")))
    error = rows.x @ a @ b - rows.y
    pull = 2 * rows.weight * error / rows.weight.sum()
    by_hand = {"a": rows.x.T @ pull @ b.T, "b": (rows.x @ a).T @ pull}

    state, sums, norms = one_step(params, rows, optax.sgd(0.1), ("connector", "decoder"), microbatches)
    nll, count = rows.weight * error**2, rows.weight.sum()
    expected = (nll.sum(), count, (rows.weight * (error > 0)).sum(), count, nll.sum(axis=0), rows.weight.sum(axis=0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), tuple(sums), expected)
    np.testing.assert_allclose(state.params["connector"]["a"], a - 0.1 * by_hand["a"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.params["decoder"]["b"], b - 0.1 * by_hand["b"], rtol=1e-5, atol=1e-6)
    size = np.sqrt((by_hand["a"] ** 2).sum() + (by_hand["b"] ** 2).sum())
    np.testing.assert_allclose((norms.grad, norms.update), (size, 0.1 * size), rtol=1e-5)
    assert int(state.step) == 1


def test_a_batch_without_answers_moves_nothing() -> None:
    """No target token: the update is zero and finite."""
    params, rows = problem()
    state, sums, _ = one_step(params, rows._replace(weight=0 * rows.weight), optax.sgd(0.1), ("connector", "decoder"))
    assert float(sums.count) == 0
    jax.tree.map(np.testing.assert_array_equal, state.params, params)


@pytest.mark.parametrize("train", [("connector",), ("decoder",), ("connector", "decoder")])
def test_frozen_parts_stand_still_and_have_no_moments(train: tuple[str, ...]) -> None:
    """Bit for bit, weight decay included; the optimiser's state holds the trained parts, twice, and no other array."""
    params, rows = problem()
    spec = OptimSpec(weight_decay=0.1, clip_norm=1.0, b1=0.9, b2=0.99, final_lr_share=0.1, lr_scale=())
    optimiser = optim.make_optimiser(spec, StageSpec("one", 10, train, 1e-2, 0))
    state, _, _ = one_step(params, rows, optimiser, train)
    assert set(state.params) == set(params)
    for part in params:
        same = jax.tree.map(np.array_equal, state.params[part], params[part])
        assert all(jax.tree.leaves(same)) == (part not in train)
    held = sorted(leaf.shape for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert held == sorted(leaf.shape for part in train for leaf in jax.tree.leaves(params[part]) for _ in range(2))


def test_two_stages() -> None:
    """The connector first, then both: a stage starts from the parameters of the one before, with moments of its own."""
    params, rows = problem()
    first, _, _ = one_step(params, rows, optax.adam(0.1), ("connector",))
    optimiser, train = optax.adam(0.1), ("connector", "decoder")
    state = training_step.init_state(first.params, optimiser, train, step=1)
    moments = optax.tree.get(state.opt_state, "mu")
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(moments))
    assert set(moments) == set(train)
    second, sums, _ = jax.jit(training_step.make_step(forward, optimiser, train))(state, rows)
    assert int(second.step) == 2
    np.testing.assert_array_equal(first.params["decoder"]["b"], params["decoder"]["b"])
    assert np.all(np.asarray(second.params["decoder"]["b"]) != np.asarray(params["decoder"]["b"]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), sums, jax.jit(forward)(first.params, rows))
