"""Parts of sources, several in a row, and how many examples of each make an epoch of a mixture."""

import functools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from jaxtyping import Int

from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import SourceSpec
from vlm_jax.data.examples import Example, Source
from vlm_jax.data.readers.files import combined


def taken(source: Source, take: str) -> Source:
    """The part of a source that `take` names: "all", or "first:N", "end:N", "random:N" with N a count or "10%" (rounded
    up, at most everything). Random parts are the same each time, smaller ones within larger ones. Raises `UserError`.
    """
    if take == "all":
        return source
    kind, _, number = take.partition(":")
    count = _count(number, len(source))
    if kind not in ("first", "end", "random") or count is None:
        raise UserError(f"take: expected all, first:N, end:N or random:N with N a positive number or N%, got {take!r}")
    count = min(count, len(source))
    if kind == "first":
        indices = np.arange(count)
    elif kind == "end":
        indices = np.arange(len(source) - count, len(source))
    else:
        # The raw stream of a bit generator is the same in every version of NumPy.
        indices = np.sort(np.argsort(np.random.PCG64(0).random_raw(len(source)), kind="stable")[:count])
    return Subset(source, indices, take)


def _count(number: str, length: int) -> int | None:
    """5 or "2.5%" of `length`, rounded up; None where it is not a positive number."""
    try:
        value = Fraction(number.removesuffix("%"))
    except (ValueError, ZeroDivisionError):
        return None
    if number.endswith("%"):
        value = Fraction(math.ceil(value * length / 100))
    return int(value) if value > 0 and value.denominator == 1 else None


class Subset(Source):
    """Some examples of a source, by index."""

    def __init__(self, source: Source, indices: Int[np.ndarray, " n"], description: str):
        self._source, self._indices, self.name = source, indices, source.name
        self._description = description

    @functools.cached_property
    def fingerprint(self) -> str:
        return combined(self._source.fingerprint, self._description)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Example:
        return self._source[int(self._indices[index])]

    def without_images(self, index: int) -> Example:
        return self._source.without_images(int(self._indices[index]))


class Concatenation(Source):
    """Sources one after the other."""

    def __init__(self, parts: Sequence[Source], name: str):
        self._parts, self.name = tuple(parts), name
        self._ends = np.cumsum([len(part) for part in parts])

    @functools.cached_property
    def fingerprint(self) -> str:
        return combined(*(part.fingerprint for part in self._parts))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _part(self, index: int) -> tuple[Source, int]:
        index = range(len(self))[index]
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self._parts[part], index - int(self._ends[part - 1] if part else 0)

    def __getitem__(self, index: int) -> Example:
        source, row = self._part(index)
        return source[row]

    def without_images(self, index: int) -> Example:
        source, row = self._part(index)
        return source.without_images(row)


def epoch_counts(specs: Sequence[SourceSpec], lengths: Sequence[int]) -> list[int]:
    """Examples of each source in an epoch of the mixture.

    A source without a share gives `weight` passes over its examples. One with a share gives that part of the epoch: the
    sources without shares are then the rest of it; where all have shares, the epoch is as long as all sources together.
    Raises `UserError` for weights and shares that make no mixture.
    """
    for number, spec in enumerate(specs):
        where = f"source {spec.name or spec.source} ({number})"
        if not 0 <= spec.share <= 1 or not 0 < spec.weight < math.inf:
            raise UserError(f"{where}: expected weight > 0 and 0 <= share <= 1, got {spec.weight} and {spec.share}")
        if spec.share and spec.weight != 1:
            raise UserError(f"{where}: expected a weight or a share, got both ({spec.weight} and {spec.share})")
    shares = [Fraction(str(spec.share)) for spec in specs]
    passes = [
        0 if share else Fraction(str(spec.weight)) * n for spec, share, n in zip(specs, shares, lengths, strict=True)
    ]
    rest = 1 - sum(shares)
    if all(shares):
        if abs(rest) > Fraction(1, 1000):
            raise UserError(f"shares: expected a sum of 1, got {float(sum(shares)):g}")
        total = Fraction(sum(lengths)) / sum(shares)
    elif rest <= 0:
        raise UserError(f"shares: expected a sum below 1, as other sources have none, got {float(sum(shares)):g}")
    else:
        total = sum(passes) / rest
    exact = [share * total if share else own for share, own in zip(shares, passes, strict=True)]
    counts = [math.floor(value) for value in exact]
    missing = round(sum(exact)) - sum(counts)  # largest remainders first
    for number in sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])[:missing]:
        counts[number] += 1
    for number, (spec, count) in enumerate(zip(specs, counts, strict=True)):
        if not count:
            where = f"source {spec.name or spec.source} ({number})"
            raise UserError(f"{where}: expected at least one example in an epoch, got none (raise its weight or share)")
    return counts
