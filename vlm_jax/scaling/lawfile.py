"""Reads and writes `law.json` (`scaling.fitted`). The same law gives the same bytes."""

import json
from pathlib import Path
from typing import Any

from vlm_jax.core import specs
from vlm_jax.core.errors import UserError
from vlm_jax.core.files import write_text
from vlm_jax.core.specs import ModelSpec
from vlm_jax.scaling.fitted import VERSION, FamilyFit, FormFit, LawFit

_DIGITS = 10  # significant; draws need fewer
_DRAW_DIGITS = 6


def write(path: str | Path, law: LawFit) -> None:
    """Writes the law atomically."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_text(Path(path), dumps(law))
    except OSError as error:
        raise UserError(f"{path}: cannot write: {error.strerror}") from error


def dumps(law: LawFit) -> str:
    """The law as JSON, with lists of numbers on one line."""
    families = {name: _family(one) for name, one in law.families.items()}
    return _text(law._asdict() | {"families": families}, 0) + "\n"


def _family(family: FamilyFit) -> dict[str, Any]:
    forms = {name: form._asdict() for name, form in family.forms.items()}
    for form in forms.values():
        form["draws"] = {name: [_short(v, _DRAW_DIGITS) for v in draws] for name, draws in form["draws"].items()}
    return {**family._asdict(), "forms": forms}


def _short(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")


def _text(value: Any, depth: int) -> str:
    if isinstance(value, ModelSpec):
        return json.dumps(specs.to_dict(value))  # on one line, not rounded
    pad = "  " * (depth + 1)
    if isinstance(value, dict) and value:
        inner = ",\n".join(f"{pad}{json.dumps(str(key))}: {_text(one, depth + 1)}" for key, one in value.items())
        return "{\n" + inner + "\n" + "  " * depth + "}"
    if isinstance(value, list | tuple):
        plain = all(one is None or isinstance(one, int | float) for one in value)
        parts = [_text(one, depth + 1) for one in value]
        if plain or not parts:
            return "[" + ", ".join(parts) + "]"
        return "[\n" + ",\n".join(pad + part for part in parts) + "\n" + "  " * depth + "]"
    if isinstance(value, float):
        value = _short(value, _DIGITS)
    return json.dumps(value, allow_nan=False)


def read(path: str | Path) -> LawFit:
    """The law of a file. Raises `UserError` with file and fix if it is missing, broken or of another version."""
    again = "write it again with `python -m vlm_jax.fit_law`"
    try:
        values = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror} ({again})") from error
    except ValueError as error:
        raise UserError(f"{path}: expected JSON, got {error} ({again})") from error
    version = values.get("version") if isinstance(values, dict) else None
    if version != VERSION:
        raise UserError(f"{path}: expected version {VERSION}, got {version!r} ({again})")
    try:
        families = {name: _read_family(one) for name, one in values.pop("families").items()}
        return LawFit(**values, families=families)
    except (UserError, KeyError, TypeError, AttributeError, ValueError) as error:
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        raise UserError(f"{path}: expected a complete law, got {kind}{error} ({again})") from error


def _read_family(values: dict[str, Any]) -> FamilyFit:
    forms = {name: FormFit(**form) for name, form in values["forms"].items()}
    models = tuple(specs.from_dict(ModelSpec, one, f"models.{i}.") for i, one in enumerate(values["models"]))
    family = FamilyFit(**{**values, "forms": forms, "models": models})
    if not family.forms[family.chosen].draws:
        raise ValueError(f"no draws for {family.chosen}")
    return family
