"""Cross-entropy over the vocabulary, at the positions that count, in as few blocks as memory allows.

A position counts where its weight is not 0. The C that count are moved to the front of the N positions of a device's
rows, and only N/8, N/4, N/2 or all of them are computed: the least that holds C on every device. Each is a branch of a
conditional, so no position is ever left out. Logits of at most `_FEW_BYTES` are all computed: branches take longer to
compile than they would save.

The logits of all words are formed at once where they take at most `_MAX_BYTES`. Else one scan runs over n blocks of the
embedding table, rematerialised in the backward pass; with the logits z_w of block w,

    log sum_v exp z_v = log sum_w exp(lse_w)      lse_w = logsumexp(z_w)

The block with the target gives its logit. One block of the table is gathered at a time, and logits stay sharded over
the vocabulary where it is.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from vlm_jax.core import axes
from vlm_jax.ops.logical_axes import axis_size, constrain, gather_for_compute

_MAX_BYTES = 2**25  # of a device's float32 logits of a block; on CPUs larger ones leave the cache and take longer
_FEW_BYTES = 2**22  # of a device's float32 logits of all words and positions
_MIN_BLOCK = 8192  # vocabulary entries; blocks are not narrower, whatever their bytes
_ALIGN = 128  # a TPU tile: XLA reduce-scatters gradients of whole tiles, and all-reduces others
_TABLE = (axes.VOCAB, axes.EMBED)
_PARTS = (8, 4, 2, 1)  # of the positions, one is computed


class Nll(NamedTuple):
    """Negative log-likelihood in nats. Only `total` has a gradient."""

    total: Float[Array, ""]  # weighted sum
    tokens: Float[Array, "B L"]  # 0 where the weight is
    hits: Bool[Array, "B L"]  # whether the target is the arg-max; False where the weight is 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def weighted_nll(
    states: Float[Array, "B L D"],
    table: Float[Array, "W D"],
    softcap: float | None,
    targets: Int[Array, "B L"],
    weight: Float[Array, "B L"],
) -> Nll:
    """The loss of the targets; differentiable with respect to states and table, whose gradients are computed together
    with the value. Arguments are as in `token_scores`.
    """
    return _where_counted(_value, states, table, softcap, targets, weight)[0]


_Found = tuple[Nll, tuple[Array, ...]]  # and the gradients of its total: none, or those of states and table


def _forward(states: Array, table: Array, softcap: float | None, targets: Array, weight: Array) -> _Found:
    return _where_counted(_value_and_gradients, states, table, softcap, targets, weight)


def _backward(softcap: float | None, gradients: tuple[Array, Array], cotangent: Nll) -> tuple[Array | None, ...]:
    del softcap
    return *(cotangent.total.astype(leaf.dtype) * leaf for leaf in gradients), None, None


weighted_nll.defvjp(_forward, _backward)


def _where_counted(
    function: Callable[..., _Found],
    states: Float[Array, "B L D"],
    table: Float[Array, "W D"],
    softcap: float | None,
    targets: Int[Array, "B L"],
    weight: Float[Array, "B L"],
) -> _Found:
    """`function`, called with the positions that count alone, in rows of those of a device."""
    (batch, length), devices = weight.shape, axis_size(axes.BATCH)
    rows = devices if batch % devices == 0 else 1
    positions = batch // rows * length
    if 4 * positions * (table.shape[0] // axis_size(axes.VOCAB)) <= _FEW_BYTES:
        return function(states, table, softcap, targets, weight)

    def in_rows(leaf: Array) -> Array:
        leaf = leaf.reshape(rows, positions, *leaf.shape[2:])
        return constrain(leaf, (axes.BATCH, *(None,) * (leaf.ndim - 1)))

    def take(leaf: Array, index: Int[Array, "rows n"]) -> Array:
        return jnp.take_along_axis(leaf, index.reshape(*index.shape, *(1,) * (leaf.ndim - 2)), axis=1)

    counted = in_rows(weight != 0)
    first = jnp.argsort(~counted, axis=1, stable=True)  # those that count before the others
    place = jnp.cumsum(counted, axis=1) - 1
    sizes = sorted({-(-positions // part) for part in _PARTS})

    def first_positions(size: int, states: Array, table: Array, targets: Array, weight: Array) -> _Found:
        chosen = (take(in_rows(leaf), first[:, :size]) for leaf in (states, targets, weight))
        states, targets, weight = chosen

        def back(leaf: Array) -> Array:
            moved = take(leaf, jnp.minimum(place, size - 1))
            moved = jnp.where(counted.reshape(*counted.shape, *(1,) * (leaf.ndim - 2)), moved, jnp.zeros_like(moved))
            return moved.reshape(batch, length, *leaf.shape[2:])

        nll, gradients = function(states, table, softcap, targets, weight)
        nll = nll._replace(tokens=back(nll.tokens), hits=back(nll.hits))
        return nll, gradients and (back(gradients[0]), gradients[1])

    def every_position(states: Array, table: Array, targets: Array, weight: Array) -> _Found:
        return function(states, table, softcap, targets, weight)

    smaller = [functools.partial(first_positions, size) for size in sizes[:-1]]
    branches: list[Callable[..., _Found]] = [*smaller, every_position]
    index = jnp.searchsorted(jnp.array(sizes), jnp.max(jnp.sum(counted, axis=1)))
    return jax.lax.switch(index, branches, states, table, targets, weight)


def token_scores(
    states: Float[Array, "B L D"], table: Float[Array, "W D"], softcap: float | None, targets: Int[Array, "B L"]
) -> tuple[Float[Array, "B L"], Bool[Array, "B L"]]:
    """Negative log-likelihood (nats) of each target, and whether it is the arg-max (the first of equal logits).

    softcap: logits become softcap * tanh(logit / softcap) (Gemma 2).
    """
    vocabulary = _Vocabulary(table.shape[0], states.shape)
    lse, chosen, winner = _scores(states, vocabulary, vocabulary.blocks(table), softcap, targets)
    return lse - chosen, winner == targets


def _value(states: Array, table: Array, softcap: float | None, targets: Array, weight: Array) -> _Found:
    return _weighted(*token_scores(states, table, softcap, targets), weight), ()


def _weighted(nll: Array, hits: Array, weight: Array) -> Nll:
    return Nll(jnp.sum(nll * weight), jnp.where(weight != 0, nll, 0), hits & (weight != 0))


def _value_and_gradients(states: Array, table: Array, softcap: float | None, targets: Array, weight: Array) -> _Found:
    """With p = softmax(z):  d nll / d z = p - [v is the target].  With one block, its logits are formed once."""
    vocabulary = _Vocabulary(table.shape[0], states.shape)
    blocks, to_table = jax.vjp(vocabulary.blocks, table)
    lse, chosen, winner = _scores(states, vocabulary, blocks, softcap, targets)

    def gradients(block: Float[Array, "w D"], ids: Int[Array, " w"]) -> tuple[Array, Array]:
        gathered, to_block = jax.vjp(lambda block: gather_for_compute(block, _TABLE, states.dtype), block)
        z = vocabulary.logits(states, gathered, ids, softcap)
        to_z = (jnp.exp(z - lse[..., None]) - (ids == targets[..., None])) * weight[..., None]
        if softcap is not None:
            to_z = to_z * (1 - jnp.square(jnp.maximum(z, -softcap) / softcap))  # 0 where padded, as z is -inf there
        to_z = to_z.astype(states.dtype)
        to_states = jnp.einsum("blw,wd->bld", to_z, gathered, preferred_element_type=jnp.float32)
        return to_states, *to_block(jnp.einsum("blw,bld->wd", to_z, states))

    if len(blocks) == 1:
        to_states, to_blocks = gradients(blocks[0], vocabulary.ids[0])
        to_blocks = to_blocks[None]
    else:

        def add(total: Array, block: tuple[Array, Array]) -> tuple[Array, Array]:
            to_states, to_block = gradients(*block)
            return total + to_states, to_block

        zeros = jnp.zeros(states.shape, jnp.float32)
        to_states, to_blocks = jax.lax.scan(add, zeros, (blocks, vocabulary.ids))
    nll = _weighted(lse - chosen, winner == targets, weight)
    return nll, (to_states.astype(states.dtype), *to_table(to_blocks))


def _scores(
    states: Float[Array, "B L D"],
    vocabulary: "_Vocabulary",
    blocks: Float[Array, "n w D"],
    softcap: float | None,
    targets: Int[Array, "B L"],
) -> tuple[Float[Array, "B L"], Float[Array, "B L"], Int[Array, "B L"]]:
    """log sum exp of the logits, that of the target, and the first arg-max."""

    def one(block: Float[Array, "w D"], ids: Int[Array, " w"]) -> tuple[Array, ...]:
        z = vocabulary.logits(states, gather_for_compute(block, _TABLE, states.dtype), ids, softcap)
        best = jnp.max(z, axis=-1)
        first = jnp.min(jnp.where(z == best[..., None], ids, vocabulary.size), axis=-1)
        lse = best + jnp.log(jnp.sum(jnp.exp(z - best[..., None]), axis=-1))
        return lse, vocabulary.take(z, ids, targets), best, first

    if len(blocks) == 1:
        lse, chosen, _, first = one(blocks[0], vocabulary.ids[0])
        return lse, chosen, first
    _, (lse, chosen, best, first) = jax.lax.scan(lambda _, block: (None, one(*block)), None, (blocks, vocabulary.ids))
    winner = jnp.min(jnp.where(best == best.max(0), first, vocabulary.size), axis=0)
    return jax.nn.logsumexp(lse, axis=0), chosen.sum(0), winner


class _Vocabulary:
    """The words in blocks, for states of that shape. Every block takes an equal part of each shard of the table."""

    def __init__(self, size: int, shape: tuple[int, ...]):
        shards = axis_size(axes.VOCAB)
        self.size, self._shards = size, shards if size % shards == 0 else 1
        positions = -(-shape[0] // axis_size(axes.BATCH)) * shape[1]
        align = _ALIGN if axis_size(axes.VOCAB) * axis_size(axes.EMBED) > 1 else 1
        self._count, self._width = block_shape(size // self._shards, positions, align)
        self.ids = self._split(jnp.arange(size)[:, None], size)[..., 0]  # [n, w], `size` where padded

    def blocks(self, table: Float[Array, "W D"]) -> Float[Array, "n w D"]:
        return self._split(table, 0)

    def logits(
        self, states: Float[Array, "B L D"], block: Float[Array, "w D"], ids: Int[Array, " w"], softcap: float | None
    ) -> Float[Array, "B L w"]:
        """float32 logits of factors in one dtype; -inf where the block is padded."""
        z = jnp.einsum("bld,wd->blw", states, block, preferred_element_type=jnp.float32)
        z = z if softcap is None else softcap * jnp.tanh(z / softcap)
        z = z if self.size == self.ids.size else jnp.where(ids < self.size, z, -jnp.inf)
        return constrain(z, (axes.BATCH, axes.LENGTH, axes.ACT_VOCAB))

    def take(self, z: Float[Array, "B L w"], ids: Int[Array, " w"], targets: Int[Array, "B L"]) -> Float[Array, "B L"]:
        """The logit of each target, 0 where it is not among `ids`. Reads all logits only where they are sharded."""
        if self._shards > 1:
            return jnp.sum(jnp.where(ids == targets[..., None], z, 0), axis=-1)
        place = jnp.clip(targets - ids[0], 0, len(ids) - 1)
        found = jnp.take_along_axis(z, place[..., None], axis=-1)[..., 0]
        return jnp.where(ids[place] == targets, found, 0)

    def _split(self, rows: Shaped[Array, "W D"], fill: int) -> Shaped[Array, "n w D"]:
        by_shard = rows.reshape(self._shards, -1, rows.shape[1])
        if padding := self._count * self._width - by_shard.shape[1]:
            by_shard = jnp.pad(by_shard, ((0, 0), (0, padding), (0, 0)), constant_values=fill)
        by_block = by_shard.reshape(self._shards, self._count, self._width, -1).swapaxes(0, 1)
        return by_block.reshape(self._count, self._shards * self._width, -1)


def block_shape(vocab: int, positions: int, align: int) -> tuple[int, int]:
    """(number of blocks, entries of each) of a device's share of a vocabulary, for that many positions on it.

    The fewest blocks of at least `_MIN_BLOCK` entries whose logits take at most `_MAX_BYTES`, of a width that divides
    the vocabulary and is a multiple of `align`; half as many where only those are. Else the last block is padded.
    """
    most = max(vocab // _MIN_BLOCK, 1)
    count = min(-(-4 * positions * vocab // _MAX_BYTES), most)
    if count == 1:
        return 1, vocab
    divisors = [n for n in range(-(-count // 2), most + 1) if vocab % (n * align) == 0]
    if divisors:
        best = min(divisors, key=lambda n: (n < count, abs(n - count)))
        return best, vocab // best
    width = -(-vocab // (count * _ALIGN)) * _ALIGN
    return -(-vocab // width), width
