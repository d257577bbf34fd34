"""The decoder's cache of keys and values: made empty, given more room, written into. One array a layer, so that a
layer's part is updated in place.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from vlm_jax.core.axes import ACT_HEADS, BATCH
from vlm_jax.core.specs import ComputeSpec, DecoderSpec
from vlm_jax.core.structs import AttentionMetadata, Cache
from vlm_jax.ops.logical_axes import constrain

Arrays = TypeVar("Arrays")

CACHE_AXES = (BATCH, None, ACT_HEADS, None)  # of keys and values: rows split as examples are, heads as heads are


def init_cache(spec: DecoderSpec, compute: ComputeSpec, batch: int, length: int) -> Cache:
    """A cache of `length` positions for `batch` rows, in the dtype of the activations; nothing is written yet."""
    shape = (batch, length, spec.kv_heads, spec.head_dim)
    key, value = (
        tuple(constrain(jnp.zeros(shape, compute.dtype), CACHE_AXES) for _ in range(spec.depth)) for _ in range(2)
    )
    # An array for each field: a cache is donated to the step that extends it.
    metadata = AttentionMetadata(*(jnp.zeros((batch, length), jnp.int32) for _ in range(3)))
    return Cache(key, value, metadata, jnp.zeros((), jnp.int32))


def pad_cache(cache: Cache, length: int) -> Cache:
    """The cache with room for `length` positions: a prompt is prefilled in a cache of its own length, so that it does
    not attend to what is still to be written. Raises `ValueError` where the cache is longer already.
    """
    more = length - cache.metadata.segment.shape[1]
    if more < 0:
        raise ValueError(f"pad_cache: expected a length of at least {length - more}, the cache's own, got {length}")

    def pad(leaf: Array) -> Array:
        return jnp.pad(leaf, [(0, more if axis == 1 else 0) for axis in range(leaf.ndim)])

    key, value = (tuple(constrain(pad(leaf), CACHE_AXES) for leaf in leaves) for leaves in (cache.key, cache.value))
    return cache._replace(key=key, value=value, metadata=AttentionMetadata(*map(pad, cache.metadata)))


def update_cache(held: Arrays, new: Arrays, index: Int[Array, ""]) -> Arrays:
    """Arrays of a cache with `new` written from position `index` on. They must have room for it: XLA would move a write
    that runs over the end.
    """

    def write(old: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), index, axis=1)

    return jax.tree.map(write, held, new)
