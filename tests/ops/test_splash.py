"""The fused kernel, run by Pallas' interpreter, and the path beside it, against float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import builders
from vlm_jax.distributed import partitioning
from vlm_jax.ops import logical_axes, masks, splash
from vlm_jax.ops.attention import attend

B, L, N, K, C = 2, 128, 2, 1, 8
SCALE = 0.3


def problem() -> tuple[tuple[np.ndarray, ...], splash.Causal]:
    """Queries, keys and values; the second row holds two conversations and ends in padding."""
    rng = np.random.default_rng(0)
    qkv = tuple(rng.standard_normal((B, L, heads, C)).astype(np.float32) for heads in (N, K, K))
    return qkv, splash.Causal(jnp.array([[1] * L, [1] * 40 + [2] * (L - 77) + [0] * 37]))


def reference(q: np.ndarray, k: np.ndarray, v: np.ndarray, segment: np.ndarray, softcap: float | None) -> np.ndarray:
    """Row by row: token t sees the tokens of its segment up to t, and padding reads zeros."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(B, L, N):
        if segment[b, t]:
            seen = np.flatnonzero(segment[b, : t + 1] == segment[b, t])
            z = SCALE * k[b, seen, 0] @ q[b, t, n]
            z = softcap * np.tanh(z / softcap) if softcap else z
            p = np.exp(z - z.max())
            out[b, t, n] = p / p.sum() @ v[b, seen, 0]
    return out


def plain(softcap: float | None):
    return lambda q, k, v, mask: attend(q, k, v, mask.dense(), SCALE, softcap)


@pytest.fixture
def for_tpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs are traced as for a mesh of TPUs."""
    monkeypatch.setattr(partitioning.Plan, "platform", "tpu")
    monkeypatch.setattr(logical_axes, "platform", lambda: "tpu")


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_path_beside_the_kernel(softcap: float | None) -> None:
    """What `attend` runs on this machine when splash is asked for."""
    qkv, mask = problem()
    run = jax.jit(lambda *qkv: attend(*qkv, mask, SCALE, softcap, "splash"))
    np.testing.assert_allclose(run(*qkv), reference(*qkv, np.asarray(mask.segment), softcap), atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_kernel_and_its_gradients(softcap: float | None) -> None:
    """Channels are padded to a tile, two query heads share a key head; gradients are those of the plain path."""
    qkv, mask = problem()
    kernel = functools.partial(splash._on_tpu, scale=SCALE, softcap=softcap, interpret=True)
    pull = np.random.default_rng(1).standard_normal(qkv[0].shape).astype(np.float32)
    fused, back = jax.vjp(lambda *qkv: kernel(*qkv, mask.segment), *qkv)
    np.testing.assert_allclose(fused, reference(*qkv, np.asarray(mask.segment), softcap), atol=1e-5)
    _, plain_back = jax.vjp(lambda *qkv: plain(softcap)(*qkv, mask), *qkv)
    for ours, theirs in zip(back(pull), plain_back(pull), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_causal_rows_are_what_the_masks_say() -> None:
    """Packed conversations and padding on either side: the rule of `ops.masks`."""
    row = builders.causal([[0, 1, 1, 1, 2, 2, 0], [3, 3, 1, 1, 1, 1, 1]])
    np.testing.assert_array_equal(splash.Causal(row.segment).dense(), masks.attention_mask(row, row))


def test_it_applies_to_tpus_only() -> None:
    assert not splash.applies(256, 4, 2)


def test_where_it_applies(for_tpus: None) -> None:
    assert splash.applies(256, 4, 2)
    assert not splash.applies(200, 4, 2)
    where = partitioning.make_plan(builders.compute(strategy="fsdp_tensor", mesh=(1, 2, 4)))
    got = []
    where.jit(lambda x: got.append((splash.applies(256, 4, 2), splash.applies(256, 8, 4))) or x)(0)
    assert got == [(False, True)]


def test_a_sharded_call_keeps_each_device_to_its_rows_and_heads() -> None:
    """Through the plan, with a kernel that shows its shapes."""
    seen = []

    def kernel(q: jax.Array, real: jax.Array) -> jax.Array:
        seen.append((q.shape, real.shape))
        return 2 * q

    from vlm_jax.core.axes import ACT_HEADS, BATCH

    heads = (BATCH, None, ACT_HEADS, None)
    where = partitioning.make_plan(builders.compute(strategy="fsdp_tensor", mesh=(1, 4, 2)))
    x = np.arange(8 * 3 * 2 * 5.0, dtype=np.float32).reshape(8, 3, 2, 5)
    run = lambda x: logical_axes.on_each_device(kernel, (heads, (BATCH, None)), heads)(x, x[:, :, 0, 0])  # noqa: E731
    np.testing.assert_array_equal(where.jit(run)(x), 2 * x)
    assert set(seen) == {((2, 3, 1, 5), (2, 3))}
