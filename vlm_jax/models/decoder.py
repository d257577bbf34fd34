"""The decoder-only language model; families differ in `DecoderSpec`.

Embedding -> blocks (RMSNorm, rotary, grouped-query attention, gated MLP) -> final norm -> logits. The caller merges
image embeddings and passes `AttentionMetadata`; with a `Cache` the same code is prefill and decode_step.

`ComputeSpec.scan_layers` chooses the parameter layout. Training scans over stacked layers ("blocks"), for a small
program. Inference unrolls them ("blocks_0", ...): in a scan XLA copies each layer's weights, which dominates a decode
step, and the cache is not updated in place.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from vlm_jax.core import axes
from vlm_jax.core.specs import ComputeSpec, DecoderSpec, DropStage
from vlm_jax.core.structs import AttentionMetadata, Cache, Params
from vlm_jax.models import stages
from vlm_jax.models.cache import update_cache, update_metadata
from vlm_jax.models.layers import ACTIVATIONS, MLP_INNER, Linear, RMSNorm, remat
from vlm_jax.models.stages import VisualPlaces
from vlm_jax.ops import masks, rotary, splash
from vlm_jax.ops.attention import attend, attend_by_head
from vlm_jax.ops.logical_axes import axis_size, constrain, gather_for_compute

_ACT = (axes.BATCH, axes.LENGTH, axes.ACT_EMBED)


class Head(NamedTuple):
    """The output embedding table and the softcap of the logits."""

    table: Float[Array, "W D"]
    softcap: float | None


class AttentionInputs(NamedTuple):
    """Inputs that all global or all local layers share."""

    angles: Float[Array, "B L half"]  # rotary, of queries and new keys
    mask: Any  # bool[B, 1, L, S], or `splash.Causal`
    cache_index: Int[Array, ""]  # cache position of the new keys and values


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and an optional cache (keys, values) of the layer."""

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
        how = (inputs.mask, spec.query_scale, spec.attention_softcap, self.implementation)
        if cache is None:
            x = attend(q, k, v, *how)
        else:
            k, v = cache = update_cache(cache, (k, v), inputs.cache_index)
            x = attend_by_head(q, k, v, *how)
        return Linear(heads, width, name="out")(x), cache


class Mlp(nn.Module):
    """down(act(gate x) * up x)."""

    spec: DecoderSpec

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        width, inner = ((self.spec.width, axes.EMBED),), ((self.spec.mlp_width, axes.MLP),)
        gate = checkpoint_name(Linear(width, inner, name="gate")(x), MLP_INNER)
        up = checkpoint_name(Linear(width, inner, name="up")(x), MLP_INNER)
        return Linear(inner, width, name="down")(ACTIVATIONS[self.spec.activation](gate) * up)


class Block(nn.Module):
    """One layer. `inputs` are those of this layer, or (global, local) to choose from by `is_local` inside a scan."""

    spec: DecoderSpec
    implementation: str

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], inputs: tuple[AttentionInputs, ...], is_local: Any = None, cache: Any = None
    ) -> tuple[Float[Array, "B L D"], Any]:
        def norm(name: str, y: Array) -> Array:
            return RMSNorm(self.spec.norm_eps, self.spec.norm_plus_one, name=name)(y)

        own = inputs[0]
        if len(inputs) == 2:
            own = jax.tree.map(lambda of_global, of_local: jnp.where(is_local, of_local, of_global), *inputs)
        y, cache = Attention(self.spec, self.implementation, name="attention")(norm("attention_norm", x), own, cache)
        x = x + (norm("attention_post_norm", y) if self.spec.sandwich_norm else y)
        y = Mlp(self.spec, name="mlp")(norm("mlp_norm", x))
        x = x + (norm("mlp_post_norm", y) if self.spec.sandwich_norm else y)
        return constrain(x, _ACT), cache


class Decoder(nn.Module):
    """The decoder: `embed`, `hidden` and `logits`."""

    spec: DecoderSpec
    compute: ComputeSpec
    stages: tuple[DropStage, ...] = ()  # at which visual tokens leave

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
        """Text tokens -> logits; what `init` traces."""
        return self.logits(self.hidden(self.embed(tokens), metadata)[0])

    def embed(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """Token embeddings, scaled where the family scales them. Ids outside the vocabulary (image placeholders) read
        row 0."""
        tokens = jnp.where((tokens >= 0) & (tokens < self.spec.vocab), tokens, 0)
        # With a table sharded along D, each device looks up its columns of all tokens, then activations are resharded.
        columns = (axes.LOOKUP, axes.LENGTH, axes.EMBED) if axis_size(axes.EMBED) > 1 else _ACT
        x = jnp.take(self.embedding, constrain(tokens, columns[:2]), axis=0)
        x = constrain(constrain(x, columns).astype(self.compute.dtype), columns)
        x = constrain(x, _ACT)
        return x * jnp.asarray(self.spec.width**0.5, x.dtype) if self.spec.scale_embedding else x

    def hidden(
        self,
        x: Float[Array, "B L D"],
        metadata: AttentionMetadata,
        cache: Cache | None = None,
        places: VisualPlaces | None = None,
    ) -> tuple[Float[Array, "B L D"], Cache | None]:
        """Hidden states after all blocks and the final norm; zero for tokens that left at a stage. With a cache, the L
        tokens are appended to it and attend to it. Stages apply to tokens with `places`; without, all stay. Raises
        `ValueError` for a cache with scanned layers."""
        if cache is not None and self.compute.scan_layers:
            raise ValueError(
                "Decoder.hidden: expected no cache with scan_layers=True, got one (set compute.scan_layers=False, and "
                "unstack_layers the parameters)"
            )
        x, length = constrain(x, _ACT), x.shape[1]
        cuts = self.stages if places is not None or cache is not None else ()
        caches = [None] * (len(cuts) + 1) if cache is None else [cache._replace(later=()), *cache.later]
        kept, out = None, []
        for number, (start, stop) in enumerate(stages.bounds(cuts, self.spec.depth)):
            stage = cuts[number] if places is not None and number < len(cuts) else None
            own = metadata if places is not None else recounted(metadata, caches[0], caches[number])
            inputs, keys = self._inputs(own, caches[number])
            is_scored, scores = stage is not None and stage.score == "attention", None
            middle = stage.scored_by if is_scored else stop
            x, layers = self._run(x, inputs, caches[number], range(start, middle), start)
            if is_scored:
                is_local = self.spec.window is not None and local_layers(self.spec)[middle]
                block = self._block_params(middle)
                scores = stages.attention_scores(block, self.spec, x, own, places, is_local)
                x, rest = self._run(x, inputs, caches[number], range(middle, stop), start)
                layers += rest
            if caches[number] is not None:
                key, value = zip(*layers, strict=True)
                out.append(Cache(key, value, keys, caches[number].length + x.shape[1]))
            if stage is not None:
                index = stages.staying(stage, metadata, places, scores)
                x, metadata, places = stages.gather(stage, index, x, metadata, places)
                kept = index if kept is None else jnp.take_along_axis(kept, index, axis=1)
        x = self.norm(x)
        if kept is not None:
            x = jax.vmap(lambda row, at: jnp.zeros((length, row.shape[1]), row.dtype).at[at].set(row))(x, kept)
        return x, out[0]._replace(later=tuple(out[1:])) if out else None

    def _inputs(
        self, metadata: AttentionMetadata, cache: Cache | None
    ) -> tuple[tuple[AttentionInputs, ...], AttentionMetadata]:
        """The inputs of global and local layers, and the metadata of the keys."""
        keys, index = metadata, jnp.zeros((), jnp.int32)
        if cache is not None:
            keys, index = update_metadata(cache.metadata, metadata, cache.length), cache.length
        inputs, length = attention_inputs(self.spec, metadata, keys, index), metadata.segment.shape[1]
        if self.compute.attention == "splash" and cache is None and (self.spec.window or length) >= length:
            # `config.resolve` allows splash for causal models only.
            inputs = tuple(part._replace(mask=splash.Causal(metadata.segment)) for part in inputs)
        # Without the barrier XLA recomputes the masks in every unrolled layer.
        return inputs if self.compute.scan_layers else jax.lax.optimization_barrier(inputs), keys

    def _run(
        self,
        x: Float[Array, "B L D"],
        inputs: tuple[AttentionInputs, ...],
        cache: Cache | None,
        layers: range,
        first: int,
    ) -> tuple[Float[Array, "B L D"], list[Any]]:
        """Layers of a part of the decoder whose first layer is `first`, and what is cached of each."""
        is_local = local_layers(self.spec)
        if not self.compute.scan_layers:
            out = []
            for i in layers:
                cached = None if cache is None else (cache.key[i - first], cache.value[i - first])
                x, cached = self.blocks[i](x, (inputs[-1 if is_local[i] else 0],), None, cached)
                out.append(cached)
            return x, out
        if len(layers) == self.spec.depth:
            return self.blocks(x, inputs, jnp.array(is_local))[0], []
        block = remat(Block, self.compute.remat)(self.spec, self.compute.attention, parent=None)

        def one(x: Array, layer: tuple[Params, Array]) -> tuple[Array, None]:
            return block.apply({"params": layer[0]}, x, inputs, layer[1])[0], None

        part = slice(layers.start, layers.stop)
        params = jax.tree.map(lambda leaf: leaf[part], self.variables["params"]["blocks"])
        return jax.lax.scan(one, x, (params, jnp.array(is_local[part])))[0] if len(layers) else x, []

    def _block_params(self, layer: int) -> Params:
        params = self.variables["params"]
        if not self.compute.scan_layers:
            return params[f"blocks_{layer}"]
        return jax.tree.map(lambda leaf: leaf[layer], params["blocks"])

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
    """The output embedding of a decoder's parameters."""
    table = params["embedding"] if spec.tied_head else params["head"]["kernel"].T
    return Head(table, spec.logit_softcap)


def attention_inputs(
    spec: DecoderSpec, queries: AttentionMetadata, keys: AttentionMetadata, index: Int[Array, ""]
) -> tuple[AttentionInputs, ...]:
    """The inputs of the global layers and, for models with a window, of the local layers."""
    angles = rotary.angles(queries.position, spec.head_dim, spec.rope_theta, spec.rope_factor, spec.rope_bands)
    inputs: tuple[AttentionInputs, ...] = (AttentionInputs(angles, masks.attention_mask(queries, keys), index),)
    if spec.window is not None:
        if spec.local_rope_theta:
            angles = rotary.angles(queries.position, spec.head_dim, spec.local_rope_theta)
        inputs += (AttentionInputs(angles, masks.attention_mask(queries, keys, spec.window), index),)
    return inputs


def recounted(metadata: AttentionMetadata, first: Cache | None, cache: Cache | None) -> AttentionMetadata:
    """Metadata of tokens behind a prompt for the layers of `cache`, whose positions may be fewer than those of the
    first layers."""
    if first is None or cache is first:
        return metadata

    def last(cache: Cache) -> Int[Array, "B 1"]:
        return jnp.where(cache.metadata.segment == 0, -1, cache.metadata.position).max(axis=1, keepdims=True)

    gone = last(first) - last(cache)
    return metadata._replace(position=metadata.position - gone, order=metadata.order - gone)


def local_layers(spec: DecoderSpec) -> tuple[bool, ...]:
    """Which layers are local, for a model with a window."""
    return tuple(not spec.window_pattern or layer % spec.window_pattern != 0 for layer in range(1, spec.depth + 1))


def unstack_layers(params: Params, depth: int) -> Params:
    """Decoder parameters in the layout of scan_layers=False. Frees each stacked array that the caller does not hold."""
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
    """Decoder parameters in the layout of scan_layers=True."""
    if "blocks" in params:
        return params
    names = [f"blocks_{i}" for i in range(sum(name.startswith("blocks_") for name in params))]
    rest = {name: leaf for name, leaf in params.items() if name not in names}
    return {**rest, "blocks": jax.tree.map(lambda *layers: jnp.stack(layers), *(params[name] for name in names))}
