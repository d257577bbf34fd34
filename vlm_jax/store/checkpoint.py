"""Orbax checkpoints of (state, data cursor, spec): written in the background, complete or not there at all."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from vlm_jax.core.errors import UserError


class Checkpoints:
    """The checkpoints of one workdir. `save` returns at once; `close` waits until what was saved is on disk."""

    def __init__(self, workdir: Path, keep: int = 1):
        self.directory = workdir.absolute() / "checkpoints"
        self.directory.mkdir(parents=True, exist_ok=True)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, cursor: Any, spec: dict[str, Any]) -> None:
        """Raises nothing here; an error of the background write surfaces at the next call."""
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), cursor=ocp.args.JsonSave(cursor), spec=ocp.args.JsonSave(spec)
        )
        self._manager.save(step, args=args)

    def restore(self, step: int, abstract_state: Any, shardings: Any) -> tuple[Any, Any]:
        """State in the given shardings, and the data cursor."""
        target = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), abstract_state, shardings
        )
        args = ocp.args.Composite(state=ocp.args.StandardRestore(target), cursor=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=args)
        return restored["state"], restored["cursor"]

    def close(self) -> None:
        self._manager.wait_until_finished()
        self._manager.close()


def claim(workdir: Path, spec: dict[str, Any], may_change: Sequence[str] = ()) -> None:
    """Writes `spec.json` into a new workdir, or checks that it is this spec's, but for the fields that may change.

    Raises `UserError` where the workdir belongs to another spec, and names the fields that differ.
    """
    path = workdir / "spec.json"
    if path.exists():
        there, asked = _flat(read_spec(workdir)), _flat(spec)
        differing = [name for name in sorted({*there, *asked}) if there.get(name) != asked.get(name)]
        differing = [name for name in differing if not name.startswith(tuple(may_change) or "\0")]
        if differing:
            changes = ", ".join(f"{n}: {there.get(n)!r} there, {asked.get(n)!r} asked" for n in differing[:6])
            raise UserError(f"{workdir} holds a run of another spec ({changes}): choose another --workdir")
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(spec, indent=1, sort_keys=True) + "\n")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{workdir}: cannot write here ({error.strerror}): choose another --workdir") from error


def read_spec(workdir: Path) -> dict[str, Any]:
    """The spec stored in a workdir. Raises `UserError` if there is none."""
    try:
        return json.loads((workdir / "spec.json").read_text())
    except FileNotFoundError:
        raise UserError(f"{workdir}: no spec.json, so no run was started here") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{workdir}/spec.json, line {error.lineno}: not valid JSON ({error.msg})") from None


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted names of the leaves of nested dicts and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
    if items is None or not tree:
        return {prefix: tree}
    return {name: leaf for key, value in items for name, leaf in _flat(value, f"{prefix}.{key}".lstrip(".")).items()}
