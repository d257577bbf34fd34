"""The decoder with its layers apart: what answering runs, where training scans over stacked layers.

Same blocks, same numbers. A scan reads each layer of a stack through a slice, and XLA copies the slice: harmless
beside the work of a long text, but decoding one token does nothing except read every weight once, and a copy doubles
that. With the layers apart nothing is copied, the cache is updated in place, and a layer's kind is known when it is
traced.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.core.axes import ACT_EMBED, BATCH, LENGTH
from vlm_jax.core.specs import ComputeSpec, DecoderSpec
from vlm_jax.core.structs import Cache, Slots
from vlm_jax.models.decoder import Block, behind, local_layers, sights
from vlm_jax.models.layers import RMSNorm
from vlm_jax.ops.placement import constrain

Params = Any


def split(params: Params, depth: int) -> Params:
    """Parameters of `Decoder` -> the same with `layers`, a tuple of one tree a layer, in the place of `blocks`.

    Each stacked array is let go once it is split, where the caller holds it no longer.
    """
    rest = {name: leaf for name, leaf in params.items() if name != "blocks"}
    leaves, structure = jax.tree.flatten(params["blocks"])
    del params
    apart = []
    while leaves:
        leaf = leaves.pop(0)
        apart.append([leaf[i] for i in range(depth)])
        jax.block_until_ready(apart[-1])
    return {**rest, "layers": tuple(jax.tree.unflatten(structure, layer) for layer in zip(*apart, strict=True))}


def stack(params: Params) -> Params:
    """The inverse of `split`: what training and `Decoder` read."""
    rest = {name: leaf for name, leaf in params.items() if name != "layers"}
    return {**rest, "blocks": jax.tree.map(lambda *layers: jnp.stack(layers), *params["layers"])}


def hidden(
    spec: DecoderSpec,
    compute: ComputeSpec,
    params: Params,
    x: Float[Array, "B L D"],
    slots: Slots,
    cache: Cache | None = None,
) -> tuple[Float[Array, "B L D"], Cache | None]:
    """`Decoder.hidden` on parameters from `split` and a cache from `empty_cache`."""
    x = constrain(x, (BATCH, LENGTH, ACT_EMBED))
    keys, start = behind(cache, slots)
    # Computed once: XLA would compute each mask again in every layer.
    views = jax.lax.optimization_barrier(sights(spec, slots, keys, start))
    block = Block(spec, compute.attention)
    written = []
    for i, (layer, is_local) in enumerate(zip(params["layers"], local_layers(spec), strict=True)):
        held = None if cache is None else (cache.key[i], cache.value[i])
        x, held = block.apply({"params": layer}, x, (views[-1 if is_local else 0],), None, held)
        written.append(held)
    if cache is not None:
        cache = Cache(*map(tuple, zip(*written, strict=True)), keys, start + x.shape[1])
    return RMSNorm(spec.norm_eps, spec.norm_plus_one).apply({"params": params["norm"]}, x), cache


def empty_cache(spec: DecoderSpec, compute: ComputeSpec, batch: int, slots: int) -> Cache:
    """A cache of that many slots, none of them written; `key` and `value` are tuples of one array a layer."""
    none, last = jnp.zeros((batch, slots), jnp.int32), spec.head_dim
    shape = (batch, spec.kv_heads, slots, last) if _by_head(compute) else (batch, slots, spec.kv_heads, last)
    key, value = (tuple(jnp.zeros(shape, compute.dtype) for _ in range(spec.depth)) for _ in range(2))
    return Cache(key, value, Slots(none, none, none), jnp.zeros((), jnp.int32))


def grown(cache: Cache, compute: ComputeSpec, slots: int) -> Cache:
    """The cache with room for that many slots, so that reading a prompt does not look at slots still to be written."""
    more, axis = slots - cache.slots.segment.shape[1], 2 if _by_head(compute) else 1

    def pad(leaf: Array, at: int) -> Array:
        return jnp.pad(leaf, [(0, more if i == at else 0) for i in range(leaf.ndim)])

    key, value = (tuple(pad(leaf, axis) for leaf in leaves) for leaves in (cache.key, cache.value))
    return Cache(key, value, Slots(*(pad(leaf, 1) for leaf in cache.slots)), cache.used)


def _by_head(compute: ComputeSpec) -> bool:
    """Whether keys and values are kept head by head (`ops.merged`)."""
    return compute.attention == "merged"
