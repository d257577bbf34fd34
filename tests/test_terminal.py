"""What commands print: one line for an error, on any standard output, without control characters of foreign text."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vlm_jax.core.text import MAX_MESSAGE

ROOT = Path(__file__).parents[1]
PROGRAM = """
from vlm_jax import cli
from vlm_jax.core.errors import RunStopped, UserError
def main(argv):
    {body}
cli.run_main(main)
"""


def run(body: str, encoding: str = "utf-8", **how: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", PROGRAM.format(body=body)]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | how
    return subprocess.run(command, cwd=ROOT, env=environment, timeout=60, check=False, **pipes)


def test_an_ascii_terminal_gets_escapes() -> None:
    done = run("print('é 日本 \\udcff')", encoding="ascii")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"\\xe9 \\u65e5\\u672c \\udcff\n", b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_full_disk_is_one_line(lines: int) -> None:
    with open("/dev/full", "w") as full:
        done = run(f"print('x\\n' * {lines})", stdout=full)
    assert (done.returncode, done.stderr) == (2, b"error: output: No space left on device\n")


def test_a_closed_pipe_is_silent() -> None:
    read, write = os.pipe()
    os.close(read)
    done = run("print('x' * 100)", stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_closed_streams_are_no_traceback() -> None:
    code = "exec " + " ".join((sys.executable, "-c", '"$PROGRAM"', ">&-"))
    environment = {**os.environ, "PROGRAM": PROGRAM.format(body="print('x')")}
    done = subprocess.run(
        ["sh", "-c", code], cwd=ROOT, env=environment, timeout=60, check=False, stderr=subprocess.PIPE
    )
    assert (done.returncode, done.stderr) == (0, b"")
    with open("/dev/full", "w") as full:
        assert run("raise UserError('x')", stderr=full).returncode == 2


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (r"UserError('a.json: got \x1b[31m\n\ud800')", 2, rb"error: a.json: got \x1b[31m \ud800"),
        ("RunStopped('two\\nlines', 3)", 3, b"stopped: two lines"),
        ("PermissionError(13, 'Permission denied', '/a/b')", 2, b"error: /a/b: Permission denied"),
        ("KeyboardInterrupt", 130, b"stopped by Ctrl-C"),
    ],
)
def test_errors_are_one_line(error: str, code: int, line: bytes) -> None:
    done = run(f"raise {error}", encoding="ascii")
    assert (done.returncode, done.stderr.rstrip(b"\n")) == (code, line)
    assert done.stderr.count(b"\n") == bool(line)


def test_long_values_are_shortened() -> None:
    done = run("raise UserError('expected a name, got ' + 'x' * 10**6 + ' (fix)')")
    assert len(done.stderr) <= MAX_MESSAGE + len(b"error: \n")
    assert done.stderr.endswith(b"(fix)\n")
