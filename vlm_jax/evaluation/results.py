"""Result rows on disk: append-only JSON lines, safe for several writers on one file system.

A row is one write under a lock (`PATH.lock`), synced before `append` returns. An invalid line is an error on reading.
"""

import contextlib
import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from vlm_jax.core import reading, specs, text
from vlm_jax.core.errors import UserError
from vlm_jax.core.files import file_lock
from vlm_jax.core.model_ranges import check_model
from vlm_jax.core.rows import DEFAULTS, FIELDS, ResultRow
from vlm_jax.core.specs import ModelSpec
from vlm_jax.sizing.compression import check_stages

_MAX_BYTES = 2**28
_LARGEST, _LONGEST = 1e100, 2000  # number and text of a row
_TYPES = {field.name: field.type for field in dataclasses.fields(ResultRow)}


def append(path: str | Path, row: ResultRow) -> None:
    """Appends the row, on a new line after a truncated one (a crash). Raises `UserError` if a number is not finite, or
    if the file cannot be written.
    """
    line = to_line(row, path).encode()
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        check_writable(path)
        with _lock(path):
            _append(path, line)
    except OSError as error:
        raise _write_error(path, error) from error


def to_line(row: ResultRow, path: str | Path) -> str:
    """The row as a line of the file `path`. Raises `UserError` for a number that is not finite."""
    values = {name: value for name, value in dataclasses.asdict(row).items() if value != DEFAULTS.get(name, ...)}
    values = {name: text.printable(value) if isinstance(value, str) else value for name, value in values.items()}
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{path}: row {row.cell!r}: expected a finite number, got {name}={value} (fix its run)")
    return json.dumps(values, allow_nan=False) + "\n"


def check_writable(path: str | Path) -> None:
    """Raises `UserError` if `append` could not write to `path`."""
    path = Path(path)
    try:
        if path.exists():
            os.close(os.open(path, os.O_RDWR | os.O_APPEND))
        else:
            folder = next(parent for parent in path.absolute().parents if parent.exists())
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise _write_error(path, error) from error


def _write_error(path: str | Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot write rows here ({error.strerror or error}): free space or name another file")


def _lock(path: str | Path) -> FileLock:
    """Held from before the file is opened until after it is closed: NFS guarantees consistency only then."""
    return file_lock(Path(f"{path}.lock"), poll_interval=0.01)


def _append(path: str | Path, line: bytes) -> None:
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":
            line = b"\n" + line
        written = os.write(handle, line)
        if written != len(line):  # a full disk
            raise OSError(f"only {written} of {len(line)} bytes of a row were written")
        os.fsync(handle)
    finally:
        os.close(handle)


def read(path: str | Path) -> list[ResultRow]:
    """All rows in order. Raises `UserError` for a missing file or an invalid line."""
    return [parse(values, f"{path}:{number}") for number, values in read_lines(path)]


def done(path: str | Path) -> set[str]:
    """The `spec_hash` of all rows in the file; empty if it does not exist."""
    return {row.spec_hash for row in read(path)} if Path(path).exists() else set()


def read_lines(path: str | Path) -> list[tuple[int, dict[str, Any]]]:
    """(line number, object) of all lines that are not blank, read under the lock if this user can take it."""
    lock = Path(f"{path}.lock")
    try:
        with (
            _lock(path)
            if (lock.exists() or lock.is_symlink()) and os.access(lock, os.W_OK)
            else contextlib.nullcontext()
        ):
            content = reading.read_text(path, _MAX_BYTES)
    except OSError as error:
        raise UserError(f"{path}: cannot be read as rows: {reading.reason(error)}") from error
    lines = content.split("\n")
    objects = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        cause = "a half-written last line" if number == len(lines) else "a broken line"
        try:
            values = reading.parse_json(line, f"{path}:{number}: {cause}")
        except UserError as error:
            raise UserError(f"{error}; the lines before it are whole: delete it, run its cell again") from error
        if not isinstance(values, dict):
            raise UserError(f"{path}:{number}: expected a JSON object, got {type(values).__name__}")
        objects.append((number, values))
    return objects


def parse(values: Mapping[str, Any], where: str) -> ResultRow:
    """The row of a JSON object. Raises `UserError` for missing, unknown or mistyped fields."""
    if missing := [name for name in FIELDS if name not in values and name not in DEFAULTS]:
        raise UserError(f"{where}: missing field(s) {', '.join(missing)}; evaluate the cell again with this version")
    if extra := sorted(set(values) - set(FIELDS)):
        raise UserError(f"{where}: unknown field(s) {', '.join(extra)}; read with the version that wrote them")
    row = ResultRow(**{name: _typed(value, name, where) for name, value in values.items()})
    parts = {"encoder": row.model.encoder, "compressor": row.model.compressor, "llm": row.model.decoder}
    for name, part in parts.items():
        if part is None or part.name != getattr(row, name):
            got = part and part.name
            raise UserError(f"{where}: model: expected the row's {name} {getattr(row, name)!r}, got {got!r}")
    if row.model.compressor.tokens != row.visual_tokens:
        raise UserError(f"{where}: model: expected {row.visual_tokens} tokens, got {row.model.compressor.tokens}")
    check_model(row.model, f"{where}: model.")
    check_stages(row.model, f"{where}: model.")
    return row


def _typed(value: Any, name: str, where: str) -> str | int | float | ModelSpec | None:
    expected = _TYPES[name]
    if expected == float | None:
        if value is None:
            return None
        expected = float
    if expected is ModelSpec:
        return specs.from_dict(ModelSpec, value, f"{where}: {name}.")
    if expected is str and isinstance(value, str) and len(value) <= _LONGEST and text.is_printable(value):
        return value
    if expected is not str and isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST:
        if expected is float:
            return float(value)
        if value == int(value):
            return int(value)
    kind = f"a finite {expected.__name__}"
    if expected is str:
        kind = f"printable text of at most {_LONGEST} characters" if isinstance(value, str) else "text"
    raise UserError(f"{where}: {name}: expected {kind}, got {value!r}")
