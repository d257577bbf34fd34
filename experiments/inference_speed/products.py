"""What two choices of ours are worth on this CPU, product by product: `python -m experiments.inference_speed.products`.

One row times a kernel that lies in memory, in groups (`ops/one_row.py`) beside XLA's own product; and many rows, by
the compiler options that loaded models read prompts with (`inference/sampling.py`) beside XLA's own choice. A product
goes through several kernels in turn, one row through more than a cache holds; both sides are measured by turns, on one
core.
Writes the table `products` in README.md.
"""

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.inference_speed import measuring
from experiments.readme import write_block
from experiments.report import markdown_table
from vlm_jax.cli import ArgumentParser, run_main

KERNELS = ((896, 896), (896, 4864), (4864, 896), (2048, 2048), (2048, 16384), (16384, 2048))
ONE, MANY = (1,), (256, 2048)
_BYTES_OF_ONE, _BYTES_OF_MANY = 1e9, 1e8  # of all kernels of a shape together; many rows give results as large


def main(argv: list[str]) -> None:
    parser = ArgumentParser(
        prog="python -m experiments.inference_speed.products",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--pairs", type=int, default=5, help="measurements of each side")
    args = parser.parse_args(argv)
    measuring.use_cores(1)
    lines = [["rows", "kernel", "XLA's own", "ours", "unit", "ratio"]]
    for rows in (*ONE, *MANY):
        for kernel in KERNELS:
            lines.append(line(rows, kernel, args.pairs))
            print(*lines[-1], flush=True)
    import jax

    text = f"{markdown_table(lines)}\n\nfloat32, one core of {measuring.cpu_name()}, jax {jax.__version__}"
    write_block(measuring.HERE / "README.md", "products", text, "experiments.inference_speed.products")


def line(rows: int, shape: tuple[int, int], pairs: int) -> list[str]:
    """Of one row the speed at which kernels are read; of many that of arithmetic."""
    import jax

    from vlm_jax.inference.sampling import compiler_options
    from vlm_jax.ops import one_row

    inner, outer = shape
    size = _BYTES_OF_ONE if rows in ONE else _BYTES_OF_MANY
    rng, count = np.random.default_rng(rows), max(2, int(size / (4 * inner * outer)))
    kernels = [jax.device_put(rng.standard_normal(shape, np.float32)) for _ in range(count)]
    x = jax.device_put(rng.standard_normal((rows, inner), np.float32))
    if rows in ONE:
        work, unit = 4 * inner * outer * count / 1e9, "GB/s"
        ours = jax.jit(lambda x, kernels: [one_row.contract(x, kernel, 1) for kernel in kernels])
    else:
        work, unit = 2 * rows * inner * outer * count / 1e9, "GFLOP/s"
        ours = jax.jit(lambda x, kernels: [x @ kernel for kernel in kernels], compiler_options=compiler_options("cpu"))
    own = jax.jit(lambda x, kernels: [x @ kernel for kernel in kernels])
    times = by_turns([lambda run=run: jax.block_until_ready(run(x, kernels)) for run in (own, ours)], pairs)
    ratio = np.median(times[0] / times[1])
    speeds = [f"{work / np.median(side):.1f}" for side in times]
    return [str(rows), f"{inner} x {outer}", *speeds, unit, f"{ratio:.2f}"]


def by_turns(sides: list[Callable[[], Any]], pairs: int) -> np.ndarray:
    """Seconds of the processor [side, pair], behind one run of each that counts for nothing."""
    for run in sides:
        run()
    return np.array([[measuring.timed(lambda _, run=run: run(), 0, 1) for run in sides] for _ in range(pairs)]).T


if __name__ == "__main__":
    run_main(main)
