"""Fits the error law to result rows: `python -m vlm_jax.fit_law --rows FILE --out law.json`.

Prints the law of each family with its warnings, whether it fits its rows and predicts the largest LLM from the others,
and writes it to `law.json` (format: `scaling.fitted`).
"""

import math
from pathlib import Path

from vlm_jax.cli import ArgumentParser, run_main
from vlm_jax.core.errors import UserError

MAX_BOOTSTRAPS = 100_000


def parser() -> ArgumentParser:
    flags = ArgumentParser(prog="python -m vlm_jax.fit_law", description=__doc__)
    flags.add_argument("--rows", required=True, help="result rows (.jsonl) or a table of scores (.csv)")
    flags.add_argument("--out", required=True, help="where to write law.json")
    flags.add_argument("--family", help="one family only")
    flags.add_argument("--form", default="auto", help="auto, or one form: multiplicative, additive-free, semilog, ...")
    flags.add_argument("--loss", default="squared", help="squared (the paper's), or log: Huber on the log of the error")
    flags.add_argument("--floor", default="none", help="blind: scores relative to the blind baseline of the same size")
    flags.add_argument("--weights", default="equal", help="stderr: each row by the inverse of its squared stderr")
    flags.add_argument("--fixed-d", type=float, default=0.0, help="D of the -fixed forms")
    flags.add_argument("--bootstraps", type=int, default=1000)
    flags.add_argument("--intervals", default="chosen", help="all: of every form, not only the chosen one; slower")
    flags.add_argument("--seed", type=int, default=0)
    return flags


def main(argv: list[str]) -> int:
    """Fits the rows, writes the law and prints it."""
    flags = parser().parse_args(argv)
    if not 20 <= flags.bootstraps <= MAX_BOOTSTRAPS:
        raise UserError(f"--bootstraps: expected 20 or more, up to {MAX_BOOTSTRAPS:,}, got {flags.bootstraps}")
    if flags.seed < 0:
        raise UserError(f"--seed: expected 0 or more, got {flags.seed}")
    if not math.isfinite(flags.fixed_d):
        raise UserError(f"--fixed-d: expected a finite number, got {flags.fixed_d}")
    if Path(flags.out).is_dir():
        raise UserError(f"--out: expected a file, got the folder {flags.out}")

    from vlm_jax.core.located import located
    from vlm_jax.scaling import fit, lawfile, report, scores

    rows = scores.read(located(flags.rows))
    with report.progress(fit.stages(rows, flags.form, flags.family)) as progress:
        law = fit.fit(
            rows, flags.form, family=flags.family, loss=flags.loss, floor=flags.floor, fixed_floor=flags.fixed_d,
            bootstraps=flags.bootstraps, seed=flags.seed, source=Path(flags.rows).name,
            weights=flags.weights, interval=flags.intervals, progress=progress,
        )  # fmt: skip
    lawfile.write(flags.out, law)
    report.print_law(law, report.console())
    print(f"wrote {flags.out}")
    return 0


if __name__ == "__main__":
    run_main(main)
