"""Files from outside: regular files of bounded size, JSON, and CSV.

    values = read_json(path)                         # any JSON value
    rows = read_csv(path, ("chip", "flops"))         # [("file.csv:2", {"chip": "v6e", ...}), ...]

Each function raises `UserError` with the file's name for anything that it does not return. JSON is stricter than
Python's: no NaN, no number that overflows a float, no lone surrogates, at most `MAX_DEPTH` levels.
"""

import csv
import io
import json
import os
import re
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from vlm_jax.core.errors import UserError

MAX_BYTES = 2**25  # of a file of settings or numbers that is read whole
MAX_DEPTH = 64
_MAX_DIGITS = 300  # an integer that is still finite as a float; model_max_length has 31
_KINDS = (
    (stat.S_ISDIR, "folder"), (stat.S_ISFIFO, "named pipe"), (stat.S_ISSOCK, "socket"), (stat.S_ISCHR, "device"),
    (stat.S_ISBLK, "device"),
)  # fmt: skip
_LARGE = re.compile(r"[eE]\+?\d{3}")  # of a number that may be out of range
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def kind(path: str | Path) -> str:
    """ "file", "folder", or "" if there is none; links are followed. Raises `UserError` for devices, pipes, sockets and
    names that the file system does not take.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    found = _kind_of(mode)
    if found not in ("file", "folder"):
        raise UserError(f"{path}: expected a file or folder, got a {found}")
    return found


def open_regular(path: str | Path, max_bytes: int | None = None) -> BinaryIO:
    """Opens a regular file for reading. Nothing else is opened: a pipe or a device may block."""
    try:
        found = _kind_of(os.stat(path).st_mode)
        if found != "file":
            raise UserError(f"{path}: expected a file, got a {found}")
        file = open(path, "rb")  # noqa: SIM115 - the caller closes it
        size = os.fstat(file.fileno()).st_size
    except (FileNotFoundError, NotADirectoryError) as error:
        cause = "a link to a file that does not exist" if os.path.islink(path) else "no such file"
        raise UserError(f"{path}: cannot be read: {cause}") from error
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if max_bytes is not None and size > max_bytes:
        file.close()
        raise UserError(f"{path}: expected at most {max_bytes:,} bytes, got {size:,}")
    return file


def read_bytes(path: str | Path, max_bytes: int = MAX_BYTES) -> bytes:
    """The content of a regular file."""
    with open_regular(path, max_bytes) as file:
        try:
            return file.read()
        except OSError as error:
            raise _unreadable(path, error) from error


def read_text(path: str | Path, max_bytes: int = MAX_BYTES) -> str:
    """The content of a UTF-8 file, without a byte-order mark."""
    try:
        return read_bytes(path, max_bytes).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid UTF-8 (byte {error.start})") from error


def read_json(path: str | Path, max_bytes: int = MAX_BYTES) -> Any:
    """The value of a JSON file."""
    return parse_json(read_text(path, max_bytes), str(path))


def read_object(path: str | Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The object of a JSON file."""
    content = read_json(path, max_bytes)
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object, got {type(content).__name__}")
    return content


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text; `where` names it in errors."""
    try:
        parse_float = _float if _LARGE.search(text) else None
        value = json.loads(text, parse_int=_int, parse_float=parse_float, parse_constant=_refuse)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise _too_deep(where) from error
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{where}: not valid JSON ({error.msg}: {at})") from error
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: not valid JSON (a lone surrogate, half of a character)") from error
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error})") from error
    _check_depth(value, where)
    return value


def _int(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _float(text: str) -> float:
    value = float(text)
    if value - value != 0:
        raise ValueError(f"{text[:20]} is out of range")
    return value


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _check_depth(value: Any, where: str) -> None:
    level, depth = [value], 0
    while level := [inner for outer in level for inner in _containers(outer)]:
        depth += 1
        if depth >= MAX_DEPTH:
            raise _too_deep(where)


def _containers(outer: Any) -> list[Any]:
    """The lists and objects in a list or object."""
    members = outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ()
    if {dict, list}.isdisjoint(map(type, members)):  # most lists are long and hold numbers
        return []
    return [inner for inner in members if isinstance(inner, dict | list)]


def _too_deep(where: str) -> UserError:
    return UserError(f"{where}: not valid JSON (nested too deeply: more than {MAX_DEPTH} levels)")


def read_csv(
    path: str | Path, columns: Collection[str], max_bytes: int = MAX_BYTES
) -> list[tuple[str, dict[str, str]]]:
    """("file.csv:3", field by column) of each line of a CSV file whose header has `columns`, and maybe others."""
    text = read_text(path, max_bytes)
    if "\0" in text:
        raise UserError(f"{path}: not a CSV file (a NUL byte; UTF-16? save it as UTF-8)")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows, header = [], None
    try:
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if header is None:
                header = row
                if missing := [name for name in columns if name not in header]:
                    raise UserError(f"{path}: expected columns {','.join(columns)}, missing {','.join(missing)}")
                if len(set(header)) < len(header):
                    raise UserError(f"{path}: expected each column once, got one of {','.join(header)} again")
            elif row and len(row) != len(header):
                raise UserError(f"{where}: expected as many fields as the header has, {len(header)}, got {len(row)}")
            elif row:
                rows.append((where, dict(zip(header, row, strict=True))))
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not a CSV file ({error})") from error
    if header is None:
        raise UserError(f"{path}: expected columns {','.join(columns)}, missing {','.join(columns)}")
    return rows


def reason(error: Exception) -> str:
    """Why a file cannot be read or written, without its name."""
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


def _unreadable(path: str | Path, error: Exception) -> UserError:
    return UserError(f"{path}: cannot be read: {reason(error)}")


def _kind_of(mode: int) -> str:
    return next((name for test, name in _KINDS if test(mode)), "file")
