"""Config files on the command line: `configs/vlm.py:llm=d48,tokens=4,smoke` and `--config.optim.clip_norm=0.5`.

As in big_vision, the part after the colon goes to the file's `get_config`, which passes it to `parse_arg` with its
defaults; overrides of single fields are applied afterwards.
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
    """`"llm=d48,smoke"` and defaults -> values; a bare name is True. Raises `UserError` for a name without a default or
    a value of another type."""
    values = dict(defaults)
    for part in filter(None, (part.strip() for part in (arg or "").split(","))):
        name, equals, text = part.partition("=")
        if name not in defaults:
            raise unknown("config argument", name, defaults)
        values[name] = _typed(name, text if equals else "True", defaults[name])
    return ConfigDict(values)


def _typed(name: str, text: str, default: Any) -> Any:
    """`text` as a value of the default's type."""
    if isinstance(default, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(default, tuple) and isinstance(value, list):
        value = tuple(value)
    if default is not None and type(value) is not type(default):
        raise UserError(f"{name}: expected a {type(default).__name__} such as {default!r}, got {text!r}")
    return value


def load_file(path: str | Path) -> ModuleType:
    """Imports a config or grid file. Raises `UserError` if there is none."""
    path = Path(path)
    if not path.is_file():
        configs = [str(p) for p in path.parent.glob("*.py") if p.is_file() and _DEFINES.search(p.read_bytes())]
        raise unknown("config file", str(path), configs) if configs else UserError(f"no config file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"{error.filename}:{error.lineno}: expected Python, got {error.msg}") from error
    return module


def load_config(location: str, overrides: Mapping[str, str] | None = None) -> ConfigDict:
    """`"configs/vlm.py:llm=d48"` and `{"optim.clip_norm": "0.5"}` -> the unresolved ConfigDict.

    Raises `UserError` for a missing file, an unknown argument or field, or a value of another type.
    """
    path, _, arg = location.partition(":")
    module = load_file(path)
    if not hasattr(module, "get_config"):
        raise UserError(f"{path}: expected a function get_config(arg), got none")
    config = module.get_config(arg)
    if not isinstance(config, ConfigDict):
        raise UserError(f"{path}: expected get_config to return a ConfigDict, got {type(config).__name__}")
    for name, text in (overrides or {}).items():
        _override(config, name, text)
    return config


def _override(config: ConfigDict, name: str, text: str) -> None:
    node: Any = config
    keys = name.split(".")
    for i, key in enumerate(keys):
        if isinstance(node, Sequence) and not isinstance(node, str) and key.isdigit() and int(key) < len(node):
            node = node[int(key)]
            continue
        if not isinstance(node, ConfigDict | dict) or key not in node:
            if isinstance(node, str) or not isinstance(node, ConfigDict | dict | Sequence):
                raise UserError(f"--config.{name}: expected a field, got one inside {'.'.join(keys[:i])}={node!r}")
            valid = list(node) if isinstance(node, ConfigDict | dict) else map(str, range(len(node)))
            raise unknown(f"config field {'.'.join(keys[: i + 1])!r}:", key, valid)
        if i == len(keys) - 1:
            node[key] = _typed(name, text, node[key])
        node = node[key]


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
