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
from vlm_jax.core.specs import spec_hash, total_steps
from vlm_jax.store import results

# Events have the process's stdout for themselves: whatever else is printed, by libraries too, goes to the log.
_EVENTS = os.dup(1)


def say(event: str, **values: Any) -> None:
    """One event to the launcher; `os.write` keeps a line whole between threads."""
    os.write(_EVENTS, (json.dumps({"event": event, **values}) + "\n").encode())


def run_cell(name: str, location: str, workdir: Path) -> None:
    """Trains (or resumes) and evaluates one cell, and appends its row."""
    from vlm_jax import build

    spec = resolve(load_config(location))
    folder = workdir / "cells" / name
    run = build.open_run(spec, build.default_cache())
    steps = total_steps(spec)
    params = build.train(run, folder, lambda log, values: say("step", cell=name, share=0.95 * log.step / steps))
    row = build.evaluate(run, params, name, folder)
    results.append(workdir / "rows.jsonl", row)
    say("done", cell=name, error=row.error, stderr=row.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--grid", required=True)
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--skip", nargs="*", default=[], help="cells that failed before")
    args = parser.parse_args()

    os.dup2(2, 1)

    from vlm_jax import build

    build.use_compilation_cache(build.default_cache())
    grid = load_grid(args.grid)
    for cell in grid.cells:
        name = cell_name(cell)
        location = f"{grid.config}:{name}"
        if name in args.skip:
            continue
        folder = args.workdir / "cells" / name
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            if spec_hash(resolve(load_config(location))) in results.done(args.workdir / "rows.jsonl"):
                continue
            say("start", cell=name)
            try:
                run_cell(name, location, args.workdir)
            except Exception:
                (folder / "error.txt").write_text(traceback.format_exc())
                say("failed", cell=name)
    # Without waiting for threads: a save that failed leaves Orbax's waiting for signals that no longer come.
    os._exit(0)


if __name__ == "__main__":
    main()
