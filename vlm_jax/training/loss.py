"""The training loss: next-token cross-entropy, as sums."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.core.structs import Inputs, LossSums
from vlm_jax.models.decoder import Head
from vlm_jax.ops.cross_entropy import token_scores


def sums(states: Float[Array, "B L D"], head: Head, inputs: Inputs) -> LossSums:
    """Sums of negative log-likelihood (nats), arg-max hits and weights; weight t is that of token t + 1."""
    targets = jnp.roll(inputs.tokens, -1, axis=1)
    nll, hits = token_scores(states, head.table, head.softcap, targets)
    return LossSums(jnp.sum(nll * inputs.weight), jnp.sum(hits * inputs.weight), jnp.sum(inputs.weight))
