"""Errors that a command reports in one line instead of a traceback: bad input, and a run that stops early on purpose.

Library code raises `UserError` where the *input* is wrong (a name, a file, a field); `cli.run_main` prints it and exits
with 2. `RunStopped` brings its own exit code. Any other exception is a defect of ours and keeps its traceback.
"""

import difflib
from collections.abc import Iterable

# Exit codes of a run that did not finish. After LOST and STOPPED the same command resumes it.
LOST = 3  # another process of the run is gone
BAD_STEP = 4  # a loss or a gradient was not finite, or too many updates were skipped
STOPPED = 143  # SIGTERM: saved, or nothing to save. As a shell reports SIGTERM


class UserError(Exception):
    """Bad input. The message names the file, field or row, and the fix."""


class RunStopped(Exception):
    """A run that stops early, with everything it needs to resume on disk. The message says why."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code  # exit code of the command


def unknown(kind: str, name: object, valid: Iterable[object], cutoff: float = 0.5) -> UserError:
    """`unknown("decoder", "d47", names)` -> the error that suggests the nearest valid name, if one is as similar as
    `cutoff` (difflib's ratio, 0 to 1).
    """
    valid = sorted(map(str, valid))
    near = difflib.get_close_matches(str(name), valid, n=1, cutoff=cutoff)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UserError(f"unknown {kind} {name!r}: {hint}valid: {', '.join(valid)}")
