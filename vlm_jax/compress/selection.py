"""Compressors without weights that choose tokens of the encoder by what is salient or different.

`vision_zip` (VisionZip, arXiv 2412.04467): the d most salient patches, in the order of the image, then c contextual
    tokens: every (rest // c)-th of the other patches plus the mean of those whose keys are most like its own. The
    encoder's class token is the first of the V where it has one.
`prumerge` (LLaVA-PruMerge, arXiv 2403.15388): the V - 1 most salient patches by falling salience a, then one token for
    all others, sum a_j x_j. A kept token is x_i + sum a_j x_j over the 32 other patches with keys most like its own.
    Published with a number of tokens that follows the image; here V is fixed.
`prumerge_plus`: half of the kept patches are the most salient, half lie evenly in the row order, and may repeat.
`divprune` (DivPrune, arXiv 2503.02175): of the projected patches one that is far from all others, then always the one
    that is farthest, by cosine, from those chosen before; in the order of the image.

Salience is `EncoderSpec.salience`: the class token's attention; attention received for an encoder without one (SigLIP),
which also has no class token among the V of `vision_zip`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.compress.layers import Weights, take
from vlm_jax.compress.sizes.selection import (  # noqa: F401
    attention_of_last,
    attention_of_tokens,
    contextual_count,
    divprune_cost,
    prumerge_cost,
    prumerge_plus_tokens,
    prumerge_tokens,
    zip_cost,
    zip_tokens,
)
from vlm_jax.core.specs import CompressorSpec
from vlm_jax.core.structs import Evidence, Prefix

_NEIGHBOURS = 32
_LOWEST = -jnp.inf


def vision_zip(weights: Weights, evidence: Evidence, spec: CompressorSpec) -> Prefix:
    """Tokens [B, V, E]: class token if there is one, dominant, contextual."""
    contextual = contextual_count(spec.tokens)
    return zip_patches(evidence, spec.tokens - contextual - (evidence.class_token is not None), contextual)


def zip_patches(evidence: Evidence, dominant: int, contextual: int) -> Prefix:
    """That many dominant and contextual tokens, behind the class token if there is one."""
    x, mask = evidence.tokens, evidence.mask
    batch, patches, _ = x.shape
    valid = jnp.ones((batch, patches), bool) if mask is None else mask
    salience = jnp.where(valid, evidence.salience.astype(jnp.float32), _LOWEST)
    is_dominant = _among_highest(salience, dominant)
    # The dominant patches in the order of the image, then all others in that order.
    order = jnp.argsort(~is_dominant, axis=1, stable=True)
    first = order[:, :dominant]
    tokens, kept = [take(x, first)], [take(valid, first)]
    if evidence.class_token is not None:
        tokens.insert(0, evidence.class_token[:, None].astype(x.dtype))
        kept.insert(0, valid.any(1, keepdims=True))
    if contextual:
        step = max(1, (patches - dominant) // contextual)
        targets = order[:, dominant + step * np.arange(contextual)]
        is_target = (targets[:, None, :] == jnp.arange(patches)[:, None]).any(-1)
        key = _unit(evidence.keys.mean(2))
        likeness = jnp.einsum("bpc,btc->bpt", key, take(key, targets))
        likeness = jnp.where(take(valid, targets)[:, None], likeness, _LOWEST)
        joins = jax.nn.one_hot(likeness.argmax(-1), contextual) * (valid & ~is_target & ~is_dominant)[..., None]
        sums = jnp.einsum("bpt,bpe->bte", joins.astype(x.dtype), jnp.where(valid[..., None], x, 0))
        mean = sums / jnp.maximum(joins.sum(1), 1)[..., None].astype(x.dtype)
        tokens.append(take(x, targets) + mean)
        kept.append(take(valid, targets))
    return Prefix(jnp.concatenate(tokens, axis=1), None if mask is None else jnp.concatenate(kept, axis=1))


def prumerge(weights: Weights, evidence: Evidence, spec: CompressorSpec) -> Prefix:
    """Tokens [B, V, E], the merged one last."""
    return _merge_others(evidence, _by_falling(_salience(evidence), spec.tokens - 1))


def prumerge_plus(weights: Weights, evidence: Evidence, spec: CompressorSpec) -> Prefix:
    """Tokens [B, V, E], V = 2 n + 1: n by salience, n at even distances, the merged one last."""
    salience, n = _salience(evidence), spec.tokens // 2
    step = salience.shape[1] // n
    even = jnp.broadcast_to(step // 2 + step * jnp.arange(n), (salience.shape[0], n))
    return _merge_others(evidence, jnp.concatenate([_by_falling(salience, n), even], axis=1))


def _salience(evidence: Evidence) -> Float[Array, "B P"]:
    salience = evidence.salience.astype(jnp.float32)
    return salience if evidence.mask is None else jnp.where(evidence.mask, salience, 0)


def _by_falling(salience: Float[Array, "B P"], count: int) -> Int[Array, "B count"]:
    return jax.lax.top_k(salience, count)[1]


def _merge_others(evidence: Evidence, kept: Int[Array, "B n"]) -> Prefix:
    """The patches in the order kept, others; where a kept one repeats, as many of the lowest others are lost, as in the
    published code."""
    patches, count = evidence.tokens.shape[1], kept.shape[1]
    is_kept = jax.vmap(lambda at: jnp.zeros(patches, bool).at[at].set(True))(kept)
    order = jnp.concatenate([kept, jnp.argsort(~is_kept, axis=1, stable=True)[:, count:]], axis=1)
    x, salience = take(evidence.tokens, order), take(_salience(evidence), order)
    mask = None if evidence.mask is None else take(evidence.mask, order)
    keys = _unit(take(evidence.keys, order).reshape(*x.shape[:2], -1))
    is_self = jnp.eye(count, patches, dtype=bool)
    hidden = is_self[None] if mask is None else is_self | ~mask[:, None]
    likeness = jnp.where(hidden, _LOWEST, jnp.einsum("bnc,bpc->bnp", keys[:, :count], keys))
    near = _among_highest(likeness, min(_NEIGHBOURS, patches - 1)) & ~hidden
    weights = is_self + near * salience[:, None]
    merged = jnp.where(jnp.arange(patches) >= count, salience, 0)
    weights = jnp.concatenate([weights, merged[:, None]], axis=1)
    shown = x if mask is None else jnp.where(mask[..., None], x, 0)
    tokens = jnp.einsum("bnp,bpe->bne", weights.astype(x.dtype), shown)
    if mask is not None:
        mask = jnp.concatenate([mask[:, :count], mask.any(1, keepdims=True)], axis=1)
    return Prefix(tokens, mask)


def divprune(weights: Weights, evidence: Evidence, spec: CompressorSpec) -> Prefix:
    """Tokens [B, V, D] of the projector, in the order of the image."""
    x, mask = evidence.project(evidence.tokens), evidence.mask
    valid = jnp.ones(x.shape[:2], bool) if mask is None else mask
    chosen = jnp.sort(choose_diverse(x, valid, spec.tokens), axis=1)
    return Prefix(take(x, chosen), None if mask is None else take(mask, chosen))


def choose_diverse(x: Float[Array, "B P D"], valid: Bool[Array, "B P"], count: int) -> Int[Array, "B count"]:
    """Indices in the order in which they are chosen, so that those for fewer tokens are the first ones."""
    key = _unit(x)
    distance = 1 - jnp.einsum("bpc,bqc->bpq", key, key)
    patches = x.shape[1]
    apart = jnp.where(jnp.eye(patches, dtype=bool) | ~valid[:, None, :], jnp.inf, distance)
    nearest = jnp.where(valid, apart.min(-1), _LOWEST)

    def choose(i: Int[Array, ""], carry: tuple[Array, Array]) -> tuple[Array, Array]:
        chosen, nearest = carry
        index = nearest.argmax(-1)
        from_it = jax.vmap(lambda rows, at: rows[at])(distance, index)
        # The first one replaces the distances to the nearest other patch.
        nearest = jnp.where(i == 0, jnp.where(valid, from_it, _LOWEST), jnp.minimum(nearest, from_it))
        nearest = jnp.where(jnp.arange(patches) == index[:, None], _LOWEST, nearest)
        return chosen.at[:, i].set(index), nearest

    chosen = jnp.zeros((x.shape[0], count), jnp.int32)
    return jax.lax.fori_loop(0, count, choose, (chosen, nearest))[0]


def _unit(x: Float[Array, "B P C"]) -> Float[Array, "B P C"]:
    """Unit vectors in float32; they only rank, so that no gradient passes."""
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _among_highest(scores: Float[Array, "*rows P"], count: int) -> Bool[Array, "*rows P"]:
    """True for the `count` highest of each row; of equal ones the first."""
    index = jax.lax.top_k(scores, count)[1]
    return jnp.any(index[..., None] == jnp.arange(scores.shape[-1]), axis=-2)
