"""Efficiencies of a chip fitted to measured parts."""

import math
from pathlib import Path

from vlm_jax.core.errors import UserError
from vlm_jax.core.reading import read_csv
from vlm_jax.sizing.chips import ASSUMED, Efficiency, chip

CALIBRATION = ("chip", "chips", "flops", "bytes", "secs")
_LARGEST = 1e100


def calibrate(path: str | Path) -> Efficiency:
    """Efficiencies from a CSV with columns chip, chips, flops, bytes, secs, one measured part per row.

    Each row is limited by compute or by memory; each efficiency is the geometric mean over its rows, for the split that
    fits best. An efficiency without rows keeps its default. Raises `UserError` for a bad row.
    """
    rows = read_csv(path, CALIBRATION)
    if not rows:
        raise UserError(f"{path}: expected a header {','.join(CALIBRATION)} and at least one row")
    shares = [_shares(row, where) for where, row in rows]
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
    if not (1 <= chips < _LARGEST and all(1 / _LARGEST < value < _LARGEST for value in (flops, moved, secs))):
        raise UserError(
            f"{where}: expected {','.join(CALIBRATION[1:])} above 0, got {chips:g},{flops:g},{moved:g},{secs:g}"
        )
    try:
        on = chip(row["chip"])
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    compute, memory = flops / (on.peak_flops * chips * secs), moved / (on.bandwidth * chips * secs)
    if max(compute, memory) > 1:
        raise UserError(f"{where}: expected at most the peak of {on.name}, got more (check flops, bytes and secs)")
    return compute, memory


def _mean(values: list[float], default: float) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else default
