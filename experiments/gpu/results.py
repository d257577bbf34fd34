"""Rows of results.jsonl: a JSON object a line, appended as soon as it is measured.

    {"part": "training", "name": "qwen1.5-0.5b, V = 16, 8 rows, remat dots", "device": "NVIDIA H100 80GB HBM3",
     "jax": "0.10.2", "step_secs": ..., "mfu": ...}

A case that failed has "error" in place of values, and is measured again by the next run. A train step that does not fit
into memory has "fits": false, which is a result.
"""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.inference_speed.measuring import Row
from vlm_jax.core.files import write_text
from vlm_jax.core.reading import read_text


class Results(NamedTuple):
    """The file, and what every row of this run records."""

    path: Path
    device: str  # device_kind
    jax: str  # version

    def add(self, part: str, name: str, **values: Any) -> Row:
        """Appends a row and flushes it to disk."""
        row = {"part": part, "name": name, "device": self.device, "jax": self.jax, **_finite(values)}
        append(self.path, row)
        return row

    def forget(self, part: str) -> None:
        """Removes the rows of a part on this device."""
        kept = [row for row in read(self.path) if (row["part"], row["device"]) != (part, self.device)]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def rows(self, part: str) -> dict[str, Row]:
        """The newest row of each case of a part on this device, by name."""
        mine = (row for row in read(self.path) if (row["part"], row["device"]) == (part, self.device))
        return {row["name"]: row for row in mine}

    def measured(self, part: str) -> dict[str, Row]:
        """Those of `rows` without an error."""
        return {name: row for name, row in self.rows(part).items() if "error" not in row}


def append(path: Path, row: Row) -> None:
    """Adds a line, after the end of a line that a killed run may have left unfinished."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cut = path.is_file() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
    with open(path, "a", encoding="utf-8") as file:
        file.write("\n" * cut + json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[Row]:
    """All complete rows, oldest first; none without a file."""
    if not path.is_file():
        return []
    rows = []
    for line in read_text(path).splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # a killed run ended within a line
            continue
        if isinstance(row, dict) and {"part", "name", "device"} <= set(row):
            rows.append(row)
    return rows


def newest(rows: Sequence[Row]) -> list[Row]:
    """The newest row of each part, case and device. A process that failed counts until its part has a later row."""
    found = {(row["part"], row["name"], row["device"]): row for row in rows}
    last = {row["part"]: row for row in rows}
    return [row for row in found.values() if row["name"] != "process" or last[row["part"]] is row]


def devices(rows: Sequence[Row]) -> list[str]:
    """The devices of the rows, in the order of their first row."""
    return list(dict.fromkeys(row["device"] for row in rows if row["device"]))


def _finite(value: Any) -> Any:
    """The value with text in place of numbers that JSON lacks."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
