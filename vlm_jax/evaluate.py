"""Evaluate a trained run and append its result row: `python -m vlm_jax.evaluate --workdir workdirs/one`."""

import dataclasses
import json
from pathlib import Path

from vlm_jax.cli import EXIT_CODES, make_parser, run_main


def main(argv: list[str]) -> None:
    from vlm_jax.distributed import processes

    parser = make_parser("evaluate", __doc__, EXIT_CODES)
    parser.add_argument("--workdir", required=True, type=Path, help="the workdir of vlm_jax.train")
    parser.add_argument("--rows", type=Path, help="append the row here (default: WORKDIR/rows.jsonl)")
    processes.add_flags(parser)
    args = parser.parse_args(argv)
    with processes.init_distributed(args):
        _evaluate(args.workdir, args.rows or args.workdir / "rows.jsonl")


def _evaluate(workdir: Path, rows: Path) -> None:
    from rich.progress import track

    from vlm_jax import build, job
    from vlm_jax.checkpoints.orbax import read_spec
    from vlm_jax.config.resolve import spec_from_dict
    from vlm_jax.core.specs import spec_hash, total_steps
    from vlm_jax.distributed import processes
    from vlm_jax.evaluation import results

    spec = spec_from_dict(read_spec(workdir))
    done = results.done(rows)
    if processes.is_primary() and spec_hash(spec) not in done:  # fail before evaluating
        results.check_writable(rows)
    cache = build.default_cache()
    build.use_compilation_cache(cache)
    run = build.open_run(spec, cache)
    params = job.restore(run.network, workdir, least_step=total_steps(spec))
    batches = range(job.evaluation_batches(run))
    progress = iter(track(batches, description="evaluating", transient=True, disable=not processes.is_primary()))
    row = job.evaluate(run, params, workdir.name, workdir, lambda rows: next(progress, None))
    if not processes.is_primary():
        return
    if row.spec_hash not in done:
        results.append(rows, row)
    print(json.dumps(dataclasses.asdict(row), indent=1))


if __name__ == "__main__":
    run_main(main)
