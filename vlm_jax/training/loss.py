"""Cross-entropy of the answer tokens, as sums."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.core.structs import Batch, LossSums


def sums(logits: Float[Array, "B T W"], batch: Batch) -> LossSums:
    """Summed negative log-likelihood (nats), arg-max hits and number of the tokens that `batch.weight` marks."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, batch.target[..., None], axis=-1)[..., 0]
    nll = jax.nn.logsumexp(logits, axis=-1) - chosen
    hits = jnp.argmax(logits, axis=-1) == batch.target
    return LossSums(jnp.sum(nll * batch.weight), jnp.sum(hits * batch.weight), jnp.sum(batch.weight))
