"""How long a fit takes, against the search that the paper describes, on the 28 reasoning scores.

    python -m experiments.published_law.benchmark

The search: squared error at a random 20 % of a grid of 5,000,000 points over (A, alpha, beta, D); the best point wins
(arXiv 2411.03312; the grid's bounds are not published, those below are ours). It is written twice: as plain loops
over points, which is how a script does it, timed on a sample and extrapolated; and vectorised over points and cells,
so that the comparison is fair. Against it: one full fit of the same form (multi-start variable projection), and 1,000
bootstraps of it. Writes benchmark.json.
"""

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments.flags import whole
from experiments.inference_speed.measuring import cpu_name
from vlm_jax.cli import ArgumentParser, run_main
from vlm_jax.scaling import intervals, laws, scores, solve

HERE = Path(__file__).parent
GRID = {"A": (0.05, 1.0, 50), "alpha": (0.0, 0.25, 50), "beta": (0.0, 0.1, 50), "D": (0.0, 0.45, 40)}
SHARE = 0.2
LOOP_SAMPLE = 20_000
BOOTSTRAPS = 1000
CHUNK = 20_000


def main(argv: list[str]) -> int:
    parser = ArgumentParser(prog="python -m experiments.published_law.benchmark", description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "benchmark.json")
    parser.add_argument("--repeats", type=whole(1), default=5, help="of the fit; the median counts")
    args = parser.parse_args(argv)
    cells = scores.read(HERE / "published_scores.csv").of("reasoning").cells
    params, tokens, error = (
        np.array([getattr(c, field) for c in cells], float) for field in ("params", "tokens", "error")
    )
    points = sample(np.random.default_rng(0))

    loop_secs, _ = timed(lambda: search_by_loops(points[:LOOP_SAMPLE], params, tokens, error))
    vector_secs, vector_sse = timed(lambda: search_vectorised(points, params, tokens, error))
    of = solve.problem(laws.form("multiplicative"), params, tokens, error, np.ones_like(error), "squared")
    fits = sorted(timed(lambda: solve.solve(of, seed=0)) for _ in range(args.repeats))
    fit_secs, found = fits[len(fits) // 2]
    predicted = laws.predict("multiplicative", {k: v[0] for k, v in solve.named(of, found).items()}, params, tokens)
    cell = np.arange(len(error), dtype=float)
    boot_secs, _ = timed(lambda: intervals.bootstrap(of, found, predicted, cell, BOOTSTRAPS, 0))

    loop_secs *= len(points) / LOOP_SAMPLE
    result = {
        "points": len(points),
        "loop_secs": round(loop_secs, 1),
        "vectorised_secs": round(vector_secs, 2),
        "search_sse": float(f"{vector_sse:.4g}"),
        "fit_ms": round(fit_secs * 1e3, 1),
        "fit_sse": float(f"{found.cost[0]:.4g}"),
        "bootstraps": BOOTSTRAPS,
        "bootstrap_secs": round(boot_secs, 2),
        "times_faster_than_loops": round(loop_secs / fit_secs),
        "times_faster_than_vectorised": round(vector_secs / fit_secs),
        "load": round(os.getloadavg()[0], 1),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
    }
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    for name, value in result.items():
        print(f"{name:>28}  {value}")
    return 0


def timed(run: Callable[[], object]) -> tuple[float, object]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def sample(rng: np.random.Generator) -> np.ndarray:
    """[points, 4]: a random share of the grid."""
    axes = [np.linspace(*bounds) for bounds in GRID.values()]
    size = int(np.prod([len(axis) for axis in axes]))
    chosen = rng.choice(size, int(size * SHARE), replace=False)
    index = np.unravel_index(chosen, [len(axis) for axis in axes])
    return np.stack([axis[i] for axis, i in zip(axes, index, strict=True)], axis=1)


def search_by_loops(points: np.ndarray, params: np.ndarray, tokens: np.ndarray, error: np.ndarray) -> float:
    """The least squared error, one point at a time."""
    best = np.inf
    for a, alpha, beta, d in points:
        best = min(best, float(np.sum((a * params**-alpha * tokens**-beta + d - error) ** 2)))
    return best


def search_vectorised(points: np.ndarray, params: np.ndarray, tokens: np.ndarray, error: np.ndarray) -> float:
    """The same over chunks of points at once."""
    log_params, log_tokens, best = np.log(params), np.log(tokens), np.inf
    for start in range(0, len(points), CHUNK):
        a, alpha, beta, d = points[start : start + CHUNK, :, None].swapaxes(0, 1)
        miss = a * np.exp(-alpha * log_params - beta * log_tokens) + d - error
        best = min(best, float(np.einsum("pc,pc->p", miss, miss).min()))
    return best


if __name__ == "__main__":
    run_main(main)
