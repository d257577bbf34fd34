"""Errors that `cli.run_main` prints in one line: bad input (exit code 2) and a run that stops early (its own code).

Any other exception is a bug and keeps its traceback.
"""

import difflib
from collections.abc import Iterable

from vlm_jax.core import text

# Exit codes of a run that did not finish. After LOST and STOPPED the same command resumes it.
LOST = 3  # another process of the run was lost
BAD_STEP = 4  # a loss or a gradient was not finite, or too many updates were skipped
STOPPED = 143  # SIGTERM, as a shell reports it
_MAX_UNKNOWN = 200  # characters of an unknown name that are compared and quoted


class UserError(Exception):
    """Bad input. The message names the file, field or row, and the fix; it is one printable line, long ones without
    their middle, whatever text of a user's file it quotes.
    """

    def __init__(self, message: str):
        super().__init__(text.one_line(message))


class RunStopped(Exception):
    """A run stopped early and can be resumed. `code` is the exit code of the command."""

    def __init__(self, message: str, code: int):
        super().__init__(text.one_line(message))
        self.code = code


def unknown(kind: str, name: object, valid: Iterable[object], cutoff: float = 0.5) -> UserError:
    """The error for a name outside `valid`; suggests the closest one of at least `cutoff` difflib ratio."""
    valid, name = sorted(map(str, valid)), name[:_MAX_UNKNOWN] if isinstance(name, str) else name
    near = difflib.get_close_matches(str(name)[:_MAX_UNKNOWN], valid, n=1, cutoff=cutoff)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UserError(f"unknown {kind} {name!r}: {hint}valid: {', '.join(valid)}")
