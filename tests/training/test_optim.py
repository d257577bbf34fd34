"""The optimiser against formulas written out in numpy."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.core import tree
from vlm_jax.core.specs import OptimSpec, StageSpec
from vlm_jax.training import optim

SPEC = OptimSpec(weight_decay=0.1, clip_norm=1.0, b1=0.9, b2=0.99, final_lr_share=0.05, lr_scale=())
STAGE = StageSpec("both", total_steps=40, train=("decoder",), peak_lr=2e-3, warmup_steps=8)


def test_schedule_is_linear_then_cosine() -> None:
    schedule = jax.jit(optim.schedule(SPEC, STAGE))
    for step in (0, 1, 5, 8, 9, 20, 39, 40, 50):
        if step < 8:
            wanted = 2e-3 * step / 8
        else:
            turn = math.pi * min((step - 8) / (40 - 8), 1)
            wanted = 2e-3 * (0.05 + 0.95 * (1 + math.cos(turn)) / 2)
        np.testing.assert_allclose(schedule(step), wanted, rtol=1e-5, atol=1e-12)


def test_schedule_without_warm_up_starts_at_the_peak() -> None:
    schedule = optim.schedule(SPEC, dataclasses.replace(STAGE, warmup_steps=0))
    np.testing.assert_allclose(schedule(0), 2e-3, rtol=1e-6)
    np.testing.assert_allclose(schedule(40), 0.05 * 2e-3, rtol=1e-5)


def updates_of(spec: OptimSpec, params: dict, grads: list[dict]) -> list[dict]:
    optimiser = optim.make_optimiser(spec, dataclasses.replace(STAGE, warmup_steps=0, total_steps=10**9))
    state, out, step = optimiser.init(params), [], jax.jit(optimiser.update)
    for grad in grads:
        update, state = step(grad, state, params)
        out.append(update)
    return out


def test_adamw_with_clipping_against_numpy() -> None:
    """Two steps: gradients beyond the norm are clipped, decay is decoupled from the moments."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((3, 4))
    grads = [rng.standard_normal((3, 4)), 0.01 * rng.standard_normal((3, 4))]
    assert np.linalg.norm(grads[0]) > 1 > np.linalg.norm(grads[1])
    m = v = 0
    found = updates_of(
        SPEC, {"decoder": {"kernel": jnp.asarray(w)}}, [{"decoder": {"kernel": jnp.asarray(g)}} for g in grads]
    )
    for t, (g, update) in enumerate(zip(grads, found, strict=True), 1):
        g = g / max(np.linalg.norm(g), 1)
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        wanted = -2e-3 * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.99**t)) + 1e-8) + 0.1 * w)
        np.testing.assert_allclose(update["decoder"]["kernel"], wanted, rtol=1e-4)


def test_a_first_moment_of_sixteen_bits_rounds_and_the_second_keeps_its_own() -> None:
    """A hundred steps of the same gradient. A mean stands still where its step, a (1 - b1)th of what is left, is less
    than half of its last bit, 2^-8 of it: the update ends within 2^-8 / (1 - b1).
    """
    params = {"decoder": {"kernel": jnp.ones((4, 3))}}
    grad = {"decoder": {"kernel": jnp.full((4, 3), 0.01)}}
    last = {}
    for moments in ("float32", "bfloat16"):
        optimiser = optim.make_optimiser(SPEC, STAGE, moments)
        state, step = optimiser.init(params), jax.jit(optimiser.update)
        for _ in range(100):
            update, state = step(grad, state, params)
        last[moments] = (update, tree.flatten(state))
    np.testing.assert_allclose(*(last[m][0]["decoder"]["kernel"] for m in last), rtol=2**-8 / 0.1)
    held = {path: leaf.dtype.name for path, leaf in last["bfloat16"][1].items() if leaf.ndim}
    assert sorted(held.values()) == ["bfloat16", "float32"]
    assert [name for path, name in held.items() if "mu" in path] == ["bfloat16"]


def decays() -> dict[str, tuple[tuple[int, ...], bool]]:
    """Path -> shape, and whether it is a matrix. The leading axis of scanned blocks makes nothing a matrix; unrolled
    blocks have none.
    """
    return {
        "decoder/embedding": ((32, 16), True),
        "decoder/blocks/attention/query/bias": ((2, 4, 8), False),
        "decoder/norm/scale": ((16,), False),
        "decoder/blocks/attention_norm/scale": ((2, 16), False),
        "decoder/blocks/mlp/up/kernel": ((2, 16, 24), True),
        "decoder/blocks_1/attention/query/bias": ((4, 8), False),
        "decoder/blocks_1/attention_norm/scale": ((16,), False),
        "decoder/blocks_1/mlp/up/kernel": ((16, 24), True),
        "decoder/blocks/attention/query/kernel": ((2, 16, 4, 8), True),
        "connector/projector/kernel": ((16, 16), True),
        "connector/projector/bias": ((16,), False),
    }


def test_only_matrices_decay() -> None:
    """Without a gradient, what is left of an update is the decay: -rate * weight_decay * w, or nothing."""
    params = tree.unflatten({path: jnp.full(shape, 3.0) for path, (shape, _) in decays().items()})
    (update,) = updates_of(SPEC, params, [jax.tree.map(jnp.zeros_like, params)])
    for path, leaf in tree.flatten(update).items():
        np.testing.assert_allclose(leaf, -2e-3 * 0.1 * 3.0 if decays()[path][1] else 0.0, rtol=1e-5, err_msg=path)


def test_the_first_matching_factor_scales_the_rate() -> None:
    """Decay included: the factor multiplies the learning rate, not the gradient."""
    spec = dataclasses.replace(SPEC, lr_scale=(("blocks/mlp", 0.25), ("^decoder/", 0.5), ("decoder", 100.0)))
    leaf = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3)), jnp.float32)
    params = {
        "connector": {"kernel": leaf, "decoderlike": leaf},
        "decoder": {"embedding": leaf, "blocks": {"mlp": {"kernel": leaf[None]}}},
    }
    grads = jax.tree.map(lambda x: 0.1 * x, params)
    plain, scaled = updates_of(SPEC, params, [grads])[0], updates_of(spec, params, [grads])[0]
    ratio = jax.tree.map(lambda a, b: float(np.mean(np.asarray(b) / np.asarray(a))), plain, scaled)
    assert ratio == {
        "connector": {"kernel": pytest.approx(1.0), "decoderlike": pytest.approx(100.0)},
        "decoder": {"embedding": pytest.approx(0.5), "blocks": {"mlp": {"kernel": pytest.approx(0.25)}}},
    }
