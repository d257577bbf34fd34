"""A worker of a local launch: runs unlocked cells one after the other. What is printed goes to the cell's
`log.txt`. Started by `experiments.launching.local`, which watches the files of the cells.
"""

import argparse
import os
import signal
import traceback
from pathlib import Path

from experiments.launching import states
from experiments.launching.attempt import attempt
from experiments.launching.cells import cells_of, rows_of
from vlm_jax.core.errors import STOPPED, RunStopped
from vlm_jax.distributed import processes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--grid", required=True)
    parser.add_argument("--workdir", required=True, type=Path)
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher handles Ctrl-C and sends SIGTERM
    stop = processes.watch_sigterm()
    for cell in cells_of(args.grid, args.workdir):
        with states.try_lock(cell) as mine:
            # The launcher removed what earlier launches left, so an error here is one of this launch.
            if not mine or states.error_of(cell) or cell.is_done(rows_of([cell], args.workdir)):
                continue
            log = os.open(cell.folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.close(log)
            try:
                attempt(cell, states.reporter(cell), stop)
            except RunStopped as ended:
                if ended.code == STOPPED:
                    os._exit(STOPPED)
            except Exception:
                traceback.print_exc()
    # Without waiting for threads: a save that failed leaves Orbax's waiting for signals that no longer come.
    os._exit(0)


if __name__ == "__main__":
    main()
