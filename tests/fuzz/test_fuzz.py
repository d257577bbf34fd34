"""A few hundred hostile inputs in a process of their own, which forks before JAX starts. The whole: `tests.fuzz`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import running

PENDING: tuple[str, ...] = ()
ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory and the audit of opened files are Linux's")
def test_nothing_gets_through() -> None:
    command = [sys.executable, "-m", "tests.fuzz", "--cases", "260", "--first", "20000", "--processes", "1"]
    command += [f"--skip={name}" for name in PENDING]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_gets_through_is_counted(tmp_path: Path) -> None:
    """An exception, a loop, a death, a message of two lines, a file elsewhere, a process."""
    program = f"""
import os, subprocess
from tests.fuzz import running
from vlm_jax.core.errors import UserError
def refused(rng, path): raise UserError("no")
def accepted(rng, path): (path / "a").write_text("")
def escape(rng, path): raise KeyError("a")
def loop(rng, path):
    while True: pass
def grow(rng, path): bytearray(10**11)
def dead(rng, path): os.kill(os.getpid(), 9)
def elsewhere(rng, path): open({str(tmp_path / "x")!r}, "w")
def process(rng, path): subprocess.run(["true"])
running.CPU_SECS = 0.2
entries = dict(refused=refused, accepted=accepted, escape=escape, loop=loop, grow=grow, dead=dead, elsewhere=elsewhere,
               process=process)
results = running.run(entries, [(name, 0) for name in entries], 2)
print(*sorted(f"{{one.entry}}={{one.kind}}" for one in results))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout.split() == [
        "accepted=accepted", "dead=memory", "elsewhere=breach", "escape=escape", "grow=memory", "loop=hang",
        "process=breach", "refused=refused",
    ], done.stderr  # fmt: skip
    assert running.KINDS[:2] == ("refused", "accepted")
