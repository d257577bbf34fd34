"""Errors that `cli.run_main` prints in one line: bad input (exit code 2) and a run that stops early (its own code).

Any other exception is a bug and keeps its traceback.
"""

import difflib
from collections.abc import Iterable

# Exit codes of a run that did not finish. After LOST and STOPPED the same command resumes it.
LOST = 3  # another process of the run was lost
BAD_STEP = 4  # a loss or a gradient was not finite, or too many updates were skipped
STOPPED = 143  # SIGTERM, as a shell reports it


class UserError(Exception):
    """Bad input. The message names the file, field or row, and the fix."""


class RunStopped(Exception):
    """A run stopped early and can be resumed. `code` is the exit code of the command."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def unknown(kind: str, name: object, valid: Iterable[object], cutoff: float = 0.5) -> UserError:
    """The error for a name outside `valid`; suggests the closest one of at least `cutoff` difflib ratio."""
    valid = sorted(map(str, valid))
    near = difflib.get_close_matches(str(name), valid, n=1, cutoff=cutoff)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UserError(f"unknown {kind} {name!r}: {hint}valid: {', '.join(valid)}")
