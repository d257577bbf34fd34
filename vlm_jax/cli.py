"""What every command shares: a parser whose errors are one line, and the exit codes."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from vlm_jax.core.errors import BAD_STEP, LOST, STOPPED, RunStopped, UserError

EXIT_CODES = f"""exit codes:
  0    done
  2    bad input, a disk that is full or read-only, no intact checkpoint: one line says which
  {LOST}    another process was lost; the same command, in all processes, resumes
  {BAD_STEP}    stopped at a bad step (bad_step.policy): see WORKDIR/bad_step
  {STOPPED}  stopped by SIGTERM and saved; the same command resumes"""


class ArgumentParser(argparse.ArgumentParser):
    """Raises `UserError` where argparse prints its usage and exits."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def run_main(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Calls `main(argv)` and exits with what it returns. A `UserError` is one line and exit code 2, Ctrl-C is 130."""
    try:
        code = main(sys.argv[1:])
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    except RunStopped as stop:
        print(f"stopped: {' '.join(str(stop).split())}", file=sys.stderr)
        code = stop.code
    except KeyboardInterrupt:
        code = 130
    sys.exit(code or 0)
