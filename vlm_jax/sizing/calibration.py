"""Efficiencies of a chip fitted to measured parts."""

import csv
import math
from pathlib import Path

from vlm_jax.core.errors import UserError
from vlm_jax.sizing.chips import Efficiency, chip

CALIBRATION = ("chip", "chips", "flops", "bytes", "secs")


def calibrate(path: str | Path) -> Efficiency:
    """Efficiencies from a CSV with columns chip, chips, flops, bytes, secs, one measured part per row.

    Each row is limited by compute or by memory; each efficiency is the geometric mean over its rows, found by
    alternating. An efficiency without rows keeps its default. Raises `UserError` for a bad row.
    """
    try:
        rows = list(csv.DictReader(Path(path).read_text().splitlines()))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read: {error}") from error
    if not rows or any(name not in rows[0] for name in CALIBRATION):
        raise UserError(f"{path}: expected a header {','.join(CALIBRATION)} and at least one row")
    shares = [_shares(row, f"{path}:{number}") for number, row in enumerate(rows, start=2)]
    best, best_miss = Efficiency(), math.inf
    for start in (Efficiency(), Efficiency(1, 1), Efficiency(0.1, 1), Efficiency(1, 0.1)):
        found = start
        for _ in range(50):
            by_compute = [c for c, m in shares if c / found.compute >= m / found.bandwidth]
            by_memory = [m for c, m in shares if c / found.compute < m / found.bandwidth]
            new = Efficiency(_mean(by_compute) or found.compute, _mean(by_memory) or found.bandwidth)
            if new == found:
                break
            found = new
        miss = sum(math.log(max(c / found.compute, m / found.bandwidth)) ** 2 for c, m in shares)
        if miss < best_miss:
            best, best_miss = found, miss
    return best


def _shares(row: dict[str, str], where: str) -> tuple[float, float]:
    """FLOPs and bytes of a row as shares of the chips' peaks."""
    try:
        chips, flops, moved, secs = (float(row[name]) for name in CALIBRATION[1:])
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: expected numbers in {','.join(CALIBRATION[1:])}, got {error}") from error
    if not (chips >= 1 and flops > 0 and moved > 0 and secs > 0):
        raise UserError(
            f"{where}: expected {','.join(CALIBRATION[1:])} above 0, got {chips:g},{flops:g},{moved:g},{secs:g}"
        )
    on = chip(row["chip"])
    compute, memory = flops / (on.peak_flops * chips * secs), moved / (on.bandwidth * chips * secs)
    if max(compute, memory) > 1:
        raise UserError(f"{where}: expected at most the peak of {on.name}, got more (check flops, bytes and secs)")
    return compute, memory


def _mean(values: list[float]) -> float | None:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None
