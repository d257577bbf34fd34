"""The training loss: next-token cross-entropy, as sums."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.core.structs import Inputs, LossSums
from vlm_jax.models.decoder import Head
from vlm_jax.ops.cross_entropy import weighted_nll


def sums(
    states: Float[Array, "B L D"], head: Head, inputs: Inputs, eos_ids: Sequence[int] = (), sources: int = 1
) -> LossSums:
    """Sums of negative log-likelihood (nats), weights and arg-max hits; weight t is that of token t + 1. Of the
    sums, `nll` alone has a gradient.

    Args:
        eos_ids: end tokens, which are learned but not counted as hits or answers.
        sources: of the mixture.
    """
    targets, weight = jnp.roll(inputs.tokens, -1, axis=1), jnp.asarray(inputs.weight)
    nll = weighted_nll(states, head.table, head.softcap, targets, weight)
    answers = weight * ~jnp.isin(targets, jnp.array(eos_ids, targets.dtype))
    total = LossSums(nll.total, jnp.sum(weight), jnp.sum(nll.hits * answers), jnp.sum(answers))
    if inputs.part is None:
        return total
    by_source = jax.nn.one_hot(inputs.part, sources, dtype=jnp.float32)
    part_nll, part_count = (jnp.einsum("bl,bls->s", value, by_source) for value in (nll.tokens * weight, weight))
    return total._replace(part_nll=part_nll, part_count=part_count)
