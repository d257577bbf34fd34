"""Config files on the command line: `configs/vlm.py:llm=d48,tokens=4,smoke` and `--config.optim.clip_norm=0.5`.

As in big_vision, the part after the colon goes to the file's `get_config`, which passes it to `parse_arg` with its
defaults; overrides of single fields are applied afterwards.
"""

import ast
import contextlib
import importlib.util
import inspect
import os
import re
import reprlib
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from vlm_jax.core.errors import UserError, unknown
from vlm_jax.core.located import located

_DEFINES = re.compile(rb"^def get_(config|grid)\(", re.MULTILINE)


def parse_arg(arg: str, **defaults: Any) -> ConfigDict:
    """`"llm=d48,smoke"` and defaults -> values; a bare name is True. Raises `UserError` for a name without a default or
    a value of another type."""
    values = dict(defaults)
    for part in filter(None, (part.strip() for part in (arg or "").split(","))):
        name, equals, text = part.partition("=")
        if name not in defaults:
            raise unknown("config argument", name, defaults)
        values[name] = _typed(name, text if equals else "True", defaults[name])
    return ConfigDict(values)


def parse_list(name: str, value: str) -> tuple[int, ...]:
    """`"1+4+16"` -> (1, 4, 16), "" -> (). Raises `UserError`."""
    parts = value.split("+") if value else []
    if not all(part.isascii() and part.isdigit() and len(part) < 8 for part in parts):
        raise UserError(f"{name}: expected numbers such as 1+4+16, got {reprlib.repr(value)}")
    return tuple(map(int, parts))


def tokens_or_elastic(tokens: int, default: int, elastic: str) -> int | tuple[int, ...]:
    """`tokens`, or the several V of `elastic`. Raises `UserError` for tokens that are neither the default nor the most
    of these."""
    several = parse_list("elastic", elastic)
    if several and tokens not in (default, max(several)):
        raise UserError(f"tokens: expected {max(several)}, the most of elastic={elastic}, got {tokens} (leave it out)")
    return several or tokens


def _typed(name: str, text: str, default: Any) -> Any:
    """`text` as a value of the default's type."""
    if isinstance(default, str):
        return text
    try:
        value = ast.literal_eval(text)
        if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
    except (ValueError, SyntaxError, OverflowError, RecursionError, MemoryError):
        value = text
    if isinstance(default, tuple) and isinstance(value, list):
        value = tuple(value)
    if default is not None and type(value) is not type(default):
        raise UserError(
            f"{name}: expected a {type(default).__name__} such as {reprlib.repr(default)}, got {reprlib.repr(text)}"
        )
    return value


def call_function(path: str | Path, name: str, arg: str) -> Any:
    """The result of the function `name` of a config or grid file.

    Raises `UserError` with file and line for whatever goes wrong in the file, and where there is no such function.
    """
    path = _find(Path(path))
    module = _load_file(path)
    function = getattr(module, name, None)
    if not callable(function):
        got = "none" if function is None else type(function).__name__
        raise UserError(f"{path}: expected a function {name}(arg), got {got}")
    try:
        inspect.signature(function).bind(arg)
    except (TypeError, ValueError) as error:
        line = getattr(getattr(inspect.unwrap(function), "__code__", None), "co_firstlineno", None)
        where = path if line is None else f"{path}:{line}"
        raise UserError(f"{where}: expected a function {name}(arg), got one of other parameters ({error})") from error
    with _errors_of(path):
        return function(arg)


def _find(path: Path) -> Path:
    """The file of that path, here or shipped with the package. Raises `UserError` with those that exist."""
    try:
        if (file := located(path)).is_file():
            return file
        others = _configs_in(path.parent) or ([] if path.is_absolute() else _configs_in(Path("configs")))
    except (OSError, ValueError) as error:
        raise UserError(
            f"config file {reprlib.repr(str(path))}: cannot be read ({error.__class__.__name__})"
        ) from error
    raise unknown("config file", str(path), others) if others else UserError(f"no config file {path}")


def _load_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path}: expected a Python file, whose name ends in .py")
    module = importlib.util.module_from_spec(spec)
    with _errors_of(path):
        spec.loader.exec_module(module)
    return module


def _configs_in(folder: Path) -> list[str]:
    return [str(folder / p.name) for p in located(folder).glob("*.py") if p.is_file() and _defines(p)]


def _defines(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return _DEFINES.search(path.read_bytes()) is not None
    return False


@contextlib.contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    """Turns an exception of a user's config file into one line: the file, the line that raised or called what raised,
    and the error."""
    try:
        yield
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:  # also SystemExit: the file ends no command
        if isinstance(error, SyntaxError) and error.filename:
            file, line, text = error.filename, error.lineno, f"expected Python, got {error.msg}"
        else:
            here = os.path.abspath(path)  # as a module's file is named
            frames = traceback.extract_tb(error.__traceback__)
            lines = [frame.lineno for frame in frames if os.path.abspath(frame.filename) == here]
            file, line, text = path, lines[-1] if lines else None, f"{type(error).__name__}: {str(error)[:300]}"
        where = f"{file}:{line}" if line else file
        raise UserError(f"{where}: {' '.join(text.split())}") from error


def load_config(location: str, overrides: Mapping[str, str] | None = None) -> ConfigDict:
    """`"configs/vlm.py:llm=d48"` and `{"optim.clip_norm": "0.5"}` -> the unresolved ConfigDict.

    Raises `UserError` for a missing file, an error in it, an unknown argument or field, or a value of another type.
    """
    path, _, arg = location.partition(":")
    config = call_function(path, "get_config", arg)
    if not isinstance(config, ConfigDict):
        raise UserError(f"{path}: expected get_config to return a ConfigDict, got {type(config).__name__}")
    for name, text in (overrides or {}).items():
        try:
            _replace(config, name.split("."), text, name)
        except (TypeError, KeyError, ValueError, AttributeError) as error:  # of a ConfigDict with rules of its own
            raise UserError(f"--config.{name}: cannot be set ({error})") from error
    return config


def _replace(node: Any, keys: Sequence[str], text: str, name: str) -> Any:
    """`node` with the value at `keys` replaced by `text`: groups are changed in place, tuples are made anew."""
    if not keys:
        if isinstance(node, ConfigDict | Mapping):
            raise UserError(
                f"--config.{name}: expected a field, got a group (set {name}.{next(iter(node), 'FIELD')}=...)"
            )
        return _typed(name, text, node)
    key, *rest = keys
    where = name.split(".")[: -len(keys)]
    if isinstance(node, ConfigDict | dict):
        if key not in node:
            raise unknown(f"config field {'.'.join([*where, key])!r}:", key, list(node))
        node[key] = _replace(node[key], rest, text, name)
        return node
    if not isinstance(node, tuple | list):
        raise UserError(f"--config.{name}: expected a field, got one inside {'.'.join(where)}={reprlib.repr(node)}")
    if key not in (valid := [str(i) for i in range(len(node))]):
        raise unknown(f"config field {'.'.join([*where, key])!r}:", key, valid)
    items = list(node)
    items[int(key)] = _replace(items[int(key)], rest, text, name)
    return type(node)(items)


def split_overrides(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Splits `--config.a.b=value` flags from a command line. Raises `UserError` for one without a value."""
    rest, overrides = [], {}
    for flag in argv:
        if flag.startswith("--config."):
            name, equals, text = flag.removeprefix("--config.").partition("=")
            if not equals:
                raise UserError(f"{flag}: expected --config.{name}=VALUE")
            overrides[name] = text
        else:
            rest.append(flag)
    return rest, overrides
