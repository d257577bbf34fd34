"""Several processes: the same losses as one, and what happens when one of them ends."""

import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from experiments.faults import victim
from experiments.faults.damage import Case
from vlm_jax.core.errors import LOST, STOPPED

# The sums of a step are the same numbers added in another order: each is off by a few roundings of float32 (6e-8), and
# the optimiser carries that along. README.md has what was seen, about a tenth of this.
TOLERANCE = 5e-6
_FROM = 24  # the checkpoint that the last layout starts from


class Layout(NamedTuple):
    """A run on so many processes with so many devices each, and how far its losses are from those of one device."""

    processes: int
    devices: int
    from_step: int
    code: int
    largest_difference: float  # relative, over all logged losses
    within: bool


def layouts(folder: Path, cache: Path, undisturbed: Path) -> Iterator[Layout]:
    """1 x 8, 2 x 4, and 4 x 2 from a checkpoint of 2 x 4; each against 1 x 1."""
    keep = "--config.keep_checkpoints=99"
    for processes, devices, start in ((1, 8, 0), (2, 4, 0), (4, 2, _FROM)):
        workdir = folder / f"{processes}x{devices}"
        if start:
            shutil.copytree(folder / "2x4", workdir, ignore=shutil.ignore_patterns("summary.json"))
            for step in victim.steps(workdir):
                if step > start:
                    shutil.rmtree(workdir / "checkpoints" / str(step))
        running = victim.start_all(workdir, cache, processes, devices, keep)
        code = max(process.wait(timeout=600) for process in running)
        mine, theirs = ([(line["step"], line["loss"]) for line in victim.logged(w)] for w in (workdir, undisturbed))
        same_steps = [step for step, _ in mine] == [step for step, _ in theirs]
        largest = max((abs(a - b) / b for (_, a), (_, b) in zip(mine, theirs, strict=False)), default=1.0)
        ok = code == 0 and same_steps and largest < TOLERANCE
        yield Layout(processes, devices, start, code, largest, ok)


def endings(folder: Path, cache: Path) -> Iterator[Case]:
    """Of two processes one is killed, or gets SIGTERM: the other ends in time, and both go on together."""
    for fault, number, sent in (
        ("kill -9 of process 1 of 2", 1, signal.SIGKILL),
        ("kill -9 of process 0 of 2", 0, signal.SIGKILL),
        ("SIGTERM to process 1 of 2", 1, signal.SIGTERM),
    ):
        workdir = folder / fault.replace(" ", "_")
        both = victim.start_all(workdir, cache, 2, 2)
        victim.until(lambda: victim.steps(workdir))  # noqa: B023
        both[number].send_signal(sent)
        start = time.monotonic()
        code = both[1 - number].wait(timeout=120)
        secs = time.monotonic() - start
        wait(both)
        said = next(
            (
                line
                for line in victim.log_of(workdir).read_text(errors="replace").splitlines()
                if "go on" in line or "goes on" in line
            ),
            "",
        )
        again = victim.start_all(workdir, cache, 2, 2)
        resumed = max(process.wait(timeout=600) for process in again)
        wanted = LOST if sent == signal.SIGKILL else STOPPED
        ok = code == wanted and secs < 60 and resumed == 0 and victim.steps(workdir)[-1] == victim.STEPS
        yield Case(f"{fault}: the other gone after {secs:.1f} s", code, victim.short(said), ok)


def wait(running: list[subprocess.Popen[bytes]]) -> None:
    for process in running:
        process.wait(timeout=120)
