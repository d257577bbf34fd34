"""The decoder's KV cache: one array a layer, updated in place."""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from vlm_jax.core.axes import ACT_HEADS, BATCH
from vlm_jax.core.specs import ComputeSpec, DecoderSpec
from vlm_jax.core.structs import AttentionMetadata, Cache
from vlm_jax.ops.logical_axes import constrain

Arrays = TypeVar("Arrays")

CACHE_AXES = (BATCH, None, ACT_HEADS, None)  # of keys and values


def init_cache(
    spec: DecoderSpec, compute: ComputeSpec, batch: int, length: int, later: tuple[tuple[int, int], ...] = ()
) -> Cache:
    """An empty cache of `length` positions for `batch` rows, in the dtype of the activations.

    later: (first layer, positions) of the parts of a decoder that tokens leave, behind the first part.
    """
    starts = [0, *(start for start, _ in later), spec.depth]
    first, *rest = (
        _init_part(spec, compute, batch, positions, stop - start)
        for positions, start, stop in zip((length, *(n for _, n in later)), starts, starts[1:], strict=False)
    )
    return first._replace(later=tuple(rest))


def _init_part(spec: DecoderSpec, compute: ComputeSpec, batch: int, length: int, depth: int) -> Cache:

    def zeros() -> tuple[Array, ...]:
        shape = (batch, length, spec.kv_heads, spec.head_dim)
        return tuple(constrain(jnp.zeros(shape, compute.dtype), CACHE_AXES) for _ in range(depth))

    # No array is shared between fields: a cache is donated to the step that extends it.
    metadata = AttentionMetadata(*(jnp.zeros((batch, length), jnp.int32) for _ in range(3)))
    return Cache(zeros(), zeros(), metadata, jnp.zeros((), jnp.int32))


def pad_cache(cache: Cache, length: int) -> Cache:
    """The cache padded to `length` positions (prefill attends to the prompt's own length only). Raises `ValueError` for
    a longer cache."""
    extra = length - cache.metadata.segment.shape[1]
    if extra < 0:
        raise ValueError(f"pad_cache: expected a length of at least {length - extra}, the cache's own, got {length}")

    def pad(leaf: Array) -> Array:
        return jnp.pad(leaf, [(0, extra if axis == 1 else 0) for axis in range(leaf.ndim)])

    key, value = (tuple(constrain(pad(leaf), CACHE_AXES) for leaf in leaves) for leaves in (cache.key, cache.value))
    later = tuple(pad_cache(part, part.metadata.segment.shape[1] + extra) for part in cache.later)
    return cache._replace(key=key, value=value, metadata=AttentionMetadata(*map(pad, cache.metadata)), later=later)


def take_cache(cache: Cache, kept: Int[Array, "B kept"]) -> Cache:
    """The cache of those positions alone. Not for one with later parts."""

    def take(leaf: Array) -> Array:
        return jnp.take_along_axis(leaf, kept.reshape(*kept.shape, *(1,) * (leaf.ndim - 2)), axis=1)

    key, value = (tuple(constrain(take(leaf), CACHE_AXES) for leaf in leaves) for leaves in (cache.key, cache.value))
    return Cache(key, value, AttentionMetadata(*map(take, cache.metadata)), jnp.full_like(cache.length, kept.shape[1]))


def update_cache(cached: Arrays, new: Arrays, index: Int[Array, ""]) -> Arrays:
    """Cached arrays with `new` written at positions from `index`. `new` must fit: XLA would shift the write."""

    def write(old: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), index, axis=1)

    return jax.tree.map(write, cached, new)
