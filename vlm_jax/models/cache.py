"""The decoder's KV cache: an array of keys and one of values a layer, head by head, updated in place.

`tests/inference/test_cache_copies.py` counts the copies of such an array in the compiled loop over tokens.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlm_jax.core.axes import ACT_HEADS, BATCH
from vlm_jax.core.specs import ComputeSpec, DecoderSpec
from vlm_jax.core.structs import AttentionMetadata, Cache
from vlm_jax.ops.attention import by_head
from vlm_jax.ops.logical_axes import AxisNames, constrain


def cache_axes(batch: int, kv_heads: int) -> AxisNames:
    """Axis names of keys and values, in the layout of `ops.attention.by_head`."""
    return (*((BATCH,) if batch > 1 else ()), *((ACT_HEADS,) if kv_heads > 1 else ()), None, None)


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
        shape, names = (batch, length, spec.kv_heads, spec.head_dim), cache_axes(batch, spec.kv_heads)
        return tuple(constrain(by_head(jnp.zeros(shape, compute.dtype)), names) for _ in range(depth))

    # No array is shared between fields: a cache is donated to the step that extends it.
    metadata = AttentionMetadata(*(jnp.zeros((batch, length), jnp.int32) for _ in range(3)))
    return Cache(zeros(), zeros(), metadata, jnp.zeros((), jnp.int32))


def pad_cache(cache: Cache, length: int) -> Cache:
    """The cache padded to `length` positions (prefill attends to the prompt's own length only). Raises `ValueError` for
    a longer cache."""
    extra = length - cache.metadata.segment.shape[1]
    if extra < 0:
        raise ValueError(f"pad_cache: expected a length of at least {length - extra}, the cache's own, got {length}")

    def pad(leaf: Array, *behind: tuple[int, int]) -> Array:
        return jnp.pad(leaf, (*((0, 0),) * (leaf.ndim - 1 - len(behind)), (0, extra), *behind))

    later = tuple(pad_cache(part, part.metadata.segment.shape[1] + extra) for part in cache.later)
    return _map(lambda leaf: pad(leaf, (0, 0)), pad, cache)._replace(later=later)


def take_cache(cache: Cache, kept: Int[Array, "B kept"]) -> Cache:
    """The cache of those positions alone. Not for one with later parts."""

    def take(leaf: Float[Array, "*rows S C"]) -> Float[Array, "*rows kept C"]:
        split = leaf.reshape(kept.shape[0], -1, *leaf.shape[-2:])
        taken = jnp.take_along_axis(split, kept[:, None, :, None], axis=2)
        return taken.reshape(*leaf.shape[:-2], *taken.shape[2:])

    taken = _map(take, lambda leaf: jnp.take_along_axis(leaf, kept, axis=1), cache)
    return taken._replace(length=jnp.full_like(cache.length, kept.shape[1]))


def _map(of_heads: Callable[[Array], Array], of_metadata: Callable[[Array], Array], cache: Cache) -> Cache:
    """The cache with a function of keys and values and one of metadata applied to its arrays."""
    batch = cache.metadata.segment.shape[0]

    def constrained(leaf: Array) -> Array:
        return constrain(of_heads(leaf), cache_axes(batch, math.prod(leaf.shape[:-2]) // batch))

    key, value = (tuple(map(constrained, leaves)) for leaves in (cache.key, cache.value))
    return cache._replace(key=key, value=value, metadata=AttentionMetadata(*map(of_metadata, cache.metadata)))


def update_metadata(cached: AttentionMetadata, new: AttentionMetadata, index: Int[Array, ""]) -> AttentionMetadata:
    """The cache's metadata with `new` written at positions from `index`. `new` must fit: XLA would shift the write."""
    return AttentionMetadata(*(_write(*pair, index, 1) for pair in zip(cached, new, strict=True)))


def update_cache(
    cached: tuple[Array, Array], new: tuple[Float[Array, "B L K C"], Float[Array, "B L K C"]], index: Int[Array, ""]
) -> tuple[Array, Array]:
    """A layer's cached keys and values with `new` written at positions from `index`, as in `update_metadata`."""
    key, value = (_write(old, by_head(part), index, old.ndim - 2) for old, part in zip(cached, new, strict=True))
    return key, value


def _write(old: Array, new: Array, index: Int[Array, ""], axis: int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), index, axis)
