"""A user's mistake, and a run that ends early in good order, told in one line.

Library code raises `UserError` where the *input* is wrong (a name, a file, a field); the doors turn it into one line
on stderr and exit code 2. `Ended` brings its own code. Any other exception is a defect of ours and keeps its traceback.
"""

import argparse
import difflib
import functools
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn

# Exit codes of a run that did not finish. Where one says so, the same command goes on.
LOST = 3  # another process of the run is gone; goes on
BAD_STEP = 4  # a loss or a gradient was not finite, or too many updates were skipped
STOPPED = 143  # SIGTERM: saved, or nothing to save; goes on. As a shell reports SIGTERM
CODES = f"""exit codes:
  0    done
  2    bad input, a disk that is full or read-only, no sound checkpoint: one line says which
  {LOST}    another process was lost; the same command, in all processes, goes on
  {BAD_STEP}    stopped at a bad step (bad_step.policy): see WORKDIR/bad_step
  {STOPPED}  stopped by SIGTERM and saved; the same command goes on"""


class UserError(Exception):
    """Bad input. The message names the file, field or row, and the fix."""


class Ended(Exception):
    """A run that ends before its time, in good order. The message says why, `code` is what the door exits with."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def unknown(kind: str, name: object, valid: Iterable[object], cutoff: float = 0.5) -> UserError:
    """`unknown("decoder", "d47", names)` -> the error that suggests the nearest valid name, if one is as similar as
    `cutoff` (difflib's ratio, 0 to 1).
    """
    valid = sorted(map(str, valid))
    near = difflib.get_close_matches(str(name), valid, n=1, cutoff=cutoff)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UserError(f"unknown {kind} {name!r}: {hint}valid: {', '.join(valid)}")


def door(main: Callable[[list[str]], int | None]) -> Callable[[], None]:
    """Wraps the `main(argv)` of a command: a `UserError` becomes one line and exit code 2, Ctrl-C becomes 130."""

    @functools.wraps(main)
    def run() -> None:
        try:
            code = main(sys.argv[1:])
        except UserError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            code = 2
        except Ended as ended:
            print(f"stopped: {' '.join(str(ended).split())}", file=sys.stderr)
            code = ended.code
        except KeyboardInterrupt:
            code = 130
        sys.exit(code or 0)

    return run


class Flags(argparse.ArgumentParser):
    """A parser whose complaints are `UserError`s: one line, and exit code 2 from the door."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")
