"""Errors as sums over questions; ratios and standard errors are formed outside jit (`clusters`)."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Score(NamedTuple):
    """Per row (question) of a batch."""

    wrong: Float[Array, " B"]  # answer tokens that greedy decoding got wrong
    inexact: Float[Array, " B"]  # 1 where any token is wrong
    forced_wrong: Float[Array, " B"]  # wrong under teacher forcing
    nll: Float[Array, " B"]  # under teacher forcing
    tokens: Float[Array, " B"]  # answer tokens without eos
    valid: Float[Array, " B"]  # 0 for padding rows


def score(
    nll: Float[Array, "B A"],
    hits: Bool[Array, "B A"],
    generated: Int[Array, "B new"],
    answer: Int[Array, "B A"],
    eos_id: int,
) -> Score:
    """Token-by-token errors against the true answer (padded with -1), without eos. A missing token is wrong. nll and
    hits are those of the true answer under teacher forcing.
    """
    counted = (answer >= 0) & (answer != eos_id)
    missing = answer.shape[1] - generated.shape[1]
    generated = jnp.pad(generated, ((0, 0), (0, max(missing, 0))), constant_values=-1)[:, : answer.shape[1]]
    wrong = counted & (generated != answer)

    def per_row(values: Array) -> Array:
        return jnp.sum(jnp.where(counted, values, 0), axis=1, dtype=jnp.float32)

    tokens = per_row(counted)
    inexact, valid = ((count > 0).astype(jnp.float32) for count in (per_row(wrong), tokens))
    return Score(per_row(wrong), inexact, per_row(~hits), per_row(nll), tokens, valid)
