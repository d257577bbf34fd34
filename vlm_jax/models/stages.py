"""Visual tokens that leave inside the decoder: the scan over layers is cut, and between two parts of it the tokens that
stay are gathered. FastV, PyramidDrop and Victor are such stages; what leaves is never seen by a later layer.

A view of n = 4 tokens I, of which a stage keeps two, with positions kept or recounted:

    tokens      bos  I  I  I  I  what end          bos  I  I  what end
    position      0  1  2  3  4    5   6     kept    0  2  3    5   6    recounted  0  1  2  3  4
    reader        .  .  .  .  .    .   x

Static lengths: a stage shortens every row by (n - keep) tokens for each of its M views. A row that holds fewer views
than M loses padding instead, and must have that much.
"""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.core import axes
from vlm_jax.core.specs import DecoderSpec, DropStage
from vlm_jax.core.structs import AttentionMetadata
from vlm_jax.models.layers import Linear, RMSNorm
from vlm_jax.ops import masks, rotary

READERS = 32  # answers of a conversation whose readers are averaged


class VisualPlaces(NamedTuple):
    """Where the views stand in rows of L tokens, and which tokens score theirs."""

    view: Int[Array, "B L"]  # of a visual token, -1 for text
    segment: Int[Array, "B M"]  # of each view's tokens; 0: not in the row
    reads: Bool[Array, "B L"]  # tokens that precede an answer
    tokens: int  # of each view
    readers: int  # at most, of a conversation: one where nothing but a prompt is in the row


def visual_places(
    visual: Int[Array, "B L"],
    metadata: AttentionMetadata,
    weight: Float[Array, "B L"] | None,
    views: int,
    tokens: int,
) -> VisualPlaces:
    """Places of `views` views of `tokens` tokens each. Readers are the tokens before the first target of each answer;
    without `weight` the last token of each conversation."""
    view = jnp.where(visual >= 0, visual // tokens, -1)
    is_view = (view[:, None] == jnp.arange(views)[:, None]) & (metadata.segment != 0)[:, None]
    segment = jnp.max(jnp.where(is_view, metadata.segment[:, None], 0), axis=-1)
    if weight is not None:
        before = jnp.pad(weight[:, :-1], ((0, 0), (1, 0)))
        return VisualPlaces(view, segment, (weight > 0) & (before == 0), tokens, READERS)
    length = visual.shape[1]
    mine = metadata.segment[:, None] == jnp.where(segment == 0, -1, segment)[..., None]
    last = length - 1 - jnp.argmax(mine[..., ::-1], axis=-1)
    return VisualPlaces(view, segment, jnp.any((last[..., None] == jnp.arange(length)) & mine, axis=1), tokens, 1)


def lengths(stages: tuple[DropStage, ...], length: int, views: int, entering: int) -> tuple[int, ...]:
    """Tokens of a row in each part of the decoder."""
    out = [length]
    for stage in stages:
        out.append(out[-1] - views * (entering - stage.keep))
        entering = stage.keep
    return tuple(out)


def bounds(stages: tuple[DropStage, ...], depth: int) -> tuple[tuple[int, int], ...]:
    """(first layer, end) of each part of the decoder."""
    cuts = (0, *(stage.layer for stage in stages), depth)
    return tuple(itertools.pairwise(cuts))


def attention_scores(
    block: Any,
    spec: DecoderSpec,
    x: Float[Array, "B L D"],
    metadata: AttentionMetadata,
    places: VisualPlaces,
    is_local: bool,
) -> Float[Array, "B M L"]:
    """Attention that the readers of each view's conversation pay to each token, with queries and keys of a layer
    (parameters `block`) at its input x: the softmax over the row, the mean over heads and then over readers.
    """  # fmt: skip
    mine = places.reads[:, None] & (metadata.segment[:, None] == places.segment[..., None])
    count = min(places.readers, x.shape[1])
    found, index = jax.lax.top_k(mine.astype(jnp.int32), count)  # the first ones
    flat = index.reshape(index.shape[0], -1)
    queries = AttentionMetadata(*(jnp.take_along_axis(leaf, flat, axis=1) for leaf in metadata))

    def project(name: str, heads: int, y: Array) -> Array:
        names = (axes.HEADS if name == "query" else axes.KV_HEADS, axes.HEAD_DIM)
        outputs = ((heads, names[0]), (spec.head_dim, names[1]))
        linear = Linear(((spec.width, axes.EMBED),), outputs, spec.qkv_bias, parent=None)
        y = linear.apply({"params": block["attention"][name]}, y)
        if spec.qk_norm:
            norm = RMSNorm(spec.norm_eps, spec.norm_plus_one, parent=None)
            y = norm.apply({"params": block["attention"][f"{name}_norm"]}, y)
        return y

    def angles(position: Array) -> Array:
        if is_local and spec.local_rope_theta:
            return rotary.angles(position, spec.head_dim, spec.local_rope_theta)
        return rotary.angles(position, spec.head_dim, spec.rope_theta, spec.rope_factor, spec.rope_bands)

    norm = RMSNorm(spec.norm_eps, spec.norm_plus_one, parent=None)
    y = norm.apply({"params": block["attention_norm"]}, x)
    q = project("query", spec.heads, jnp.take_along_axis(y, flat[..., None], axis=1))
    k = rotary.rotate(project("key", spec.kv_heads, y), angles(metadata.position))
    q = rotary.rotate(q, angles(queries.position)).reshape(*flat.shape, spec.kv_heads, -1, spec.head_dim)
    scale = spec.head_dim**-0.5 if spec.query_scale is None else spec.query_scale
    scores = scale * jnp.einsum("btkgc,bskc->bkgts", q, k, preferred_element_type=jnp.float32)
    if spec.attention_softcap is not None:
        scores = spec.attention_softcap * jnp.tanh(scores / spec.attention_softcap)
    visible = masks.attention_mask(queries, metadata, spec.window if is_local else None)
    share = jax.nn.softmax(jnp.where(visible[:, :, None], scores, jnp.finfo(jnp.float32).min / 2), axis=-1)
    share = share.mean(axis=(1, 2)).reshape(*index.shape, -1)
    found = found.astype(jnp.float32)
    total = jnp.maximum(found.sum(-1), 1)[..., None]
    return jnp.einsum("bmr,bmrs->bms", found, share) / total


def staying(
    stage: DropStage, metadata: AttentionMetadata, places: VisualPlaces, scores: Float[Array, "B M L"] | None
) -> Int[Array, "B kept"]:
    """Indices of the tokens that stay, in their order: all text and `stage.keep` of each view's tokens, by
    score or the last ones; a dead token before none that is alive."""  # fmt: skip
    batch, views = places.segment.shape
    length = places.view.shape[1]
    if scores is None:
        scores = jnp.broadcast_to(jnp.arange(length, dtype=jnp.float32), (batch, views, length))
    is_view = places.view[:, None] == jnp.arange(views)[:, None]
    scores = jnp.where(metadata.segment[:, None] == 0, -1.0, scores)
    best = jax.lax.top_k(jnp.where(is_view, scores, -2.0), stage.keep)[1]
    chosen = jax.vmap(jax.vmap(lambda at: jnp.zeros(length, bool).at[at].set(True)))(best)
    stays = (places.view < 0) | jnp.any(chosen & is_view, axis=1)  # a view may be absent
    order = jnp.where(stays, metadata.segment == 0, 2)  # what is alive, padding, what leaves
    kept = jnp.argsort(order, axis=1, stable=True)[:, : length - views * (places.tokens - stage.keep)]
    return jnp.sort(kept, axis=1)


def gather(
    stage: DropStage,
    kept: Int[Array, "B kept"],
    x: Float[Array, "B L D"],
    metadata: AttentionMetadata,
    places: VisualPlaces,
) -> tuple[Float[Array, "B kept D"], AttentionMetadata, VisualPlaces]:
    """States, metadata and places of the tokens that stay."""  # fmt: skip
    if stage.positions == "recounted":
        stays = jax.vmap(lambda at: jnp.zeros(x.shape[1], bool).at[at].set(True))(kept)
        recounted = masks.drop_masked(metadata, stays)
        metadata = metadata._replace(position=recounted.position, order=recounted.order)

    def take(leaf: Array) -> Array:
        return jnp.take_along_axis(leaf, kept, axis=1)

    x = jnp.take_along_axis(x, kept[..., None], axis=1)
    places = places._replace(view=take(places.view), reads=take(places.reads), tokens=stage.keep)
    return x, AttentionMetadata(*map(take, metadata)), places
