"""`configs/vlm.py:llm=d48,tokens=4,smoke` and `--config.optim.clip_norm=0.5`: how a run is named on the command line.

The conventions are big_vision's: the part behind the colon is handed to the file's `get_config`, which passes it to
`parse_arg` with its defaults; overrides of single fields come on top. Only what several settings share deserves an
argument.
"""

import ast
import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from vlm_jax.core.errors import UserError, unknown

_DEFINES = re.compile(rb"^def get_(config|grid)\(", re.MULTILINE)


def parse_arg(arg: str, **defaults: Any) -> ConfigDict:
    """`"llm=d48,smoke"` over `defaults` -> their values; a bare name sets a boolean.

    Raises `UserError` for a name without a default (the nearest is suggested) or a value of another type.
    """
    values = dict(defaults)
    for part in filter(None, (part.strip() for part in (arg or "").split(","))):
        name, equals, text = part.partition("=")
        if name not in defaults:
            raise unknown("config argument", name, defaults)
        values[name] = _typed(name, text if equals else "True", defaults[name])
    return ConfigDict(values)


def _typed(name: str, text: str, default: Any) -> Any:
    """The text as a value of the default's type."""
    if isinstance(default, str):
        return text
    wanted = type(default).__name__
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(default, tuple) and isinstance(value, list):
        value = tuple(value)
    if default is not None and type(value) is not type(default):
        raise UserError(f"{name}={text!r}: a value of type {wanted} is wanted, such as {default!r}")
    return value


def load_file(path: str | Path) -> ModuleType:
    """Runs a config or grid file. Raises `UserError` if there is none."""
    path = Path(path)
    if not path.is_file():
        beside = path.parent.glob("*.py") if path.parent.is_dir() else ()
        near = [str(p) for p in beside if p.is_file() and _DEFINES.search(p.read_bytes())]
        raise unknown("config file", str(path), near) if near else UserError(f"no config file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"{error.filename}:{error.lineno}: expected Python, got {error.msg}") from error
    return module


def load_config(location: str, overrides: Mapping[str, str] | None = None) -> ConfigDict:
    """`"configs/vlm.py:llm=d48"` and `{"optim.clip_norm": "0.5"}` -> the ConfigDict, unresolved.

    Raises `UserError` for a missing file, an unknown argument or field, or a value of another type.
    """
    path, _, arg = location.partition(":")
    module = load_file(path)
    if not hasattr(module, "get_config"):
        raise UserError(f"{path}: a config file defines get_config(arg)")
    config = module.get_config(arg)
    if not isinstance(config, ConfigDict):
        raise UserError(f"{path}: expected get_config to return a ConfigDict, got {type(config).__name__}")
    for name, text in (overrides or {}).items():
        _override(config, name, text)
    return config


def _override(config: ConfigDict, name: str, text: str) -> None:
    node: Any = config
    *parents, last = name.split(".")
    for i, key in enumerate([*parents, last]):
        if isinstance(node, Sequence) and not isinstance(node, str) and key.isdigit() and int(key) < len(node):
            node = node[int(key)]
            continue
        if not isinstance(node, ConfigDict | dict) or key not in node:
            if isinstance(node, str) or not isinstance(node, ConfigDict | dict | Sequence):
                raise UserError(f"--config.{name}: expected a field, got one inside {'.'.join(parents[:i])}={node!r}")
            valid = list(node) if isinstance(node, ConfigDict | dict) else map(str, range(len(node)))
            raise unknown(f"config field {'.'.join([*parents[:i], key])!r}:", key, valid)
        if key == last and i == len(parents):
            node[key] = _typed(name, text, node[key])
        else:
            node = node[key]


def split_overrides(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Takes `--config.a.b=value` out of a command line. Raises `UserError` where there is no value."""
    rest, overrides = [], {}
    for word in argv:
        if word.startswith("--config."):
            name, equals, text = word.removeprefix("--config.").partition("=")
            if not equals:
                raise UserError(f"{word}: write it as --config.{name}=VALUE")
            overrides[name] = text
        else:
            rest.append(word)
    return rest, overrides
