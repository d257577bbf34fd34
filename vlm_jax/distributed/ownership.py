"""A workdir belongs to one run at a time: `run.lock` is locked for its life, and `owner.json` names its process 0.

The operating system releases the lock when the process dies. A file system without `flock` gets a lock file that names
host and process instead; one of a process that died on this host is replaced, one of another host has to be deleted.
"""

import contextlib
import errno
import os
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from filelock import BaseFileLock, SoftFileLock, Timeout

from vlm_jax.core import reading
from vlm_jax.core.errors import UserError
from vlm_jax.core.files import file_lock, write_json
from vlm_jax.distributed import processes

_LOCK, _OWNER = "run.lock", "owner.json"
_PATIENCE_SECS = 0.5  # a process that was told to end may need a moment
_NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)
_owned: set[Path] = set()  # workdirs of this process


@contextlib.contextmanager
def own_workdir(workdir: Path) -> Iterator[None]:
    """Creates `workdir` and locks it for this run until the block ends; a block inside another one does nothing more.

    All processes of the run call it, and process 0 locks. A new workdir that is still empty at the end is removed.
    Raises `UserError` in all processes where another run has the lock or where the lock cannot be written.
    """
    key = workdir.resolve()
    if key in _owned:
        yield
        return
    processes.check_initialized()
    with contextlib.ExitStack() as stack:
        error = _lock(workdir, stack) if processes.is_primary() else None
        if processes.broadcast_from_primary(error is not None):
            raise error or UserError(f"{workdir}: process 0 cannot lock it, its message says why")
        _owned.add(key)
        stack.callback(_owned.discard, key)
        yield


def _lock(workdir: Path, stack: contextlib.ExitStack) -> UserError | None:
    """Locks until `stack` closes, or returns why not."""
    try:
        created = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
        workdir.mkdir(parents=True, exist_ok=True)
        stack.callback(_remove_empty, workdir, created)
        stack.enter_context(_acquire(workdir / _LOCK))
        start = time.strftime("%Y-%m-%d %H:%M:%S %z")
        write_json(workdir / _OWNER, {"host": socket.gethostname(), "pid": os.getpid(), "start": start})
        stack.callback((workdir / _OWNER).unlink, missing_ok=True)
    except Timeout:
        return UserError(f"{workdir}: {_owner(workdir)} trains here: wait for it, end it, or choose another --workdir")
    except UserError as error:
        return error
    except OSError as error:
        reason = error.strerror or str(error)
        return UserError(
            f"{error.filename2 or error.filename or workdir}: cannot write here ({reason}): choose another --workdir"
        )
    return None


def _acquire(path: Path) -> BaseFileLock:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of FileLock, where it falls back itself
        try:
            lock: BaseFileLock = file_lock(path)
            lock.acquire(timeout=_PATIENCE_SECS)
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
            lock = SoftFileLock(path.with_suffix(".softlock"))
            lock.acquire(timeout=_PATIENCE_SECS)
    return lock


def _owner(workdir: Path) -> str:
    try:
        owner = reading.read_object(workdir / _OWNER)
        return f"process {int(owner['pid'])} on {owner['host']} (since {owner['start']})"
    except (UserError, ValueError, TypeError, KeyError):
        return f"another process (it holds {workdir / _LOCK})"


def _remove_empty(workdir: Path, created: list[Path]) -> None:
    """Removes the lock where nothing else was written, and the folders that were created for it."""
    with contextlib.suppress(OSError):
        if os.listdir(workdir) == [_LOCK]:
            (workdir / _LOCK).unlink()
        for folder in created:
            folder.rmdir()
