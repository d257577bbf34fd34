"""Chat templates of other people, rendered in a process of limited time and memory.

A sandbox keeps a template from files and from Python, not from `{{ 10**10**8 }}` or `{{ 'a' * 10**10 }}`. The process
starts with the first template, answers line by line (JSON), and ends with this one; a template that breaches a limit
costs the process, and the next one starts another.
"""

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_jax.core.errors import UserError
from vlm_jax.data import templates
from vlm_jax.data.templates import Messages, Rendered

SECONDS = 1  # of processor time, for one conversation
MEMORY = 512 * 2**20  # bytes, of the whole process
CHARACTERS = 2**22  # of a rendered conversation that is shorter itself
_WAIT = 60.0  # seconds by the clock, however busy the machine is
_COMMAND = "import sys; sys.path[:] = {path!r}; from vlm_jax.data import template_process; template_process.serve()"

_lock = threading.Lock()
_process: subprocess.Popen[bytes] | None = None


class TemplateLimit(UserError):
    """A template that computes too long, or takes too much memory."""


def render(template: str, messages: Messages, special: Mapping[str, str], prompt: bool) -> str:
    """`templates.render`, within the limits. Raises `UserError` with the template's error, or `TemplateLimit`."""
    return _call("render", template, messages, special, prompt)["rendered"]


def render_answers(template: str, messages: Messages, special: Mapping[str, str], ends: Sequence[str]) -> Rendered:
    """`templates.render_answers`, within the limits. Raises as `render`."""
    text, spans = _call("render_answers", template, messages, special, ends)["rendered"]
    return Rendered(text, [(start, end) for start, end in spans])


def _call(*request: Any) -> dict[str, Any]:
    try:
        line = json.dumps(request, default=_plain).encode() + b"\n"
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"messages: expected texts, lists and objects, got others ({str(error)[:200]})") from error
    with _lock:
        try:
            answer = json.loads(_exchange(line))
        except BaseException:  # an answer that comes later is not that of the next request
            close()
            raise
    if "error" in answer:
        raise UserError(answer["error"])
    return answer


def _plain(value: Any) -> Any:
    """An object of a message, as transformers shows it to a template: none but plain types keep their content."""
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, Sequence) else f"<{type(value).__name__}>"


def _exchange(request: bytes) -> bytes:
    """The process's answer: JSON of what was rendered, or of the text of an error."""
    global _process
    if _process is None or _process.poll() is not None:
        close()
        _process = _start()
    process, received = _process, bytearray()
    assert process.stdin is not None
    assert process.stdout is not None
    deadline = time.monotonic() + _WAIT
    with contextlib.suppress(OSError):  # a process that has ended: its exit code is the reason
        process.stdin.write(request)
        process.stdin.flush()
        while not received.endswith(b"\n"):
            if not select.select([process.stdout], [], [], 0.1)[0]:
                if time.monotonic() > deadline or _resident(process.pid) > MEMORY:
                    process.kill()
                continue
            chunk = os.read(process.stdout.fileno(), 1 << 20)
            if not chunk:
                break
            received += chunk
    if received.endswith(b"\n"):
        return bytes(received)
    code = process.wait()
    reason = {
        -signal.SIGPROF: f"an end within {SECONDS} s of computing",
        -signal.SIGKILL: f"an end within {_WAIT:.0f} s and {MEMORY >> 20} MiB of memory",
        _OUT_OF_MEMORY: f"at most {MEMORY >> 20} MiB of memory",
    }.get(code)
    if reason is None:
        raise UserError(f"chat template: cannot be rendered (the process that renders it ended with {code})")
    raise TemplateLimit(f"chat template: expected {reason}: it was stopped")


def _start() -> subprocess.Popen[bytes]:
    # With this package and the modules that this process can import, and nothing of its environment.
    path = [str(Path(__file__).parents[2]), *(path or os.getcwd() for path in sys.path)]
    command = [sys.executable, "-I", "-S", "-c", _COMMAND.format(path=path)]
    pipe, none = subprocess.PIPE, subprocess.DEVNULL
    try:
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=none, start_new_session=True)
    except (OSError, ValueError) as error:
        raise UserError(f"chat template: cannot start {sys.executable!r}, which renders it ({error})") from error


def _resident(pid: int) -> int:
    """Bytes in memory; 0 on Linux, where the process limits itself."""
    if sys.platform == "linux":
        return 0
    out = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return int(out) * 1024 if out.strip().isdecimal() else 0


@atexit.register
def close() -> None:
    """Ends the process, if there is one."""
    global _process
    process, _process = _process, None
    if process is None:
        return
    with contextlib.suppress(OSError):
        process.stdin.close()  # type: ignore[union-attr]
    # Without a request it ends by itself; within one, by SIGPROF.
    if process.poll() is None:
        process.kill()
    process.wait()
    process.stdout.close()  # type: ignore[union-attr]


def _forget() -> None:
    """A forked process starts one of its own."""
    global _lock, _process
    if _process is not None:
        _process.returncode = 0  # not its child: nothing to wait for
        with contextlib.suppress(OSError):
            _process.stdin.close()  # type: ignore[union-attr]
            _process.stdout.close()  # type: ignore[union-attr]
    _lock, _process = threading.Lock(), None


os.register_at_fork(after_in_child=_forget)

# In the process.

_OUT_OF_MEMORY = 77  # exit code


def serve() -> None:
    """Answers requests until there are no more."""
    _limit_memory()
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    for request in sys.stdin.buffer:
        # The kernel ends the process, whatever the interpreter is doing.
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            answer = json.dumps(_answer(*json.loads(request))).encode()
        except MemoryError:
            os._exit(_OUT_OF_MEMORY)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(answer + b"\n")
        sys.stdout.buffer.flush()


def _answer(name: str, template: str, messages: list[Any], special: dict[str, str], last: Any) -> dict[str, Any]:
    run = {"render": templates.render, "render_answers": templates.render_answers}[name]
    try:
        rendered = run(template, messages, special, last)
    except templates.TemplateError as error:
        return {"error": str(error)}
    length = len(rendered if isinstance(rendered, str) else rendered.text)
    if length > CHARACTERS and length > 2 * len(json.dumps(messages)):
        return {"error": f"chat template: expected at most {CHARACTERS} characters, it rendered {length}"}
    return {"rendered": rendered}


def _limit_memory() -> None:
    import resource

    with contextlib.suppress(ValueError, OSError):  # macOS: `_resident`
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
