"""Compressors of other packages: entry points of the group "vlm_jax.compressors", each a `contract.Compressor`.

    [project.entry-points."vlm_jax.compressors"]
    mine = "my_package.mine:ROW"

A package is imported when its compressor is asked for.
"""

import functools
from collections.abc import Collection
from importlib import metadata

from vlm_jax.compress.contract import Compressor
from vlm_jax.core.errors import UserError

GROUP = "vlm_jax.compressors"


@functools.cache
def entry_points() -> dict[str, tuple[metadata.EntryPoint, ...]]:
    """The installed entry points by name."""
    found: dict[str, tuple[metadata.EntryPoint, ...]] = {}
    for point in metadata.entry_points(group=GROUP):
        found[point.name] = (*found.get(point.name, ()), point)
    return found


def check_name(name: str, built_in: Collection[str]) -> None:
    """Raises `UserError` if a package's compressor has the name of a built-in one."""
    if name in built_in and name in entry_points():
        point = entry_points()[name][0]
        raise UserError(f"compressor {name!r}: {_of(point)} has the name of a built-in one (rename it)")


@functools.cache
def load(name: str) -> Compressor:
    """The row of an installed entry point. Raises `UserError` if it cannot be imported or is no row, or if two packages
    use its name."""
    point, *others = entry_points()[name]
    if any(other.value != point.value for other in others):
        both = " and ".join(map(_of, (point, others[0])))
        raise UserError(f"compressor {name!r}: expected one package of that name, got {both} (uninstall one)")
    try:
        row = point.load()
    except Exception as error:  # whatever the package raises
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"compressor {name!r}: {_of(point)} cannot be imported ({reason})") from error
    if not isinstance(row, Compressor):
        raise UserError(f"compressor {name!r}: {_of(point)}: expected a Compressor, got {type(row).__name__}")
    return row


def _of(point: metadata.EntryPoint) -> str:
    package = f" of package {point.dist.name}" if point.dist is not None else ""
    return f"entry point {point.value}{package}"
