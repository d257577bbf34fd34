"""The decoder-only language model: one module whose spec expresses the differences between families.

Embedding -> blocks (RMSNorm, rotary, grouped heads, gated MLP) -> final norm -> vocabulary. The caller puts visual
tokens among the embeddings and says where each token stands (`AttentionMetadata`); with a `Cache` the same code is
prefill and decode_step.

`ComputeSpec.scan_layers` chooses between two layouts of the same layers, with the same numbers. Training scans over
stacked parameters ("blocks"): a program of one layer, whatever the depth. Answering unrolls them ("blocks_0", ...): a
scan reads each layer through a slice which XLA copies, and a decode step does little else than read every weight once.
Unrolled, nothing is copied, the cache is updated in place, and a layer's kind is known when it is traced.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlm_jax.core import axes
from vlm_jax.core.specs import ComputeSpec, DecoderSpec
from vlm_jax.core.structs import AttentionMetadata, Cache, Params
from vlm_jax.models.cache import update_cache
from vlm_jax.models.layers import ACTIVATIONS, Linear, RMSNorm, remat
from vlm_jax.ops import masks, rotary, splash
from vlm_jax.ops.attention import attend
from vlm_jax.ops.logical_axes import axis_size, constrain, gather_for_compute

_ACT = (axes.BATCH, axes.LENGTH, axes.ACT_EMBED)


class Head(NamedTuple):
    """What turns states into logits: a row for every word, and the cap of the logits."""

    table: Float[Array, "W D"]
    softcap: float | None


class AttentionInputs(NamedTuple):
    """What the layers of one kind (global or local) share."""

    angles: Float[Array, "B L half"]  # rotary, of the queries and of the new keys
    mask: Any  # bool[B, 1, L, S], or `splash.Causal`
    cache_index: Int[Array, ""]  # where in the cache the new keys and values go


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; reads and extends one layer's (keys, values) when it has them."""

    spec: DecoderSpec
    implementation: str

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], inputs: AttentionInputs, cache: Any
    ) -> tuple[Float[Array, "B L D"], Any]:
        spec = self.spec
        width, channels = ((spec.width, axes.EMBED),), (spec.head_dim, axes.HEAD_DIM)
        heads, kv_heads = ((spec.heads, axes.HEADS), channels), ((spec.kv_heads, axes.KV_HEADS), channels)
        q = Linear(width, heads, spec.qkv_bias, name="query")(x)
        k = Linear(width, kv_heads, spec.qkv_bias, name="key")(x)
        v = Linear(width, kv_heads, spec.qkv_bias, name="value")(x)
        if spec.qk_norm:
            q = RMSNorm(spec.norm_eps, spec.norm_plus_one, name="query_norm")(q)
            k = RMSNorm(spec.norm_eps, spec.norm_plus_one, name="key_norm")(k)
        q, k = rotary.rotate(q, inputs.angles), rotary.rotate(k, inputs.angles)
        if cache is not None:
            k, v = cache = update_cache(cache, (k, v), inputs.cache_index)
        x = attend(q, k, v, inputs.mask, spec.query_scale, spec.attention_softcap, self.implementation)
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
    """One layer. Where a model has local layers and they are scanned, `inputs` holds those of the global and those of
    the local layers, and the layer's flag picks; else those of this layer alone.
    """

    spec: DecoderSpec
    implementation: str

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], inputs: tuple[AttentionInputs, ...], is_local: Any = None, cache: Any = None
    ) -> tuple[Float[Array, "B L D"], Any]:
        def norm(name: str, y: Array) -> Array:
            return RMSNorm(self.spec.norm_eps, self.spec.norm_plus_one, name=name)(y)

        one = inputs[0]
        if len(inputs) == 2:
            one = jax.tree.map(lambda whole, near: jnp.where(is_local, near, whole), *inputs)
        y, cache = Attention(self.spec, self.implementation, name="attention")(norm("attention_norm", x), one, cache)
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
        block = remat(Block, self.compute.remat, in_scan=self.compute.scan_layers)
        if self.compute.scan_layers:
            self.blocks = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, 0),
                length=spec.depth,
                metadata_params={nn.PARTITION_NAME: axes.LAYERS},
            )(spec, self.compute.attention)
        else:
            self.blocks = [block(spec, self.compute.attention) for _ in range(spec.depth)]
        self.norm = RMSNorm(spec.norm_eps, spec.norm_plus_one)
        if not spec.tied_head:
            self.head = Linear(((spec.width, axes.EMBED),), ((spec.vocab, axes.VOCAB),))

    def __call__(self, tokens: Int[Array, "B L"], metadata: AttentionMetadata) -> Float[Array, "B L W"]:
        """Text alone -> logits. Reads every parameter: what `init` traces."""
        return self.logits(self.hidden(self.embed(tokens), metadata)[0])

    def embed(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """Token embeddings, scaled where the family scales them. An id outside the table (a placeholder, whose vector
        is replaced) reads row 0.
        """
        tokens = jnp.where((tokens >= 0) & (tokens < self.spec.vocab), tokens, 0)
        # Where the table is cut along D, every device looks up its columns of all tokens, and the tokens' vectors are
        # then exchanged: they are few beside the table.
        split = axis_size(axes.EMBED) > 1
        columns = (axes.LOOKUP, axes.LENGTH, axes.EMBED) if split else _ACT
        x = jnp.take(self.embedding, constrain(tokens, columns[:2]), axis=0)
        x = constrain(constrain(x, columns).astype(self.compute.dtype), columns)
        x = constrain(x, _ACT)
        return x * jnp.asarray(self.spec.width**0.5, x.dtype) if self.spec.scale_embedding else x

    def hidden(
        self, x: Float[Array, "B L D"], metadata: AttentionMetadata, cache: Cache | None = None
    ) -> tuple[Float[Array, "B L D"], Cache | None]:
        """All blocks and the final norm. With a cache, the L tokens are written behind those it holds, and see them.

        Raises `ValueError` for a cache where layers are scanned.
        """
        if cache is not None and self.compute.scan_layers:
            raise ValueError(
                "Decoder.hidden: expected no cache with scan_layers=True, got one (set compute.scan_layers=False, and "
                "unstack_layers the parameters)"
            )
        x = constrain(x, _ACT)
        keys, index = metadata, jnp.zeros((), jnp.int32)
        if cache is not None:
            keys, index = update_cache(cache.metadata, metadata, cache.length), cache.length
        inputs = attention_inputs(self.spec, metadata, keys, index)
        if self.compute.attention == "splash" and cache is None and (self.spec.window or x.shape[1]) >= x.shape[1]:
            # `config.resolve` lets splash through only where order is the order of the row.
            inputs = tuple(one._replace(mask=splash.Causal(metadata.segment)) for one in inputs)
        is_local = local_layers(self.spec)
        if self.compute.scan_layers:
            return self.norm(self.blocks(x, inputs, jnp.array(is_local))[0]), None
        # Computed once: XLA would compute each mask again in every layer.
        inputs, layers = jax.lax.optimization_barrier(inputs), []
        for i, block in enumerate(self.blocks):
            held = None if cache is None else (cache.key[i], cache.value[i])
            x, held = block(x, (inputs[-1 if is_local[i] else 0],), None, held)
            layers.append(held)
        if cache is not None:
            key, value = zip(*layers, strict=True)
            cache = Cache(key, value, keys, index + x.shape[1])
        return self.norm(x), cache

    def logits(self, x: Float[Array, "B L D"]) -> Float[Array, "B L W"]:
        """Hidden states -> float32 logits."""
        if self.spec.tied_head:
            table = gather_for_compute(self.embedding, (axes.VOCAB, axes.EMBED), x.dtype)
            out = jnp.einsum("bld,wd->blw", x, table, preferred_element_type=jnp.float32)
        else:
            out = self.head(x).astype(jnp.float32)
        if self.spec.logit_softcap is not None:
            out = self.spec.logit_softcap * jnp.tanh(out / self.spec.logit_softcap)
        return constrain(out, (axes.BATCH, axes.LENGTH, axes.ACT_VOCAB))


def head(params: Params, spec: DecoderSpec) -> Head:
    """The vocabulary's table of a decoder's parameters."""
    table = params["embedding"] if spec.tied_head else params["head"]["kernel"].T
    return Head(table, spec.logit_softcap)


def attention_inputs(
    spec: DecoderSpec, queries: AttentionMetadata, keys: AttentionMetadata, index: Int[Array, ""]
) -> tuple[AttentionInputs, ...]:
    """Those of the global layers and, with a window, behind them those of the local layers."""
    whole = rotary.angles(queries.position, spec.head_dim, spec.rope_theta, spec.rope_factor, spec.rope_bands)
    inputs = (AttentionInputs(whole, masks.attention_mask(queries, keys), index),)
    if spec.window is not None:
        near = rotary.angles(queries.position, spec.head_dim, spec.local_rope_theta) if spec.local_rope_theta else whole
        inputs += (AttentionInputs(near, masks.attention_mask(queries, keys, spec.window), index),)
    return inputs


def local_layers(spec: DecoderSpec) -> tuple[bool, ...]:
    """Which layers are local, where any is."""
    return tuple(not spec.window_pattern or layer % spec.window_pattern != 0 for layer in range(1, spec.depth + 1))


def unstack_layers(params: Params, depth: int) -> Params:
    """A decoder's parameters in either layout -> those with scan_layers=False.

    Each stacked array is freed once it is unstacked, where the caller holds it no longer.
    """
    if "blocks" not in params:
        return params
    rest = {name: leaf for name, leaf in params.items() if name != "blocks"}
    leaves, structure = jax.tree.flatten(params["blocks"])
    del params
    layers = []
    while leaves:
        leaf = leaves.pop(0)
        layers.append([leaf[i] for i in range(depth)])
        jax.block_until_ready(layers[-1])
    unstacked = (jax.tree.unflatten(structure, layer) for layer in zip(*layers, strict=True))
    return {**rest, **{f"blocks_{i}": layer for i, layer in enumerate(unstacked)}}


def stack_layers(params: Params) -> Params:
    """A decoder's parameters in either layout -> those with scan_layers=True."""
    if "blocks" in params:
        return params
    names = [f"blocks_{i}" for i in range(sum(name.startswith("blocks_") for name in params))]
    rest = {name: leaf for name, leaf in params.items() if name not in names}
    return {**rest, "blocks": jax.tree.map(lambda *layers: jnp.stack(layers), *(params[name] for name in names))}
