"""Reads and writes `law.json` (`scaling.fitted`). The same law gives the same bytes."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vlm_jax.core import reading, specs, text
from vlm_jax.core.errors import UserError, unknown
from vlm_jax.core.files import write_text
from vlm_jax.core.model_ranges import check_model
from vlm_jax.core.specs import ModelSpec
from vlm_jax.scaling import laws
from vlm_jax.scaling.fitted import BASIC, NOISES, VERSION, FamilyFit, FormFit, LawFit, Measured
from vlm_jax.sizing.compression import check_stages

_DIGITS = 10  # significant; draws need fewer
_DRAW_DIGITS = 6
PARAMS_ARE = ("non_embedding", "nominal")
_LOWEST = {"sizes": 1e-9, "tokens": 1}
_MAX_EXPONENT, _MAX_COEFFICIENT = 10.0, 1e30  # beyond what `solve` finds for any rows


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
        form["lack_of_fit"] = form["lack_of_fit"]._asdict()
    return {**family._asdict(), "forms": forms, "measured": family.measured._asdict()}


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
        values = reading.read_object(path)
    except UserError as error:
        raise UserError(f"{error} ({again})") from error
    if values.get("version") != VERSION:
        raise UserError(f"{path}: expected version {VERSION}, got {values.get('version')!r} ({again})")
    try:
        law = specs.from_dict(LawFit, values, "")
        _check(law)
    except UserError as error:
        raise UserError(f"{path}: expected a complete law, got {error} ({again})") from error
    return law


def _check(law: LawFit) -> None:
    """Raises `UserError` for values of the right types that no fit writes."""
    if law.unit["params_are"] not in PARAMS_ARE:
        raise unknown("unit.params_are", law.unit["params_are"], PARAMS_ARE)
    if not law.families:
        raise UserError("no families")
    for name, family in law.families.items():
        where = f"families.{name}."
        _check_names((name, family.selection, *family.warnings, *family.rows["harness"]), where)
        for field in ("sizes", "tokens"):
            numbers = family.rows[field]
            if not numbers or numbers != sorted(set(numbers)) or not _LOWEST[field] <= numbers[0] <= numbers[-1] <= 1e7:
                raise UserError(f"{where}rows.{field}: expected ascending numbers above 0, got {numbers}")
        for kind in (family.chosen, BASIC):
            if kind not in family.forms:
                raise unknown(f"{where}form", kind, family.forms)
            if not family.forms[kind].draws:
                raise UserError(f"{where}forms.{kind}.draws is empty")
        for kind, form in family.forms.items():
            _check_form(form, laws.form(kind).params, f"{where}forms.{kind}.")
        _check_measured(family.measured, f"{where}measured.")
        for i, model in enumerate(family.models):
            _check_model(model, f"{where}models.{i}.")


def _check_form(form: FormFit, names: tuple[str, ...], where: str) -> None:
    counts = {len(draws) for draws in form.draws.values()}
    if set(form.params) != set(names) or (form.draws and set(form.draws) != set(names)) or len(counts) > 1:
        raise UserError(f"{where}params: expected {', '.join(names)} and as many draws of each")
    if counts == {0}:
        raise UserError(f"{where}draws: expected some, got none")
    for name in names:
        limit = _MAX_EXPONENT if name in ("alpha", "beta") else _MAX_COEFFICIENT
        if not max(map(abs, (form.params[name], *form.draws.get(name, ())))) <= limit:
            raise UserError(f"{where}{name}: expected numbers from {-limit:g} to {limit:g}")

    if form.lack_of_fit.noise not in NOISES:
        raise unknown(f"{where}lack_of_fit.noise", form.lack_of_fit.noise, NOISES)


def _check_measured(cells: Measured, where: str) -> None:
    count = len(cells.error)
    for name, values in cells._asdict().items():
        if len(values) != count:
            raise UserError(f"{where}{name}: expected {count} numbers, one for each error, got {len(values)}")
    for name, least in (("params", 1e-9), ("tokens", 1), ("error", 0), ("stderr", 0)):
        if not all(least <= value <= 1e7 for value in getattr(cells, name)):
            raise UserError(f"{where}{name}: expected numbers of {least:g} or more")


def _check_model(model: ModelSpec, where: str) -> None:
    for part in ("encoder", "compressor", "decoder"):
        spec = getattr(model, part)
        if spec is None:
            raise UserError(f"{where}{part}: expected a group of fields, got None")
        _check_names((spec.name,), f"{where}{part}.name")
    check_model(model, where)
    check_stages(model, where)


def _check_names(names: Iterable[str], where: str) -> None:
    for name in names:
        if not text.is_printable(name):
            raise UserError(f"{where}: expected printable text, got {name!r}")
