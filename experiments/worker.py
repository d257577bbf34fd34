"""A worker of a launch: takes the cells that nobody has taken, one after the other, and says on stdout what it does.

A cell is taken by locking a file in its folder. The lock is the operating system's, so it is gone the moment the
worker is, however it ends; a cell whose row exists is done. Started by `experiments.launch`, which reads the events:
one JSON object a line.
"""

import argparse
import fcntl
import json
import os
import traceback
from pathlib import Path
from typing import Any

from vlm_jax.config.arguments import load_config
from vlm_jax.config.resolve import resolve
from vlm_jax.config.sweep import cell_name, load_grid
from vlm_jax.core.specs import RunSpec, spec_hash, total_steps
from vlm_jax.store import results

_EVENTS = 3  # a descriptor of its own: whatever is printed, by libraries too, goes to the log


def say(event: str, **values: Any) -> None:
    """One event to the launcher; `os.write` keeps a line whole between threads."""
    os.write(_EVENTS, (json.dumps({"event": event, **values}) + "\n").encode())


def run_cell(name: str, spec: RunSpec, workdir: Path) -> None:
    """Trains (or resumes) and evaluates one cell, and appends its row."""
    from vlm_jax import build, job

    folder = workdir / "cells" / name
    run = build.open_run(spec, build.default_cache())
    steps = total_steps(spec)
    params = job.train(run, folder, lambda log, values: say("step", cell=name, share=0.95 * log.step / steps))
    row = job.evaluate(run, params, name, folder)
    results.append(workdir / "rows.jsonl", row)
    say("done", cell=name, error=row.error, stderr=row.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--grid", required=True)
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument(
        "--since", required=True, type=float, help="start of the launch; what failed later is left alone"
    )
    args = parser.parse_args()

    os.dup2(1, _EVENTS)
    os.dup2(2, 1)

    from vlm_jax import build

    build.use_compilation_cache(build.default_cache())
    grid = load_grid(args.grid)
    for cell in grid.cells:
        name = cell_name(cell)
        spec = resolve(load_config(f"{grid.config}:{name}"))
        folder = args.workdir / "cells" / name
        folder.mkdir(parents=True, exist_ok=True)
        error = folder / "error.txt"
        with open(folder / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            if spec_hash(spec) in results.done(args.workdir / "rows.jsonl"):
                continue
            if error.exists() and error.stat().st_mtime >= args.since:
                continue
            error.unlink(missing_ok=True)
            say("start", cell=name)
            try:
                run_cell(name, spec, args.workdir)
            except Exception:
                error.write_text(traceback.format_exc())
                say("failed", cell=name)
    # Without waiting for threads: a save that failed leaves Orbax's waiting for signals that no longer come.
    os._exit(0)


if __name__ == "__main__":
    main()
