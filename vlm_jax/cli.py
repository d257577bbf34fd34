"""Shared by all commands: the argument parser, one-line errors and exit codes."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from vlm_jax.core import interrupts
from vlm_jax.core.errors import BAD_STEP, LOST, STOPPED, RunStopped, UserError

EXIT_CODES = f"""exit codes:
  0    done
  2    bad input, a disk that is full or read-only, no intact checkpoint: one line says which
  {LOST}    another process was lost; the same command, in all processes, resumes
  {BAD_STEP}    stopped at a bad step (bad_step.policy): see WORKDIR/bad_step
  {interrupts.INTERRUPTED}  stopped by Ctrl-C; the same command resumes from the newest checkpoint
  {STOPPED}  stopped by SIGTERM and saved; the same command resumes"""


class ArgumentParser(argparse.ArgumentParser):
    """Raises `UserError` where argparse prints its usage and exits."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def make_parser(command: str, doc: str | None, epilog: str | None = None) -> ArgumentParser:
    """A parser without abbreviations that prints `doc` and `epilog` as they are."""
    return ArgumentParser(
        prog=f"python -m vlm_jax.{command}", description=doc, epilog=epilog, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip


def run_main(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Calls `main(argv)` and exits with its result; `UserError` is one line and exit code 2, Ctrl-C is one and 130."""
    interrupts.exit_on_interrupt()
    try:
        code = main(sys.argv[1:])
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    except RunStopped as stop:
        print(f"stopped: {' '.join(str(stop).split())}", file=sys.stderr)
        code = stop.code
    except KeyboardInterrupt:
        interrupts.exit_interrupted()
    sys.exit(code or 0)
