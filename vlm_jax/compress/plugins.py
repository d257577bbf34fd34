"""Compressors of other packages: entry points of the group "vlm_jax.compressors", each a `contract.Compressor`.

    [project.entry-points."vlm_jax.compressors"]
    mine = "my_package.mine:ROW"

A package is imported when its compressor is asked for. Its row is checked then, and what its functions give whenever
they are called: whatever is wrong in them is a `PluginError`, which names the entry point.
"""

import functools
import itertools
import math
import numbers
from collections.abc import Callable, Collection, Set
from importlib import metadata
from typing import Any, NamedTuple

from vlm_jax.compress.contract import ELASTIC, OF_ATTENTION, PROJECTORS, READABLE, SALIENCE, Compressor, Cost
from vlm_jax.core.errors import RunStopped, UserError
from vlm_jax.core.specs import CompressorSpec, DropStage

GROUP = "vlm_jax.compressors"


class PluginError(UserError):
    """A package's compressor that cannot be used."""


@functools.cache
def entry_points() -> dict[str, tuple[metadata.EntryPoint, ...]]:
    """The installed entry points by name."""
    found: dict[str, tuple[metadata.EntryPoint, ...]] = {}
    for point in metadata.entry_points(group=GROUP):
        found[point.name] = (*found.get(point.name, ()), point)
    return found


def check_name(name: str, built_in: Collection[str]) -> None:
    """Raises `PluginError` if a package's compressor has the name of a built-in one."""
    if name in built_in and name in entry_points():
        point = entry_points()[name][0]
        raise PluginError(f"compressor {name!r}: {_of(point)} has the name of a built-in one (rename it)")


@functools.cache
def load(name: str) -> Compressor:
    """The row of an installed entry point. Raises `PluginError` if it cannot be imported or is no valid row, or if two
    packages use its name."""
    point, *others = entry_points()[name]
    if any(other.value != point.value for other in others):
        both = " and ".join(map(_of, (point, others[0])))
        raise PluginError(f"compressor {name!r}: expected one package of that name, got {both} (uninstall one)")
    try:
        row = point.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever the package raises, also SystemExit: it ends no command
        raise PluginError(f"compressor {name!r}: {_of(point)} cannot be imported ({_reason(error)})") from error
    return _checked(row, name, _of(point))


def _checked(row: object, name: str, point: str) -> Compressor:
    """The row, with functions that raise `PluginError`."""

    def expect(is_so: bool, expected: str, got: object) -> None:
        if not is_so:
            raise PluginError(f"compressor {name!r}: {point}: expected {expected}, got {got}")

    if not isinstance(row, Compressor):
        raise PluginError(f"compressor {name!r}: {point}: expected a Compressor, got {_kind(row)}")
    for field in _FUNCTIONS:
        value = getattr(row, field)
        expect(callable(value), f"{field} to be a function", _kind(value))
    for field in ("scores_tokens", "reads_places", "class_token_optional"):
        expect(isinstance(getattr(row, field), bool), f"{field}=True or False", repr(getattr(row, field)))
    for field, valid in (("elastic", ELASTIC), ("projector", PROJECTORS)):
        expect(getattr(row, field) in valid, f"{field} to be one of {', '.join(valid)}", repr(getattr(row, field)))
    expect(isinstance(row.reads, Set), "reads to be a frozenset", _kind(row.reads))
    if other := sorted(map(str, row.reads - READABLE)):
        expect(False, f"reads to name some of {', '.join(sorted(READABLE))}", ", ".join(other))
    if unset := sorted(row.reads & OF_ATTENTION if row.attention is _default("attention") else ()):
        expect(False, f"attention to name the block whose {unset[0]} it reads", "none")
    own = {field: getattr(row, field) for field in _FUNCTIONS if getattr(row, field) is not _default(field)}
    wrapped: dict[str, Any] = {field: _guarded(function, field, name, point) for field, function in own.items()}
    return row._replace(reads=frozenset(row.reads), **wrapped)


def _default(field: str) -> object:
    return Compressor._field_defaults.get(field)


def _guarded(function: Callable[..., Any], field: str, name: str, point: str) -> Callable[..., Any]:
    """The function of a row, which raises `PluginError` where the package's raises or gives something else."""
    result = _FUNCTIONS[field]

    def guarded(*args: Any) -> Any:
        try:
            out = function(*args)
        except (UserError, RunStopped, KeyboardInterrupt):
            raise
        except BaseException as error:  # a tracer's errors too: no caller expects them of a compressor
            raise PluginError(f"compressor {name!r}: {field} of {point} raised {_reason(error)}") from error
        if not result.is_valid(out):
            raise PluginError(f"compressor {name!r}: {field} of {point}: expected {result.text}, got {_shown(out)}")
        if isinstance(out, CompressorSpec) and out.name != name:
            raise PluginError(
                f"compressor {name!r}: {field} of {point}: expected a spec with the name of the entry point, {name!r}, "
                f"got {out.name!r}"
            )
        return out

    return guarded


class _Result(NamedTuple):
    """What a function of a row gives."""

    text: str
    is_valid: Callable[[Any], bool]


def _is_count(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= 0


def _are_counts(values: object) -> bool:
    return isinstance(values, tuple) and all(map(_is_count, values))


def _are_ascending(values: Any) -> bool:
    return _are_counts(values) and all(low < high for low, high in itertools.pairwise(values))


def _is_cost(cost: Any) -> bool:
    if not isinstance(cost, Cost) or not (cost.projected is None or _is_count(cost.projected)):
        return False
    return all(isinstance(flops, numbers.Real) and 0 <= flops < math.inf for flops in cost[:2])


def _is_attention(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and _is_count(value[0]) and value[1] in SALIENCE


def _is_stages(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(stage, DropStage) for stage in value)


_SPEC = _Result("a CompressorSpec", lambda out: isinstance(out, CompressorSpec))
_COUNT = _Result("an integer of 0 or more", _is_count)
_FUNCTIONS = {  # of a row; `models.connector` checks what `apply` gives, of all rows
    "init_weights": _Result("a dict of arrays", lambda out: isinstance(out, dict)),
    "apply": _Result("", lambda out: True),
    "tokens_out": _Result("a tuple of ascending integers", _are_ascending),
    "cost": _Result("a Cost of finite numbers", _is_cost),
    "defaults": _SPEC,
    "taps": _Result("a tuple of integers", _are_counts),
    "attention": _Result(f"(block, {' or '.join(map(repr, SALIENCE))})", _is_attention),
    "output_width": _COUNT,
    "entering": _COUNT,
    "stages": _Result("a tuple of DropStage", _is_stages),
    "segments": _Result(
        "a tuple of integers", lambda out: isinstance(out, tuple) and all(isinstance(one, int) for one in out)
    ),
    "for_decoder": _SPEC,
    "problem": _Result("text", lambda out: isinstance(out, str)),
}


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def _shown(value: object) -> str:
    try:
        return f"{repr(value)[:80]} ({_kind(value)})"
    except Exception:  # the package's own __repr__
        return _kind(value)


def _reason(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(": ")


def _of(point: metadata.EntryPoint) -> str:
    package = f" of package {point.dist.name}" if point.dist is not None else ""
    return f"entry point {point.value}{package}"
