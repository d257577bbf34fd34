"""Dataclasses, named tuples and typed dicts from plain values, and back, with every type checked."""

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from vlm_jax.core.errors import UserError, unknown

_MAX_FLOAT, _MAX_INT = 1e300, 10**15  # of a number in a file or config
_hints = functools.cache(typing.get_type_hints)


def to_dict(spec: Any) -> dict[str, Any]:
    """A spec as nested plain dicts and lists, ready for JSON."""
    return json.loads(json.dumps(dataclasses.asdict(spec)))


def from_dict(cls: type, values: Any, where: str) -> Any:
    """The inverse of `to_dict`, also for NamedTuples and TypedDicts. Raises `UserError` for a missing, unknown or
    mistyped field; messages name it behind the prefix `where`, such as "config field " or "rows.jsonl:3: model."."""
    if not typing.is_typeddict(cls) and isinstance(values, cls):
        return values
    if not isinstance(values, Mapping):
        raise UserError(f"{where.rstrip('. ')}: expected a group of fields, got {values!r}")
    hints = _hints(cls)
    for key in values:
        if key not in hints:
            raise UserError(f"{where}{key}: {unknown('field', key, hints)}")
    for name in _required(cls):
        if name not in values:
            raise UserError(f"{where}{name} is missing")
    return cls(**{key: _value(hints[key], value, f"{where}{key}") for key, value in values.items()})


@functools.cache
def _required(cls: type) -> Iterable[str]:
    if dataclasses.is_dataclass(cls):
        return [field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING]
    if typing.is_typeddict(cls):
        return sorted(cls.__required_keys__)  # type: ignore[attr-defined]
    return [name for name in cls._fields if name not in cls._field_defaults]  # type: ignore[attr-defined]


def _value(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if -_MAX_FLOAT <= value <= _MAX_FLOAT:  # False for NaN
            return float(value)
        raise UserError(f"{where}: expected a finite number, got {value}")
    if hint in (int, str, bool) and type(value) is hint:
        if hint is int and not -_MAX_INT <= value <= _MAX_INT:
            raise UserError(f"{where}: expected an integer of at most 15 digits, got {value}")
        return value
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint) or typing.is_typeddict(hint) or hasattr(hint, "_fields"):
        return from_dict(typing.cast(type, hint), value, f"{where}.")
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _value(next(arg for arg in args if arg is not type(None)), value, where)
    if origin is dict and isinstance(value, Mapping):
        return {key: _value(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is list and isinstance(value, list):
        if args[0] is float and set(map(type, value)) == {float} and sum(map(abs, value)) <= _MAX_FLOAT:
            return value  # the draws of a law are many
        return [_value(args[0], item, f"{where}.{i}") for i, item in enumerate(value)]
    if origin is tuple and isinstance(value, Mapping):  # pairs
        value = tuple(value.items())
    if origin is tuple and isinstance(value, list | tuple):
        if args[-1] is Ellipsis:
            return tuple(_value(args[0], item, f"{where}.{i}") for i, item in enumerate(value))
        if len(args) == len(value):
            pairs = zip(args, value, strict=True)
            return tuple(_value(arg, item, f"{where}.{i}") for i, (arg, item) in enumerate(pairs))
    raise UserError(f"{where}: expected {getattr(hint, '__name__', hint)}, got {value!r}")
