"""The training loss: next-token cross-entropy of the tokens that are learned, as sums."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.core.structs import Inputs, LossSums
from vlm_jax.models.decoder import Head
from vlm_jax.ops.cross_entropy import token_scores


def sums(states: Float[Array, "B L D"], head: Head, inputs: Inputs) -> LossSums:
    """Summed negative log-likelihood (nats), arg-max hits and number of the tokens that `inputs.weight` marks: weight t
    is of token t + 1, as state t predicts it.
    """
    targets = jnp.roll(inputs.tokens, -1, axis=1)
    nll, hits = token_scores(states, head.table, head.softcap, targets)
    return LossSums(jnp.sum(nll * inputs.weight), jnp.sum(hits * inputs.weight), jnp.sum(inputs.weight))
