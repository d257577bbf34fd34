"""Hostile inputs, drawn from a seed: values, JSON, CSV, bytes, names and things that are no files."""

import copy
import csv
import io
import json
import os
import random
import string
from pathlib import Path
from typing import Any

TEXTS = (
    "", " ", "\n", "\0", "a\0b", "\x1b[31mred\x1b[0m", "\x07\x08\r", "\u202egnp.exe", "\ud800", "\udcff", "²", "१२",
    "½",
    "../../escaped", "/etc/passwd", "..", ".", "-", "--help", "a/b\\c", "CON", "[/bold]", "[link=file:///]x", ":smile:",
    "$\\frac$", "$x_{$", "_hidden", "{}", "{0.__class__}", "%s%n", '"><img src=x onerror=alert(1)>',
    "</script><script>",
    "<!--", "$DATA", "nan", "inf", "-inf", "1e400", "1e308", "-0", "0x10", "1_000", "9" * 25, "9" * 5000, "true",
    "null",
    "日本語", "😀", "a\u0301" * 50, "x" * 300, "y" * 5000, "z" * 140_000, "=1+1", "@SUM(1)", "\ufeff", "a,b;c\t",
    "'\"`",
)  # fmt: skip
NUMBERS = (
    0, -1, 1, 2, 3, 7, 0.5, -0.0, 1e-320, 1e308, -1e308, float("nan"), float("inf"), float("-inf"), 2**31, 2**63,
    -(2**63),
    2**64, 10**30, 10**299, 10**400, 1e16, 255, 256, 65536, 1e-9, 4.5,
)  # fmt: skip
_LETTERS = string.ascii_letters + string.digits + "._-/ "


def value(rng: random.Random, depth: int = 0) -> Any:
    """Any JSON value."""
    kind = rng.randrange(10)
    if kind < 4:
        return rng.choice(NUMBERS)
    if kind < 7:
        return text(rng)
    if kind == 7 or depth > 2:
        return rng.choice((None, True, False, [], {}))
    if kind == 8:
        return [value(rng, depth + 1) for _ in range(rng.choice((1, 2, 3, 5)))]
    return {text(rng)[:50]: value(rng, depth + 1) for _ in range(rng.choice((1, 2, 3)))}


def text(rng: random.Random) -> str:
    if rng.random() < 0.8:
        return rng.choice(TEXTS)
    return "".join(rng.choice(_LETTERS) for _ in range(rng.randrange(20)))


def nested(depth: int) -> Any:
    out: Any = []
    for i in range(depth):
        out = [out] if i % 2 else {"a": out}
    return out


def changed(original: Any, rng: random.Random, changes: int | None = None) -> Any:
    """A copy of a JSON value with some members replaced, removed, renamed, repeated or added."""
    original = copy.deepcopy(original)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6)) if changes is None else changes):
        node, depth = original, rng.randrange(7)
        for _ in range(depth):
            inner = [one for one in (node.values() if isinstance(node, dict) else node) if isinstance(one, dict | list)]
            inner = [one for one in inner if one]
            if not inner:
                break
            node = rng.choice(inner)
        if not node or not isinstance(node, dict | list):
            return value(rng)
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        action = rng.random()
        if action < 0.65:
            node[key] = nested(rng.choice((20, 100, 600))) if rng.random() < 0.04 else value(rng)
        elif action < 0.75 and isinstance(node[key], int | float) and not isinstance(node[key], bool):
            node[key] = node[key] * rng.choice((-1, 2, 10, 1000, 10**12))
        elif action < 0.85:
            del node[key]
        elif isinstance(node, dict):
            node[text(rng)[:300]] = node[key]
        else:
            node.extend([node[key]] * rng.choice((1, 3, 50)))
    return original


def json_bytes(original: Any, rng: random.Random) -> bytes:
    """A JSON file: of changed values, or whose text is broken."""
    kind = rng.random()
    if kind < 0.7:
        try:
            return json.dumps(changed(original, rng)).encode()
        except ValueError:  # an integer of too many digits
            return b"9" * 5000
    if kind < 0.8:
        return rng.choice(_JSON_TEXTS)
    return broken(json.dumps(original).encode(), rng)


_JSON_TEXTS = (
    b"", b"{", b"[", b"null", b"[]", b"{}", b"1", b'"a"', b"\xff\xfe{\x00}\x00", b"\xef\xbb\xbf{}", b'{"a": NaN}',
    b'{"a": 1e400}', b'{"a": ' + b"9" * 5000 + b"}", b"[" * 100_000, b'{"a":' * 100_000, b"[" * 900 + b"]" * 900,
    b'{"a": "\\ud800"}', b'{"\\udfff": 1}', b'{"a": 1, "a": 2}', b"\0" * 100, b'{"a": "\xff"}', b"{'a': 1}", b"[1,]",
    b'{"version": 2}', b'{"a": "' + b"x" * 10**6 + b'"}', b"[" + b"[]," * 10**5 + b"[]]", b'{"a": Infinity}', b"-",
)  # fmt: skip


def broken(content: bytes, rng: random.Random) -> bytes:
    """Bytes that were cut, flipped, repeated, or joined with others."""
    content, kind = bytearray(content), rng.randrange(8)
    at = rng.randrange(len(content)) if content else 0
    if kind == 0:
        return bytes(content[:at])
    if kind == 1:
        return bytes(content[at:])
    if kind == 2:
        return bytes(content[:at] + rng.randbytes(rng.choice((1, 8, 200))) + content[at:])
    if kind == 3:
        return bytes(content + content)
    if kind == 4:
        return rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\0")) + bytes(content)
    if kind == 5:
        return content.decode("latin-1").encode("utf-16")
    for _ in range(rng.choice((1, 2, 8, 64))):
        if content:
            content[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(content)


def csv_bytes(header: list[str], rows: list[list[str]], rng: random.Random) -> bytes:
    """A CSV file with hostile fields, other columns, or a broken text."""
    table = [list(header), *[list(row) for row in rows]]
    for _ in range(rng.choice((0, 1, 1, 2, 5))):
        row = rng.randrange(len(table))
        if rng.random() < 0.8 and table[row]:
            column = rng.randrange(len(table[row]))
            table[row][column] = text(rng) if rng.random() < 0.6 else str(rng.choice(NUMBERS[:-1]))
        elif rng.random() < 0.5:
            table[row].append(text(rng))
        else:
            table.pop(row) if len(table) > 1 else None
    out = io.StringIO()
    csv.writer(out).writerows(table)
    content = out.getvalue().encode("utf-8", "surrogatepass")
    return broken(content, rng) if rng.random() < 0.3 else content


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def no_file(path: Path, rng: random.Random) -> None:
    """Puts something else than a file at `path`: a folder, a pipe, a device, a link."""
    if path.is_dir():
        return
    path.unlink(missing_ok=True)
    kind = rng.randrange(6)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.symlink_to(rng.choice(("/dev/zero", "/dev/full", "/dev/tty", "/dev/stdin")))
    elif kind == 3:
        path.symlink_to(path.name)  # to itself
    elif kind == 4:
        path.symlink_to("missing")
    else:
        path.write_bytes(b"")


def maybe_no_file(path: Path, rng: random.Random, share: float = 0.04) -> Path:
    if rng.random() < share:
        no_file(path, rng)
    return path
