"""Output embedding and loss beside the plain formula: `python -m experiments.training_speed.loss`.

Value and gradients of `ops.cross_entropy.weighted_nll`, and of `log_softmax` over the logits of all positions, on the
same drawn states, in turn; processor time, without compilation, and the bytes that each program holds beside its
arguments and results. `share` is that of the positions with weight. Renews loss.json and the table of README.md.
"""

import functools
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.flags import real, whole
from experiments.inference_speed.measuring import cpu_name
from experiments.readme import write_block
from experiments.report import markdown_table
from vlm_jax.cli import ArgumentParser, run_main
from vlm_jax.core.errors import UserError
from vlm_jax.ops.cross_entropy import weighted_nll

HERE = Path(__file__).parent
ROWS = 4


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="python -m experiments.training_speed.loss", description=__doc__)
    parser.add_argument("--words", type=whole(1), nargs="+", default=[32_000, 257_152])
    parser.add_argument("--shares", type=real(0, 1), nargs="+", default=[1.0, 0.2])
    parser.add_argument("--width", type=whole(1), default=256)
    parser.add_argument("--positions", type=whole(ROWS), default=512, help=f"a multiple of {ROWS}")
    parser.add_argument("--pairs", type=whole(1), default=5)
    args = parser.parse_args(argv)
    if args.positions % ROWS:
        raise UserError(f"--positions: expected a multiple of {ROWS}, got {args.positions}")
    cases = [(words, share) for words in args.words for share in args.shares]
    rows = [measure(words, args.width, args.positions, share, args.pairs) for words, share in cases]
    settings = {name: getattr(args, name) for name in ("width", "positions", "pairs")}
    result = {**settings, "load": round(os.getloadavg()[0], 1), "cpu": cpu_name(), "rows": rows}
    print(json.dumps(result, indent=1))
    (HERE / "loss.json").write_text(json.dumps(result, indent=1) + "\n")
    write_block(HERE / "README.md", "loss", table(result), "experiments.training_speed.loss")


def measure(words: int, width: int, positions: int, share: float, pairs: int) -> dict[str, Any]:
    """Seconds and MB of both sides, and the ratios ours / plain of the pairs, in ascending order."""
    rng = np.random.default_rng(0)
    states = jnp.asarray(rng.standard_normal((ROWS, positions // ROWS, width)), jnp.float32)
    head = jnp.asarray(rng.standard_normal((words, width)) * width**-0.5, jnp.float32)
    targets = jnp.asarray(rng.integers(0, words, states.shape[:2]), jnp.int32)
    weight = jnp.asarray(rng.random(states.shape[:2]) < share, jnp.float32)
    sides = {}
    for name, total in (("ours", ours), ("plain", plain)):
        function = jax.value_and_grad(functools.partial(total, targets=targets, weight=weight), argnums=(0, 1))
        sides[name] = jax.jit(function).lower(states, head).compile()
    for a, b in zip(*(jax.tree.leaves(program(states, head)) for program in sides.values()), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(pairs):
        for name, program in sides.items():
            start = time.process_time()
            jax.block_until_ready(program(states, head))
            times[name].append(time.process_time() - start)
    out: dict[str, Any] = {"words": words, "share": share}
    for name, program in sides.items():
        out[f"{name}_secs"] = round(statistics.median(times[name]), 3)
        out[f"{name}_mb"] = round(program.memory_analysis().temp_size_in_bytes / 1e6)
    return out | {"ratio": sorted(round(a / b, 2) for a, b in zip(times["ours"], times["plain"], strict=True))}


def ours(states: jax.Array, table: jax.Array, targets: jax.Array, weight: jax.Array) -> jax.Array:
    return weighted_nll(states, table, None, targets, weight).total


def plain(states: jax.Array, table: jax.Array, targets: jax.Array, weight: jax.Array) -> jax.Array:
    log_p = jax.nn.log_softmax(jnp.einsum("bld,wd->blw", states, table))
    return -jnp.sum(jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0] * weight)


def table(result: dict[str, Any]) -> str:
    lines = [["vocabulary", "positions with weight", "seconds", "plain", "ratio (min / median / max)", "MB", "plain"]]
    for row in result["rows"]:
        low, middle, high = row["ratio"][0], statistics.median(row["ratio"]), row["ratio"][-1]
        spread = f"{low:.2f} / **{middle:.2f}** / {high:.2f}"
        cells = [f"{row['words']:,}", f"{row['share']:.0%}", f"{row['ours_secs']:.2f}", f"{row['plain_secs']:.2f}"]
        lines.append([*cells, spread, str(row["ours_mb"]), str(row["plain_mb"])])
    text = (
        f"{result['positions']} positions, width {result['width']}, float32, {result['pairs']} pairs; load average "
        f"{result['load']}, {result['cpu']}."
    )
    return f"{markdown_table(lines)}\n\n{text}"


if __name__ == "__main__":
    run_main(main)
