"""Efficiencies of a chip fitted to measured parts."""

import csv
import math
from pathlib import Path

from vlm_jax.core.errors import UserError
from vlm_jax.sizing.chips import ASSUMED, Efficiency, chip

CALIBRATION = ("chip", "chips", "flops", "bytes", "secs")


def calibrate(path: str | Path) -> Efficiency:
    """Efficiencies from a CSV with columns chip, chips, flops, bytes, secs, one measured part per row.

    Each row is limited by compute or by memory; each efficiency is the geometric mean over its rows, for the split that
    fits best. An efficiency without rows keeps its default. Raises `UserError` for a bad row.
    """
    try:
        rows = list(csv.DictReader(Path(path).read_text(encoding="utf-8-sig").splitlines()))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read: {error}") from error
    if not rows or any(name not in rows[0] for name in CALIBRATION):
        raise UserError(f"{path}: expected a header {','.join(CALIBRATION)} and at least one row")
    shares = [_shares(row, f"{path}:{number}") for number, row in enumerate(rows, start=2)]
    shares.sort(key=lambda share: share[1] / share[0])  # the most compute-bound first
    fits = [
        Efficiency(
            _mean([compute for compute, _ in shares[:count]], ASSUMED.compute),
            _mean([memory for _, memory in shares[count:]], ASSUMED.bandwidth),
        )
        for count in range(len(shares) + 1)
    ]
    return min(fits, key=lambda fit: sum(math.log(max(c / fit.compute, m / fit.bandwidth)) ** 2 for c, m in shares))


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


def _mean(values: list[float], default: float) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else default
