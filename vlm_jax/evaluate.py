"""Score a trained run and append its typed row: `python -m vlm_jax.evaluate --workdir workdirs/one`."""

import dataclasses
import json
from pathlib import Path

from vlm_jax.core.errors import Flags, door


def main(argv: list[str]) -> None:
    from vlm_jax.config.resolve import spec_from_dict
    from vlm_jax.store import results
    from vlm_jax.store.checkpoint import read_spec

    parser = Flags(prog="python -m vlm_jax.evaluate", description=__doc__, allow_abbrev=False)
    parser.add_argument("--workdir", required=True, type=Path, help="a folder that vlm_jax.train made")
    parser.add_argument("--rows", type=Path, help="append the row here (default: WORKDIR/rows.jsonl)")
    args = parser.parse_args(argv)
    rows = args.rows or args.workdir / "rows.jsonl"
    spec = spec_from_dict(read_spec(args.workdir))
    done = results.done(rows)

    from rich.progress import track

    from vlm_jax import build, job

    cache = build.default_cache()
    build.use_compilation_cache(cache)
    run = build.open_run(spec, cache)
    params = job.restore(run.network, args.workdir)
    with_progress = iter(track(range(job.evaluation_batches(run)), description="evaluating", transient=True))
    row = job.evaluate(run, params, args.workdir.name, args.workdir, lambda rows: next(with_progress, None))
    if row.spec_hash not in done:
        results.append(rows, row)
    print(json.dumps(dataclasses.asdict(row), indent=1))


if __name__ == "__main__":
    door(main)()
