"""Orbax checkpoints of (state, progress), written in the background and atomically.

A checkpoint holds the SHA-256 of each of its files (`integrity`), which is verified before it is restored. All
processes write their shards to one shared folder; process 0 writes and verifies the digests.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from vlm_jax.checkpoints import background, integrity
from vlm_jax.checkpoints.huggingface.fields import read_json
from vlm_jax.compress import catalog
from vlm_jax.core import specs, tree
from vlm_jax.core.errors import RunStopped, UserError
from vlm_jax.core.files import disk_problem, is_full, write_json

OnDamage = Callable[[int, str], None]

# Replicas share the writing of an array where each writes at least this much: every slice of another shape is a program
# to compile, hundreds of them before the first checkpoint of a model of small arrays.
_MIN_REPLICA_BYTES = 2**20


class Restored(NamedTuple):
    """A restored checkpoint."""

    state: Any  # in its shardings
    progress: dict[str, Any]


class Checkpoints:
    """The checkpoints of a workdir. `save` is asynchronous; `wait` and `close` block until it is on disk."""

    def __init__(self, workdir: Path, keep: int = 1, keep_every_steps: int = 0):
        background.hold_back()
        _share_large_arrays()
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

    def latest_intact(self, on_damage: OnDamage) -> int | None:
        """Step of the latest checkpoint whose files match their digests; None where there are no checkpoints.

        Calls `on_damage(step, problem)` for each later one. Raises `UserError` where all are damaged.
        """
        return _latest_intact(self.directory, on_damage)

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

    def save(self, step: int, state: Any, progress: dict[str, Any]) -> None:
        """Saves in the background. Raises `UserError` if this or the previous save cannot be written."""
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress))
        with disk_errors(self.directory):
            self._manager.wait_until_finished()
            self._saving = step
            self._manager.save(step, args=args)

    def _sign(self) -> None:
        """Called by Orbax on process 0, after all files are written and before the checkpoint gets its name."""
        for folder in self.directory.glob(f"{self._saving}.*"):
            integrity.sign(folder)

    def restore(self, step: int, abstract_state: Any, shardings: Any) -> Restored:
        """A checkpoint in the given shardings. Raises `UserError` where it cannot be read."""
        state = ocp.args.StandardRestore(_sharded(abstract_state, shardings))
        args = ocp.args.Composite(state=state, progress=ocp.args.JsonRestore())
        with _read_errors(self.directory / str(step)):
            restored = self._manager.restore(step, args=args)
            secs = restored["progress"].get("secs", 0.0)
            if not isinstance(secs, int | float):
                raise ValueError(f"progress: secs: expected a number, got {secs!r:.80}")
        return Restored(restored["state"], restored["progress"])

    def wait(self) -> None:
        """Blocks until the last save is on disk. Raises `UserError` if it cannot be written."""
        with disk_errors(self.directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then stops the background threads."""
        try:
            self.wait()
        finally:
            self._manager.close()


@functools.cache
def _share_large_arrays() -> None:
    """Sets `_MIN_REPLICA_BYTES` for all checkpoints of this process."""
    handler = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_MIN_REPLICA_BYTES)
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # that a handler is replaced
    ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)
    logging.disable(disabled)


def _sharded(abstract: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, shardings
    )


def restore_params(
    workdir: Path, abstract_params: Any, shardings: Any, on_damage: OnDamage, least_step: int = 0
) -> Any:
    """Parameters of the latest intact checkpoint, without the optimizer state. Nothing is written. Raises `UserError`
    where there is none, where its step is below `least_step`, or where it cannot be read.
    """
    directory = workdir.absolute() / "checkpoints"
    if not directory.is_dir():
        raise UserError(f"{workdir}: no checkpoint here (train this run first, or choose another --workdir)")
    target = {"params": _sharded(abstract_params, shardings)}
    damaged: dict[int, str] = {}
    step = _latest_intact(directory, damaged.__setitem__)
    if step is None:
        raise UserError(f"{directory}: no complete checkpoint (train this run first)")
    if step < least_step:
        reasons = "".join(f"; step {other} is damaged: {problem}" for other, problem in damaged.items())
        raise UserError(
            f"{directory}: expected a checkpoint of step {least_step}, the latest intact one is of step {step}"
            f"{reasons} (run vlm_jax.train again)"
        )
    for other, problem in damaged.items():
        on_damage(other, problem)
    args = ocp.args.PyTreeRestore(
        target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
    )
    with _read_errors(directory / str(step)), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(directory / str(step) / "state", args=args)["params"]


def _latest_intact(directory: Path, on_damage: OnDamage) -> int | None:
    """See `Checkpoints.latest_intact`. Process 0 verifies and broadcasts the result."""
    names = [path.name for path in directory.iterdir() if path.name.isascii() and path.name.isdigit()]
    steps = sorted(map(int, names), reverse=True)
    intact, damage = 0, [""] * len(steps)
    if jax.process_index() == 0:
        while intact < len(steps) and (problem := integrity.damage(directory / str(steps[intact]))):
            damage[intact] = problem
            intact += 1
    if jax.process_count() > 1:
        intact = int(multihost_utils.broadcast_one_to_all(np.int32(intact)))
    if steps and intact == len(steps):
        raise UserError(
            f"{directory}: every checkpoint is damaged (step {steps[0]}: {damage[0] or 'see process 0'}): restore the "
            "folder from a copy, or delete it to train from the start"
        )
    for step, problem in zip(steps[:intact], damage, strict=False):
        on_damage(step, problem)
    return steps[intact] if steps else None


def save_state(folder: Path, state: Any) -> None:
    """Saves a state alone, in place of an existing one."""
    with disk_errors(folder), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), state, force=True)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns errors of a disk (`core.files.disk_problem`) into a `UserError`."""
    try:
        yield
    except (UserError, RunStopped):
        raise
    except Exception as error:
        reason = disk_problem(error)
        if reason is None:
            raise
        fix = "free disk space" if is_full(reason) else "mend it"
        raise UserError(
            f"{path}: cannot write here ({reason}): earlier checkpoints are intact; {fix} or choose another --workdir, "
            "and run again"
        ) from error


@contextlib.contextmanager
def _read_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{folder}: cannot be read ({reason}): move the folder away to resume from the checkpoint before it"
        ) from error


def _is_empty(value: Any) -> bool:
    return value in ([], {})


def lock_workdir(workdir: Path, spec: dict[str, Any], may_change: Sequence[str] = ()) -> None:
    """Writes `spec.json` to a new workdir, or checks that an existing one equals `spec` except for `may_change`.

    Fields that are newer than the file have the value that keeps its meaning. Only process 0 writes. Raises `UserError`
    with the fields that differ.
    """
    path = workdir / "spec.json"
    if path.exists():
        stored, given = (
            {name.replace("/", "."): leaf for name, leaf in tree.flatten(specs.complete(values), _is_empty).items()}
            for values in (read_json(path) or {}, spec)
        )
        differing = [name for name in sorted({*stored, *given}) if stored.get(name) != given.get(name)]
        differing = [name for name in differing if not name.startswith(tuple(may_change) or "\0")]
        if differing:
            changes = ", ".join(f"{n}: expected {stored.get(n)!r}, got {given.get(n)!r}" for n in differing[:6])
            raise UserError(f"{workdir} holds a run of another spec ({changes}): choose another --workdir")
        return
    if jax.process_index():
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(path, spec)
    except OSError as error:
        raise UserError(f"{workdir}: cannot write here ({error.strerror}): choose another --workdir") from error


def read_spec(workdir: Path) -> dict[str, Any]:
    """The spec stored in a workdir. Raises `UserError` if there is none, or if its compressor cannot be used here."""
    values = read_json(workdir / "spec.json")
    if values is None:
        raise UserError(f"{workdir}: no spec.json, so no run was started here")
    with contextlib.suppress(KeyError, TypeError):  # a spec without one: an error where its fields are read
        if isinstance(name := values["model"]["compressor"]["name"], str):
            catalog.check_installed(name, workdir)
    return values
