"""Measured differences between compressors at equal V, for planners that want them: the law itself knows N and V only.

They come from one LLM and one recipe; adding them to another's error is an assumption, which the planner says.
"""

import csv
from pathlib import Path

from vlm_jax.core.errors import UserError

MME_POINTS = 2000  # the most that MME's perception part gives


def read(path: str | Path, reference: str = "tokenpacker") -> dict[tuple[str, int], float]:
    """Measured differences in error of compressors from `reference` at the same V: {(compressor, V): error difference}.

    The file is a CSV `method,visual_tokens,<benchmark>,...` of scores in percent; every benchmark that both methods
    have counts the same, MME (which counts points) as a share. Positive means worse than the reference.
    """
    try:
        rows = list(csv.DictReader(Path(path).read_text().splitlines()))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if not rows or {"method", "visual_tokens"} - set(rows[0]):
        raise UserError(f"{path}: needs a header method,visual_tokens,<benchmark>,... and at least one row")
    scores: dict[tuple[str, int], dict[str, float]] = {}
    for number, row in enumerate(rows, start=2):
        try:
            key = (row["method"].lower(), int(row["visual_tokens"]))
            given = {name: float(v) for name, v in row.items() if name not in ("method", "visual_tokens") and v}
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path}:{number}: {error}; scores are numbers, an empty field is not measured") from error
        scores[key] = {name: v / MME_POINTS if name == "mme" else v / 100 for name, v in given.items()}
    out = {}
    for (method, tokens), given in scores.items():
        base = scores.get((reference, tokens), {})
        if shared := sorted(set(given) & set(base)):
            out[method, tokens] = sum(base[name] - given[name] for name in shared) / len(shared)
    if not out:
        raise UserError(f"{path}: no row of {reference!r} to compare with")
    return out
