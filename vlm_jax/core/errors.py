"""A user's mistake, told in one line.

Library code raises `UserError` where the *input* is wrong (a name, a file, a field); the doors turn it into one line
on stderr and exit code 2. Any other exception is a defect of ours and keeps its traceback.
"""

import argparse
import difflib
import functools
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn


class UserError(Exception):
    """Bad input. The message names the file, field or row, and the fix."""


def unknown(kind: str, name: object, valid: Iterable[object]) -> UserError:
    """`unknown("decoder", "d47", names)` -> the error that suggests the nearest valid names."""
    valid = sorted(map(str, valid))
    near = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.5)
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
        except KeyboardInterrupt:
            code = 130
        sys.exit(code or 0)

    return run


class Flags(argparse.ArgumentParser):
    """A parser whose complaints are `UserError`s: one line, and exit code 2 from the door."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")
