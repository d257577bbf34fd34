"""Measured differences in error between compressors at equal V, which a plan may add to the law's prediction.

They come from one LLM and one recipe; applying them to others is an assumption, which the plan notes.
"""

from pathlib import Path

from vlm_jax.core.errors import UserError
from vlm_jax.core.reading import read_csv

MME_POINTS = 2000  # maximum of MME's perception part


def read(path: str | Path, reference: str = "tokenpacker") -> dict[tuple[str, int], float]:
    """Mean error difference from `reference` at the same V, by (compressor, V). Positive is worse than the reference.

    The file is a CSV `method,visual_tokens,<benchmark>,...` of scores in percent (MME in points); the mean is over the
    benchmarks that both methods have.
    """
    rows = read_csv(path, ("method", "visual_tokens"))
    if not rows:
        raise UserError(f"{path}: expected a header method,visual_tokens,<benchmark>,... and at least one row")
    scores: dict[tuple[str, int], dict[str, float]] = {}
    for where, row in rows:
        try:
            key = (row["method"].lower(), int(row["visual_tokens"]))
            given = {name: float(v) for name, v in row.items() if name not in ("method", "visual_tokens") and v}
        except ValueError as error:
            raise UserError(f"{where}: expected numbers or empty fields, got {error}") from error
        if not all(abs(value) <= MME_POINTS for value in given.values()):
            raise UserError(f"{where}: expected scores of at most {MME_POINTS}, got {max(given.values())}")
        scores[key] = {name: v / MME_POINTS if name == "mme" else v / 100 for name, v in given.items()}
    out = {}
    for (method, tokens), given in scores.items():
        base = scores.get((reference, tokens), {})
        if shared := sorted(set(given) & set(base)):
            out[method, tokens] = sum(base[name] - given[name] for name in shared) / len(shared)
    if not out:
        raise UserError(f"{path}: expected rows of {reference!r} at the V of other methods, got none")
    return out
