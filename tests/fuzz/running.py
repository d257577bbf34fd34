"""Runs cases in forked processes with limits, and counts what gets through.

A case is refused (a `UserError` of one printable line) or accepted. Everything else counts:

    escape    another exception, or a refusal whose message is long or not printable
    hang      more than `CPU_SECS` of processor time, or `WALL_SECS` in all
    memory    more than `MEMORY_BYTES` beyond the start, or a killed process
    breach    a file written or removed outside the case's folder, a process started, a socket opened
"""

import contextlib
import io
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlm_jax.core import text
from vlm_jax.core.errors import UserError

CPU_SECS, WALL_SECS, MEMORY_BYTES, FILE_BYTES = 8, 75, 2 * 2**30, 2**28
COUNTED = ("escape", "hang", "memory", "breach")
KINDS = ("refused", "accepted", *COUNTED)

Entry = Callable[[random.Random, Path], Any]  # draws an input into the folder, and reads it


class Result(NamedTuple):
    entry: str
    seed: int
    kind: str
    detail: str
    secs: float


class _Hang(BaseException):
    pass


def run(entries: dict[str, Entry], cases: Sequence[tuple[str, int]], processes: int) -> list[Result]:
    """The results of all (entry, seed), in any order."""
    workers = [_Worker(entries, cases[i::processes]) for i in range(processes)]
    results: list[Result] = []
    while any(worker.left for worker in workers):
        for worker in workers:
            results += worker.poll()
    return results


def table(results: Iterable[Result]) -> list[str]:
    """Markdown lines: how many cases of each entry were refused, accepted, or got through."""
    counts: dict[str, Counter[str]] = {}
    for one in results:
        counts.setdefault(one.entry, Counter())[one.kind] += 1
    total = sum(counts.values(), Counter())
    lines = [f"| entry | cases | {' | '.join(KINDS)} |", "|---" * (2 + len(KINDS)) + "|"]
    for name, count in (*sorted(counts.items()), ("all", total)):
        lines.append(f"| {name} | {count.total()} | {' | '.join(str(count[kind]) for kind in KINDS)} |")
    return lines


@contextlib.contextmanager
def errors_of_disk() -> Iterator[None]:
    """As `cli.run_main`: one line for a file that cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or 'output'}: {error.strerror or error}") from error


class _Worker:
    """A forked process that runs its cases in order, and is replaced where it dies."""

    def __init__(self, entries: dict[str, Entry], cases: Sequence[tuple[str, int]]):
        self.entries, self.left = entries, list(cases)
        self._start()

    def _start(self) -> None:
        self.read, write = os.pipe()
        self.pid, self.last, self.buffer = os.fork(), time.monotonic(), b""
        if self.pid == 0:
            os.close(self.read)
            _run_cases(self.entries, self.left, write)
            os._exit(0)
        os.close(write)

    def poll(self) -> list[Result]:
        if not self.left:
            return []
        ready = select.select([self.read], [], [], 0.05)[0]
        content = os.read(self.read, 1 << 16) if ready else None
        if content:
            self.last = time.monotonic()
            *lines, self.buffer = (self.buffer + content).split(b"\n")
            results = [_parse(line) for line in lines]
            del self.left[: len(results)]
            if not self.left:
                self._end()
            return results
        if content == b"" or time.monotonic() - self.last > WALL_SECS:
            return [self._replace("memory" if content == b"" else "hang")]
        return []

    def _replace(self, kind: str) -> Result:
        """The result of the case that killed or blocked its process; the next one starts behind it."""
        if kind == "hang":
            os.kill(self.pid, signal.SIGKILL)
        status = self._end()
        name, seed = self.left.pop(0)
        if self.left:
            self._start()
        return Result(name, seed, kind, f"the process ended with status {status}", time.monotonic() - self.last)

    def _end(self) -> int:
        os.close(self.read)
        return os.waitpid(self.pid, 0)[1]


def _parse(line: bytes) -> Result:
    entry, seed, kind, secs, detail = line.decode().split("\t", 4)
    return Result(entry, int(seed), kind, detail, float(secs))


def _run_cases(entries: dict[str, Entry], cases: Sequence[tuple[str, int]], write: int) -> None:
    limit = _virtual_bytes() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, _raise_hang)
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    watch = _Watch(folder)
    sys.addaudithook(watch)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):  # native libraries write here too
        os.dup2(null, standard)
    try:
        for name, seed in cases:
            result = _run_case(name, entries[name], seed, folder, watch)
            fields = (result.entry, str(result.seed), result.kind, f"{result.secs:.3f}", text.one_line(result.detail))
            os.write(write, "\t".join(field.replace("\t", " ") for field in fields).encode(errors="replace") + b"\n")
    finally:
        watch.armed = False
        shutil.rmtree(folder, ignore_errors=True)


def _run_case(name: str, entry: Entry, seed: int, folder: Path, watch: "_Watch") -> Result:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    inside, home, started = folder / "case", os.getcwd(), time.monotonic()
    inside.mkdir()
    kind, detail, watch.breaches, watch.armed = "accepted", "", [], True
    try:
        os.chdir(inside)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECS)
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            entry(random.Random(f"{name}:{seed}"), inside)
    except UserError as error:
        message = str(error)
        fits = message and len(message) <= text.MAX_MESSAGE and "\n" not in message and text.is_printable(message)
        kind, detail = ("refused", "") if fits else ("escape", f"message: {message}")
    except _Hang:
        kind, detail = "hang", f"more than {CPU_SECS} s"
    except MemoryError as error:
        kind, detail = "memory", _last_lines(error)
    except BaseException as error:
        kind, detail = "escape", _last_lines(error)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        watch.armed = False
        os.chdir(home)
    if watch.breaches:
        kind, detail = "breach", watch.breaches[0]
    return Result(name, seed, kind, detail, time.monotonic() - started)


def _last_lines(error: BaseException) -> str:
    """Type, message and innermost frames of our code."""
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if "vlm_jax" in f.filename or "launching" in f.filename
    ]
    where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames[-3:]))
    return f"{type(error).__name__}: {str(error)[:120]} at {where}"


def _raise_hang(*_: Any) -> None:
    raise _Hang


def _virtual_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


class _Watch:
    """An audit hook that notes writes outside the folder, processes and sockets."""

    _STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pickle.find_class")
    _SOCKETS = ("socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo")
    # The process of chat templates, and TensorBoard's writer, which pickles its own events.
    _OWN = (("subprocess.Popen", "template_process"), ("pickle.find_class", "tensorboardX."))
    _CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree")

    def __init__(self, folder: Path):
        self.inside, self.armed, self.breaches = str(folder), False, []

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        if event in (*self._STARTS, *self._SOCKETS):
            outside = (event, True) not in ((name, own in str(args[:2])) for name, own in self._OWN)
        elif event == "open":
            path, mode, flags = args
            writes = set(mode) & set("wax+") if mode else flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            outside = writes and not self._is_inside(path)
        elif event in ("os.link", "os.symlink"):
            outside = not self._is_inside(os.path.dirname(args[1]) or ".")
        else:
            outside = event in self._CHANGES and not self._is_inside(args[0])
        if outside:
            self.breaches.append(f"{event} {str(args)[:100]}")

    def _is_inside(self, path: Any) -> bool:
        if isinstance(path, int):
            return True
        path = os.path.realpath(os.fsdecode(path))
        return path.startswith(self.inside) or path == os.devnull
