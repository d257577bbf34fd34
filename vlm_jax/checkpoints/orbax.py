"""Orbax checkpoints of (state, data cursor, progress): written in the background, complete or not there at all.

A checkpoint holds the SHA-256 of each of its files (`integrity`), so that a byte that changed on disk is reported
before it is used. Each process writes its shards into one shared folder; process 0 writes and compares the digests.
"""

import contextlib
import errno
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from vlm_jax.checkpoints import integrity
from vlm_jax.core import specs
from vlm_jax.core.errors import RunStopped, UserError
from vlm_jax.core.files import write_json

_DISK = ("No space left", "Read-only file system", "Permission denied", "Disk quota exceeded", "File too large")
_DISK_CODES = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT, errno.EFBIG, errno.ENOTDIR)


class Restored(NamedTuple):
    """A state in its shardings, and what was saved with it."""

    state: Any
    cursor: Any
    progress: dict[str, Any]  # numbers


class Checkpoints:
    """The checkpoints of one workdir. `save` returns at once; `close` waits until what was saved is on disk."""

    def __init__(self, workdir: Path, keep: int = 1, keep_every_steps: int = 0):
        self.directory = workdir.absolute() / "checkpoints"
        with disk_errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=keep,
                    keep_period=keep_every_steps or None,
                    enable_async_checkpointing=True,
                    async_options=ocp.AsyncOptions(post_finalization_callback=self._sign),
                ),
            )
        self._saving = 0

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, sound or not."""
        return self._manager.latest_step()

    def newest_sound(self, on_damage: Callable[[int, str], None]) -> int | None:
        """Step of the newest checkpoint whose files are as they were written; None where there is none at all.

        Calls `on_damage(step, what)` for each damaged one that is newer. Raises `UserError` where all are damaged.
        """
        return _newest_sound(self.directory, on_damage)

    def set_aside(self, step: int) -> Path:
        """Moves a damaged checkpoint to `damaged/`, so that its step can be saved again."""
        aside = self.directory.parent / "damaged" / str(step)
        if jax.process_index() == 0:
            with disk_errors(aside):
                aside.parent.mkdir(exist_ok=True)
                while aside.exists():
                    aside = aside.with_name(f"{aside.name}.again")
                (self.directory / str(step)).rename(aside)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"set aside {step}")
        self._manager.reload()
        return aside

    def save(self, step: int, state: Any, cursor: Any, progress: dict[str, Any]) -> None:
        """Raises `UserError` if the disk does not take it, or did not take the one before."""
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            cursor=ocp.args.JsonSave(cursor),
            progress=ocp.args.JsonSave(progress),
        )
        with disk_errors(self.directory):
            self._manager.wait_until_finished()
            self._saving = step
            self._manager.save(step, args=args)

    def _sign(self) -> None:
        """In the background, on process 0, when all files are written and before the checkpoint gets its name."""
        for folder in self.directory.glob(f"{self._saving}.*"):
            integrity.sign(folder)

    def restore(self, step: int, abstract_state: Any, shardings: Any) -> Restored:
        """A state in the given shardings. Raises `UserError` where it cannot be read."""
        target = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), abstract_state, shardings
        )
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(target), cursor=ocp.args.JsonRestore(), progress=ocp.args.JsonRestore()
        )
        with _reading(self.directory / str(step)):
            found = self._manager.restore(step, args=args)
        return Restored(found["state"], found["cursor"], found["progress"])

    def wait(self) -> None:
        """Until what was saved is on disk. Raises `UserError` if the disk did not take it."""
        with disk_errors(self.directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits too, then ends the threads."""
        try:
            self.wait()
        finally:
            self._manager.close()


def restore_params(
    workdir: Path, abstract_params: Any, shardings: Any, on_damage: Callable[[int, str], None], least_step: int = 0
) -> Any:
    """Parameters of the newest sound checkpoint; neither moments nor anything else is read, and nothing is written.

    Raises `UserError` where there is none, where it is of a step before `least_step`, or where it cannot be read.
    """
    directory = workdir.absolute() / "checkpoints"
    if not directory.is_dir():
        raise UserError(f"{workdir}: no checkpoint here; train this run first, or name its --workdir")
    target = {
        "params": jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), abstract_params, shardings
        )
    }
    damaged: dict[int, str] = {}
    step = _newest_sound(directory, damaged.__setitem__)
    if step is None:
        raise UserError(f"{directory}: no complete checkpoint; train this run first")
    if step < least_step:
        why = "".join(f"; step {other} is damaged: {what}" for other, what in damaged.items())
        raise UserError(
            f"{directory}: expected a checkpoint of step {least_step}, the newest intact one is of step {step}{why} "
            "(run vlm_jax.train again)"
        )
    for other, what in damaged.items():
        on_damage(other, what)
    args = ocp.args.PyTreeRestore(
        target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
    )
    with _reading(directory / str(step)), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(directory / str(step) / "state", args=args)["params"]


def _newest_sound(directory: Path, on_damage: Callable[[int, str], None]) -> int | None:
    """See `Checkpoints.newest_sound`. Process 0 looks, all processes get its answer."""
    steps = sorted((int(path.name) for path in directory.iterdir() if path.name.isdigit()), reverse=True)
    sound, damage = 0, [""] * len(steps)
    if jax.process_index() == 0:
        while sound < len(steps) and (what := integrity.damage(directory / str(steps[sound]))):
            damage[sound] = what
            sound += 1
    if jax.process_count() > 1:
        sound = int(multihost_utils.broadcast_one_to_all(np.int32(sound)))
    if steps and sound == len(steps):
        raise UserError(
            f"{directory}: every checkpoint is damaged (step {steps[0]}: {damage[0] or 'see process 0'}): restore the "
            "folder from a copy, or delete it to train from the start"
        )
    for step, what in zip(steps[:sound], damage, strict=False):
        on_damage(step, what)
    return steps[sound] if steps else None


def save_state(folder: Path, state: Any) -> None:
    """A state alone, for a later look; replaces what is there."""
    with disk_errors(folder), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), state, force=True)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns what a disk refuses (full, read-only, forbidden) into a `UserError`."""
    try:
        yield
    except (UserError, RunStopped):
        raise
    except Exception as error:
        text = str(error)
        said = next((words for words in _DISK if words.lower() in text.lower()), None)
        if said is None and isinstance(error, OSError) and error.errno in _DISK_CODES:
            said = error.strerror
        if said is None:
            raise
        raise UserError(
            f"{path}: cannot write here ({said}): earlier checkpoints are intact; make room or name another --workdir, "
            "and run again"
        ) from error


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise UserError(
            f"{folder}: cannot be read ({_line(error)}): move the folder away to resume from the checkpoint before it"
        ) from error


def _line(error: BaseException) -> str:
    return re.sub(r"\s+", " ", str(error))[:200] or type(error).__name__


def lock_workdir(workdir: Path, spec: dict[str, Any], may_change: Sequence[str] = ()) -> None:
    """Writes `spec.json` into a new workdir, or checks that it is this spec's, but for the fields that may change.

    A field that came after the file was written counts as what it then meant. Only process 0 writes. Raises `UserError`
    where the workdir belongs to another spec, and names the fields that differ.
    """
    path = workdir / "spec.json"
    if path.exists():
        there, asked = (_flat(specs.complete(values)) for values in (read_spec(workdir), spec))
        differing = [name for name in sorted({*there, *asked}) if there.get(name) != asked.get(name)]
        differing = [name for name in differing if not name.startswith(tuple(may_change) or "\0")]
        if differing:
            changes = ", ".join(f"{n}: {there.get(n)!r} there, {asked.get(n)!r} asked" for n in differing[:6])
            raise UserError(f"{workdir} holds a run of another spec ({changes}): name another --workdir")
        return
    if jax.process_index():
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(path, spec)
    except OSError as error:
        raise UserError(f"{workdir}: cannot write here ({error.strerror}): name another --workdir") from error


def read_spec(workdir: Path) -> dict[str, Any]:
    """The spec stored in a workdir. Raises `UserError` if there is none."""
    try:
        values = json.loads((workdir / "spec.json").read_text())
    except FileNotFoundError:
        raise UserError(f"{workdir}: no spec.json, so no run was started here") from None
    except OSError as error:
        raise UserError(f"{workdir}/spec.json: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{workdir}/spec.json: not valid JSON ({error.reason})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{workdir}/spec.json, line {error.lineno}: not valid JSON ({error.msg})") from None
    if not isinstance(values, dict):
        raise UserError(f"{workdir}/spec.json: expected a JSON object, got {type(values).__name__}")
    return values


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted names of the leaves of nested dicts and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
    if items is None or not tree:
        return {prefix: tree}
    return {name: leaf for key, value in items for name, leaf in _flat(value, f"{prefix}.{key}".lstrip(".")).items()}
