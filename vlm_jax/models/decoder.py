"""The decoder-only language model: one module whose spec expresses the differences between families.

Embedding -> blocks (scanned; RMSNorm, rotary, grouped heads, gated MLP) -> final norm -> vocabulary. The caller joins
image and text into one sequence of embeddings and says where each token stands (`Slots`); with a `Cache` the same code
is prefill and extend.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlm_jax.core import axes
from vlm_jax.core.specs import ComputeSpec, DecoderSpec
from vlm_jax.core.structs import Cache, Slots
from vlm_jax.models.layers import ACTIVATIONS, Linear, RMSNorm, remat
from vlm_jax.ops import masks, merged, rotary, splash
from vlm_jax.ops.attention import attend
from vlm_jax.ops.placement import constrain, parts, working

_ACT = (axes.BATCH, axes.LENGTH, axes.ACT_EMBED)


class Head(NamedTuple):
    """What turns states into logits: a row for every word, and the cap of the logits."""

    table: Float[Array, "W D"]
    softcap: float | None


class Sight(NamedTuple):
    """What layers of one kind share: rotary angles of the queries, who sees whom, where in the cache to write."""

    angle: Float[Array, "B L half"]
    mask: Any  # an array, or `splash.Causal`
    start: Int[Array, ""]


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; reads and extends one layer's cache when there is one."""

    spec: DecoderSpec
    implementation: str

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], sight: Sight, cache: Any) -> tuple[Float[Array, "B L D"], Any]:
        spec = self.spec
        width, channels = ((spec.width, axes.EMBED),), (spec.head_dim, axes.HEAD_DIM)
        heads, kv_heads = ((spec.heads, axes.HEADS), channels), ((spec.kv_heads, axes.KV_HEADS), channels)
        q = Linear(width, heads, spec.qkv_bias, name="query")(x)
        k = Linear(width, kv_heads, spec.qkv_bias, name="key")(x)
        v = Linear(width, kv_heads, spec.qkv_bias, name="value")(x)
        if spec.qk_norm:
            q = RMSNorm(spec.norm_eps, spec.norm_plus_one, name="query_norm")(q)
            k = RMSNorm(spec.norm_eps, spec.norm_plus_one, name="key_norm")(k)
        q, k = rotary.rotate(q, sight.angle), rotary.rotate(k, sight.angle)
        by_head = self.implementation == "merged"
        if by_head:
            k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
        if cache is not None:
            k, v = (
                jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), sight.start, axis=2 if by_head else 1)
                for old, new in zip(cache, (k, v), strict=True)
            )
            cache = (k, v)
        if by_head:
            x = merged.attend(q, k, v, sight.mask, spec.query_scale, spec.attention_softcap)
        else:
            x = attend(q, k, v, sight.mask, spec.query_scale, spec.attention_softcap, self.implementation)
        return Linear(heads, width, name="out")(x), cache


class Mlp(nn.Module):
    """down(act(gate x) * up x)."""

    spec: DecoderSpec

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        width, inner = ((self.spec.width, axes.EMBED),), ((self.spec.mlp_width, axes.MLP),)
        gate = ACTIVATIONS[self.spec.activation](Linear(width, inner, name="gate")(x))
        return Linear(inner, width, name="down")(gate * Linear(width, inner, name="up")(x))


class Block(nn.Module):
    """One layer. `is_local` is its flag; `sights` holds the global view and, if any layer needs it, the local one."""

    spec: DecoderSpec
    implementation: str

    @nn.compact
    def __call__(self, x: Array, sights: tuple[Sight, ...], is_local: Any, cache: Any) -> tuple[Array, Any]:
        def norm(name: str, y: Array) -> Array:
            return RMSNorm(self.spec.norm_eps, self.spec.norm_plus_one, name=name)(y)

        sight = sights[0]
        if len(sights) == 2:
            sight = jax.tree.map(lambda whole, near: jnp.where(is_local, near, whole), *sights)
        y, cache = Attention(self.spec, self.implementation, name="attention")(norm("attention_norm", x), sight, cache)
        x = x + (norm("attention_post_norm", y) if self.spec.sandwich_norm else y)
        y = Mlp(self.spec, name="mlp")(norm("mlp_norm", x))
        x = x + (norm("mlp_post_norm", y) if self.spec.sandwich_norm else y)
        return constrain(x, _ACT), cache


class Decoder(nn.Module):
    """`DecoderSpec` as a module: `embed`, `hidden`, `logits`."""

    spec: DecoderSpec
    compute: ComputeSpec

    def setup(self) -> None:
        spec = self.spec
        table = nn.with_logical_partitioning(nn.initializers.normal(spec.width**-0.5), (axes.VOCAB, axes.EMBED))
        self.embedding = self.param("embedding", table, (spec.vocab, spec.width))
        self.blocks = nn.scan(
            remat(Block, self.compute.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0, 0),
            length=spec.depth,
            metadata_params={nn.PARTITION_NAME: axes.LAYERS},
        )(spec, self.compute.attention)
        self.norm = RMSNorm(spec.norm_eps, spec.norm_plus_one)
        if not spec.tied_head:
            self.head = Linear(((spec.width, axes.EMBED),), ((spec.vocab, axes.VOCAB),))

    def __call__(self, text: Int[Array, "B T"], slots: Slots) -> Float[Array, "B T W"]:
        """Text alone -> logits. All parameters at work: what `init` traces."""
        return self.logits(self.hidden(self.embed(text), slots)[0])

    def embed(self, text: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Token embeddings, scaled where the family scales them."""
        # Where the table is cut along D, every device looks up its columns of all tokens, and the tokens' vectors are
        # then exchanged: they are few beside the table.
        split = parts(axes.EMBED) > 1
        columns = (axes.LOOKUP, axes.LENGTH, axes.EMBED) if split else _ACT
        x = jnp.take(self.embedding, constrain(text, columns[:2]), axis=0)
        x = constrain(constrain(x, columns).astype(self.compute.dtype), columns)
        x = constrain(x, _ACT)
        return x * jnp.asarray(self.spec.width**0.5, x.dtype) if self.spec.scale_embedding else x

    def hidden(
        self, x: Float[Array, "B L D"], slots: Slots, cache: Cache | None = None
    ) -> tuple[Float[Array, "B L D"], Cache | None]:
        """All blocks and the final norm. With a cache, the L tokens are written behind those it holds, and see them."""
        x = constrain(x, _ACT)
        keys, start = behind(cache, slots)
        views = sights(self.spec, slots, keys, start)
        if self.compute.attention == "splash" and cache is None and (self.spec.window or x.shape[1]) >= x.shape[1]:
            # `config.resolve` lets splash through only where rows are single sequences, read in order.
            views = tuple(view._replace(mask=splash.Causal(slots.segment != masks.PADDING)) for view in views)
        is_local = jnp.array(local_layers(self.spec))
        x, layers = self.blocks(x, views, is_local, None if cache is None else (cache.key, cache.value))
        if cache is not None:
            cache = Cache(*layers, keys, start + x.shape[1])
        return self.norm(x), cache

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T W"]:
        """Hidden states -> float32 logits."""
        if self.spec.tied_head:
            table = working(self.embedding, (axes.VOCAB, axes.EMBED), x.dtype)
            out = jnp.einsum("btd,wd->btw", x, table, preferred_element_type=jnp.float32)
        else:
            out = self.head(x).astype(jnp.float32)
        if self.spec.logit_softcap is not None:
            out = self.spec.logit_softcap * jnp.tanh(out / self.spec.logit_softcap)
        return constrain(out, (axes.BATCH, axes.LENGTH, axes.ACT_VOCAB))


def head(params: Any, spec: DecoderSpec) -> Head:
    """The vocabulary's table of a decoder's parameters."""
    table = params["embedding"] if spec.tied_head else params["head"]["kernel"].T
    return Head(table, spec.logit_softcap)


def behind(cache: Cache | None, slots: Slots) -> tuple[Slots, Array]:
    """Slots of every key that new tokens at `slots` may see (those of the cache and their own), and where they go."""
    if cache is None:
        return slots, jnp.zeros((), jnp.int32)
    update = jax.lax.dynamic_update_slice_in_dim
    return Slots(*(update(old, new, cache.used, 1) for old, new in zip(cache.slots, slots, strict=True))), cache.used


def sights(spec: DecoderSpec, slots: Slots, keys: Slots, start: Array) -> tuple[Sight, ...]:
    """The view of the global layers and, with a window, behind it that of the local layers."""
    whole = rotary.angles(slots.position, spec.head_dim, spec.rope_theta, spec.rope_factor, spec.rope_bands)
    views = (Sight(whole, masks.sees(slots, keys), start),)
    if spec.window is not None:
        near = rotary.angles(slots.position, spec.head_dim, spec.local_rope_theta) if spec.local_rope_theta else whole
        views += (Sight(near, masks.sees(slots, keys, spec.window), start),)
    return views


def local_layers(spec: DecoderSpec) -> tuple[bool, ...]:
    """Which layers are local, where any is."""
    return tuple(not spec.window_pattern or layer % spec.window_pattern != 0 for layer in range(1, spec.depth + 1))


def empty_cache(spec: DecoderSpec, batch: int, slots: int, dtype: str) -> Cache:
    """A cache of that many slots, none of them written."""
    shape = (spec.depth, batch, slots, spec.kv_heads, spec.head_dim)
    none = jnp.zeros((batch, slots), jnp.int32)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), Slots(none, none, none), jnp.zeros((), jnp.int32))
