"""Shared by all commands: the argument parser, one-line errors and exit codes."""

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from vlm_jax.core import interrupts, text
from vlm_jax.core.errors import BAD_STEP, LOST, STOPPED, RunStopped, UserError

EXIT_CODES = f"""exit codes:
  0    done
  2    bad input, a disk that is full or read-only, no intact checkpoint: one line says which
  {LOST}    another process was lost; the same command, in all processes, resumes
  {BAD_STEP}    stopped at a bad step (bad_step.policy): see WORKDIR/bad_step
  {interrupts.INTERRUPTED}  stopped by Ctrl-C; the same command resumes from the newest checkpoint
  {STOPPED}  stopped by SIGTERM and saved; the same command resumes"""
_PIPE_CLOSED = 141  # as a shell reports SIGPIPE


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
    """Calls `main(argv)` and exits with its result; `UserError` is one line and exit code 2, Ctrl-C is one and 130.
    Standard output may be ASCII (other characters are escaped), closed or a full disk.
    """
    interrupts.exit_on_interrupt()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = main(sys.argv[1:])
        if sys.stdout is not None:
            sys.stdout.flush()
    except UserError as error:
        code = _fail("error", error, 2)
    except RunStopped as stop:
        code = _fail("stopped", stop, stop.code)
    except BrokenPipeError:
        code = _PIPE_CLOSED  # the reader of our output has what it wants
    except OSError as error:  # a disk, a permission, standard output
        code = _fail("error", f"{error.filename or 'output'}: {error.strerror or error}", 2)
    except KeyboardInterrupt:
        interrupts.exit_interrupted()
    _discard_output()
    sys.exit(code or 0)


def _fail(kind: str, message: object, code: int) -> int:
    """Prints one line and returns the exit code."""
    with contextlib.suppress(OSError, ValueError):  # stderr is full or closed
        print(f"{kind}: {text.one_line(message)}", file=sys.stderr, flush=True)
    return code


def _discard_output() -> None:
    """Where standard output cannot be written, its buffer goes to the null device: Python would print a traceback when
    it flushes the buffer at the end.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is None:
            continue
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
