"""Attention against a transcription in float64 NumPy, one query and one head at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.ops.attention import attend

B, T, S, N, K, C = 2, 3, 5, 4, 2, 8


def _inputs(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    shapes = ((B, T, N, C), (B, S, K, C), (B, S, K, C))
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def _mask(batch, heads, seed=1):
    mask = np.random.default_rng(seed).random((batch, heads, T, S)) < 0.6
    mask[0, 0, 0] = False  # a query that may see nothing
    return mask


def _reference(q, k, v, mask, scale, softcap, bias=0.0):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    allowed = np.broadcast_to(True if mask is None else mask, (B, N, T, S))
    added = np.broadcast_to(bias, (B, N, T, S))
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(B, T, N):
        kv_head = n // (N // K)
        seen = [s for s in range(S) if allowed[b, n, t, s]]
        if not seen:
            continue
        scores = np.array([q[b, t, n] @ k[b, s, kv_head] for s in seen]) * scale
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        scores = scores + added[b, n, t, seen]
        share = np.exp(scores - scores.max())
        share /= share.sum()
        out[b, t, n] = sum(p * v[b, s, kv_head] for p, s in zip(share, seen, strict=True))
    return out


@pytest.mark.parametrize("mask_shape", [None, (B, 1), (1, 1), (B, N), (1, N)])
@pytest.mark.parametrize(("scale", "softcap"), [(None, None), (0.7, 2.0)])
def test_equals_the_transcription(mask_shape, scale, softcap):
    q, k, v = _inputs()
    mask = None if mask_shape is None else _mask(*mask_shape)
    run = jax.jit(attend, static_argnames=("scale", "softcap"))
    got = run(q, k, v, None if mask is None else jnp.asarray(mask), scale=scale, softcap=softcap)
    want = _reference(q, k, v, mask, C**-0.5 if scale is None else scale, softcap)
    np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.parametrize("bias_shape", [(1, N), (B, 1)])
def test_a_bias_is_added_to_the_scaled_scores(bias_shape):
    (q, k, v), mask = _inputs(), _mask(B, 1)
    bias = np.random.default_rng(2).normal(size=(*bias_shape, T, S)).astype(np.float32)
    got = attend(q, k, v, jnp.asarray(mask), scale=0.7, bias=jnp.asarray(bias))
    np.testing.assert_allclose(got, _reference(q, k, v, mask, 0.7, None, bias), atol=2e-6)
    with pytest.raises(ValueError, match="together"):
        attend(q, k, v, None, softcap=2.0, bias=jnp.asarray(bias))


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_query_that_sees_nothing_reads_zeros_and_sends_no_gradient(softcap):
    mask = jnp.asarray(_mask(B, 1))
    run = jax.jit(lambda *qkv: attend(*qkv, mask, softcap=softcap))
    pull_back = jax.jit(lambda seed: jax.vjp(run, *_inputs())[1](seed))
    out = np.asarray(run(*_inputs()))
    assert not out[0, 0].any()
    assert out[0, 1].any()
    nowhere_else = np.zeros_like(out)
    nowhere_else[0, 0] = 1.0
    for gradient in pull_back(nowhere_else):
        assert not np.asarray(gradient).any()
    for gradient in pull_back(np.ones_like(out)):
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_sixteen_bits_lose_rounding_only(softcap):
    q, k, v = _inputs(dtype=jnp.bfloat16)
    mask = _mask(B, 1)
    got = attend(q, k, v, jnp.asarray(mask), softcap=softcap)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), _reference(q, k, v, mask, C**-0.5, softcap), atol=0.03)


@pytest.mark.parametrize("softcap", [None, 50.0])
def test_scores_too_large_for_sixteen_bits_stay_a_softmax(softcap):
    q, k, v = _inputs(dtype=jnp.bfloat16)
    out = attend(q * 1e4, k * 1e4, v, jnp.asarray(_mask(B, 1)), softcap=softcap)
    assert jnp.isfinite(out).all()
    assert jnp.abs(out).max() <= jnp.abs(v).max()
