"""Errors as sums over questions, ratios and standard errors outside jit.

Questions about one image are not independent, so the standard error is that of a ratio of sums over images:
r = sum_i e_i / sum_i n_i,  se(r)^2 = m/(m-1) * sum_i (e_i - r n_i)^2 / (sum_i n_i)^2  (Cochran, Sampling Techniques,
eq. 2.39).
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vlm_jax.core.structs import Batch


class Score(NamedTuple):
    """Per row (question) of a batch."""

    wrong: Float[Array, " B"]  # answer tokens that greedy decoding got wrong
    inexact: Float[Array, " B"]  # 1 where any token is wrong
    forced_wrong: Float[Array, " B"]  # wrong with the true answer so far as context
    nll: Float[Array, " B"]
    tokens: Float[Array, " B"]  # answer tokens, the end token left out
    valid: Float[Array, " B"]  # 0 where the row only fills the batch


def score(logits: Float[Array, "B T W"], generated: Int[Array, "B new"], batch: Batch, end: int) -> Score:
    """Compares with the true answer, token by token. The end token is not counted: producing it is trivial."""
    logits = logits.astype(jnp.float32)
    counted = (batch.weight > 0) & (batch.target != end)
    logp = jnp.take_along_axis(logits, batch.target[..., None], axis=-1)[..., 0] - _logsumexp(logits)
    forced_wrong = counted & (jnp.argmax(logits, axis=-1) != batch.target)
    # The k-th answer token is compared with the k-th generated one, and is wrong where none was generated.
    new_tokens = generated.shape[1]
    place = jnp.cumsum(batch.weight > 0, axis=1) - 1
    said = jnp.take_along_axis(generated, jnp.clip(place, 0, new_tokens - 1), axis=1)
    wrong = counted & ((said != batch.target) | (place >= new_tokens))

    def per_row(mask: Array) -> Array:
        return jnp.sum(mask, axis=1, dtype=jnp.float32)

    tokens = per_row(counted)
    return Score(
        per_row(wrong),
        (per_row(wrong) > 0).astype(jnp.float32),
        per_row(forced_wrong),
        per_row(jnp.where(counted, -logp, 0.0)),
        tokens,
        (tokens > 0).astype(jnp.float32),
    )


def _logsumexp(logits: Array) -> Array:
    peak = jnp.max(logits, axis=-1, keepdims=True)
    return jnp.log(jnp.sum(jnp.exp(logits - peak), axis=-1)) + peak[..., 0]


def ratio(errors: np.ndarray, counts: np.ndarray, cluster: np.ndarray) -> tuple[float, float]:
    """(ratio of sums, its standard error over clusters). Rows of a negative cluster are left out."""
    kept = cluster >= 0
    _, index = np.unique(cluster[kept], return_inverse=True)
    e = np.bincount(index, errors[kept].astype(np.float64))
    n = np.bincount(index, counts[kept].astype(np.float64))
    value, m = e.sum() / n.sum(), len(e)
    if m < 2:
        return float(value), float("nan")
    return float(value), float(np.sqrt(m / (m - 1) * np.sum((e - value * n) ** 2)) / n.sum())
