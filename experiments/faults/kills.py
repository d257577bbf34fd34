"""kill -9 at random moments: the end is that of the undisturbed run."""

import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from experiments.faults import victim

_COLD_EVERY = 5  # of so many kills one hits a run without compiled programs, so that some strike a compiler


_KILLS_A_RUN = 3  # then it may come to its end


class Kill(NamedTuple):
    """One kill: of which run, when, at what, what was there, and whether that run ended as the undisturbed one."""

    run: int
    after_secs: float
    doing: str  # starting, compiling, stepping, saving, ending
    logged_step: int
    checkpoint: int  # the newest complete one; 0: none
    same: bool = False


def doing(workdir: Path) -> str:
    """What a run was at, from what it left behind."""
    if not (workdir / "spec.json").exists():
        return "starting"
    if any((workdir / "checkpoints").glob("*tmp*")):
        return "saving"
    if victim.STEPS in victim.steps(workdir):
        return "ending"
    return "stepping" if victim.logged(workdir) else "compiling"


def kill(run: int, workdir: Path, cache: Path, after_secs: float) -> Kill | None:
    """Starts the run, or starts it again, and kills it. None where it had ended before."""
    process = victim.start(workdir, cache)
    try:
        process.wait(timeout=after_secs)
        return None
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    lines, steps = victim.logged(workdir), victim.steps(workdir)
    logged, saved = lines[-1]["step"] if lines else 0, steps[-1] if steps else 0
    return Kill(run, round(after_secs, 2), doing(workdir), logged, saved)


def duration(workdir: Path, cache: Path) -> float:
    """Seconds of an undisturbed run."""
    start = time.monotonic()
    if victim.finish(workdir, cache):
        raise RuntimeError(f"the undisturbed run failed: {victim.last_line(workdir)}")
    return time.monotonic() - start


def kills(folder: Path, cache: Path, undisturbed: Path, count: int, seed: int = 0) -> Iterator[Kill]:
    """Moments are drawn evenly over the length of a run, with and without compiled programs."""
    rng = random.Random(seed)
    warm_secs = duration(folder / "warm", cache)
    shutil.rmtree(cache / "programs", ignore_errors=True)
    cold_secs = duration(folder / "cold", cache)
    made = run = 0
    while made < count:
        workdir, killed = folder / f"run{run}", []
        for _ in range(min(_KILLS_A_RUN, count - made)):
            cold = (made + len(killed)) % _COLD_EVERY == 0
            if cold:
                shutil.rmtree(cache / "programs", ignore_errors=True)
            done = kill(run, workdir, cache, rng.uniform(0.3, cold_secs if cold else warm_secs))
            if done is None:
                break
            killed.append(done)
        same = victim.finish(workdir, cache) == 0 and victim.same_end(workdir, undisturbed)
        yield from (done._replace(same=same) for done in killed)
        made, run = made + len(killed), run + 1
