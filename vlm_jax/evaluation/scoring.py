"""Errors as sums over questions, ratios and standard errors outside jit.

Questions about one image are not independent, so the standard error is that of a ratio of sums over images:
r = sum_i e_i / sum_i n_i,  se(r)^2 = m/(m-1) * sum_i (e_i - r n_i)^2 / (sum_i n_i)^2  (Cochran, Sampling Techniques,
eq. 2.39).
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


class Score(NamedTuple):
    """Per row (question) of a batch."""

    wrong: Float[Array, " B"]  # answer tokens that greedy decoding got wrong
    inexact: Float[Array, " B"]  # 1 where any token is wrong
    forced_wrong: Float[Array, " B"]  # wrong with the true answer so far as context
    nll: Float[Array, " B"]
    tokens: Float[Array, " B"]  # answer tokens, the end token left out
    valid: Float[Array, " B"]  # 0 where the row only fills the batch


def score(
    nll: Float[Array, "B A"],
    hits: Bool[Array, "B A"],
    generated: Int[Array, "B new"],
    answer: Int[Array, "B A"],
    end: int,
) -> Score:
    """Compares with the true answer (padded with -1), token by token. The end token is not counted: producing it is
    trivial. nll and hits are of each answer token with the true answer so far as context.
    """
    counted = (answer >= 0) & (answer != end)
    # The k-th answer token is compared with the k-th generated one, and is wrong where none was generated.
    missing = answer.shape[1] - generated.shape[1]
    generated = jnp.pad(generated, ((0, 0), (0, max(missing, 0))), constant_values=-1)[:, : answer.shape[1]]
    wrong = counted & (generated != answer)

    def per_row(values: Array) -> Array:
        return jnp.sum(jnp.where(counted, values, 0), axis=1, dtype=jnp.float32)

    tokens = per_row(counted)
    return Score(
        per_row(wrong),
        (per_row(wrong) > 0).astype(jnp.float32),
        per_row(~hits),
        per_row(nll),
        tokens,
        (tokens > 0).astype(jnp.float32),
    )


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
