"""Bytes of the newest checkpoint that change, and a disk that is full or read-only."""

import contextlib
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from experiments.faults import victim

_TMPFS_BYTES = 1 << 20  # room for two checkpoints of the victim, and no more


class Case(NamedTuple):
    """One fault, what the run did, and whether that is what is promised."""

    fault: str
    code: int
    said: str
    promised: bool


def broken_checkpoints(folder: Path, cache: Path, undisturbed: Path, seed: int = 0) -> Iterator[Case]:
    """One file after another of the newest checkpoint: a byte flipped, the end cut off, the file gone.

    The run goes on from the checkpoint before it, names what is wrong, and ends as the undisturbed one.
    """
    rng = random.Random(seed)
    half = folder / "half"
    process = victim.start(half, cache)
    victim.until(lambda: len(victim.steps(half)) >= 3 and victim.steps(half)[-1] < victim.STEPS)
    process.kill()
    process.wait()
    newest = victim.steps(half)[-1]
    sizes = {p: p.stat().st_size for p in sorted((half / "checkpoints" / str(newest)).rglob("*")) if p.is_file()}
    data = [p for p in sizes if p.parent.name == "d"]
    others = [p for p in sizes if p not in data and p.name not in ("commit_success.txt", "_CHECKPOINT_METADATA")]
    picked = [*rng.sample(data, 3), *others]
    for number, path in enumerate(picked):
        name = path.relative_to(half / "checkpoints" / str(newest))
        for fault in ("flip", "truncate", "remove")[:: 1 if number < 2 else 3]:
            workdir = folder / f"broken{number}{fault}"
            shutil.copytree(half, workdir)
            target = workdir / path.relative_to(half)
            spoil(target, fault, rng)
            code = victim.finish(workdir, cache)
            said = next((line for line in victim.log_of(workdir).read_text().splitlines() if "is damaged" in line), "")
            same = code == 0 and victim.same_end(workdir, undisturbed)
            ok = same and said != ""
            yield Case(f"{fault} {name.parent / 'FILE' if path in data else name}", code, victim.short(said), ok)
            if ok:
                shutil.rmtree(workdir)


def spoil(path: Path, fault: str, rng: random.Random) -> None:
    """`flip` one bit, `truncate` to half, or `remove`."""
    if fault == "remove":
        path.unlink()
        return
    content = bytearray(path.read_bytes())
    if fault == "flip":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content if fault == "flip" else content[: len(content) // 2])


def all_broken(folder: Path, cache: Path) -> Case:
    """No checkpoint is sound: one line, code 2, and nothing is overwritten."""
    workdir = folder / "all_broken"
    process = victim.start(workdir, cache)
    victim.until(lambda: len(victim.steps(workdir)) >= 2)
    process.kill()
    process.wait()
    for step in victim.steps(workdir):
        for path in (workdir / "checkpoints" / str(step) / "state").rglob("manifest.ocdbt"):
            spoil(path, "truncate", random.Random(0))
    before = {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}
    code = victim.finish(workdir, cache)
    after = {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}
    return Case(
        "every checkpoint cut off", code, victim.short(victim.last_line(workdir)), code == 2 and before == after
    )


def sigterm(folder: Path, cache: Path, undisturbed: Path) -> Iterator[Case]:
    """While it steps: it saves and ends with 143 within half a minute, and goes on. While it compiles: it ends."""
    for at in ("stepping", "compiling"):
        workdir = folder / f"term_{at}"
        if at == "compiling":
            shutil.rmtree(cache / "programs", ignore_errors=True)
        process = victim.start(workdir, cache)
        ready = (lambda: victim.logged(workdir)) if at == "stepping" else (lambda: (workdir / "spec.json").exists())  # noqa: B023
        victim.until(ready)
        process.send_signal(signal.SIGTERM)
        sent = time.monotonic()
        code = process.wait(timeout=60)
        secs, said = time.monotonic() - sent, victim.last_line(workdir)
        ok = code == 143 and secs < 30 and victim.finish(workdir, cache) == 0 and victim.same_end(workdir, undisturbed)
        yield Case(f"SIGTERM while {at}, gone after {secs:.1f} s", code, victim.short(said), ok)


@contextlib.contextmanager
def mounted(folder: Path, size_bytes: int) -> Iterator[Path | None]:
    """A file system of that size; None where this user may not mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def full_disk(folder: Path, cache: Path, undisturbed: Path) -> Iterator[Case]:
    """The disk fills while saving: one line, code 2, the checkpoints that are there are whole; with room it goes on.

    And a workdir on a read-only disk.
    """
    with mounted(folder / "small", _TMPFS_BYTES) as disk:
        if disk is None:
            yield Case("disk full (not tried: this user may not mount one)", 0, "", True)
            return
        workdir, keep = disk / "run", "--config.keep_checkpoints=20"
        code = victim.finish(workdir, cache, keep)
        said, left = victim.last_line(workdir), victim.steps(workdir)
        moved = folder / "more_room"
        shutil.copytree(workdir, moved)
        resumed = victim.finish(moved, cache, keep)
        ok = code == 2 and len(left) >= 1 and resumed == 0 and victim.same_end(moved, undisturbed)
        yield Case(f"disk full behind step {left[-1] if left else 0}", code, victim.short(said), ok)
    with mounted(folder / "read_only", _TMPFS_BYTES) as disk:
        assert disk is not None
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        code = victim.finish(disk / "run", cache)
        yield Case("read-only disk", code, victim.short(victim.last_line(disk / "run")), code == 2)
