"""What is saved comes back, on any mesh; a workdir belongs to one spec."""

import copy
import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import builders
from vlm_jax.checkpoints.orbax import Checkpoints, disk_errors, lock_workdir, read_spec
from vlm_jax.core import tree
from vlm_jax.core.axes import EMBED, MLP
from vlm_jax.core.errors import RunStopped, UserError
from vlm_jax.core.structs import TrainState
from vlm_jax.distributed import partitioning

SPEC = {"seed": 0, "data": {"format": "prefix", "batch_rows": 32}, "stages": [{"name": "both", "train": ["a"]}]}
PROGRESS = {"secs": 2.5, "nested": {"numbers": [1, 2]}}


def plan(strategy: str, *mesh: int) -> partitioning.Plan:
    return partitioning.make_plan(builders.compute(strategy=strategy, mesh=mesh), jax.devices()[: int(np.prod(mesh))])


def boxed(seed: int = 0) -> TrainState:
    """Values that use all their bits, and one 16-bit leaf."""
    rng = np.random.default_rng(seed)
    kernel, moment = (
        nn.LogicallyPartitioned(jnp.asarray(rng.standard_normal((16, 24)), jnp.float32), (EMBED, MLP)) for _ in range(2)
    )
    moments = (jnp.asarray(3, jnp.int32), moment, jnp.asarray(rng.standard_normal(5), jnp.bfloat16))
    return TrainState(jnp.asarray(seed, jnp.int32), {"decoder": {"kernel": kernel}}, moments)


def placed(state: TrainState, where: partitioning.Plan) -> TrainState:
    return jax.device_put(nn.meta.unbox(state), where.shardings(state))


def test_restored_on_another_mesh_it_is_the_same(tmp_path) -> None:
    """Bit for bit, in the shardings that were asked for, with its progress."""
    store = Checkpoints(tmp_path)
    store.save(4, placed(boxed(), plan("fsdp_tensor", 2, 2, 2)), PROGRESS)
    store.close()
    for where in (plan("fsdp_tensor", 2, 2, 2), plan("fsdp", 1, 8, 1), plan("replicated", 1, 1, 1)):
        store, shardings = Checkpoints(tmp_path), where.shardings(boxed())
        state, progress = store.restore(4, jax.eval_shape(lambda: nn.meta.unbox(boxed())), shardings)
        store.close()
        assert tree.sha256(state) == tree.sha256(nn.meta.unbox(boxed()))
        assert jax.tree.all(
            jax.tree.map(lambda leaf, s: leaf.sharding.is_equivalent_to(s, leaf.ndim), state, shardings)
        )
        assert progress == PROGRESS


def test_what_is_saved_is_the_state_at_that_moment(tmp_path) -> None:
    """The next step may take the buffers at once: the background write has its own copy."""
    store, where = Checkpoints(tmp_path), plan("replicated", 1, 1, 1)
    state = placed(boxed(1), where)
    overwrite = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 0 - 1, state), donate_argnums=0)
    store.save(1, state, PROGRESS)
    overwrite(state)
    store.close()
    store = Checkpoints(tmp_path)
    again, *_ = store.restore(1, jax.eval_shape(lambda: nn.meta.unbox(boxed())), where.shardings(boxed()))
    store.close()
    assert tree.sha256(again) == tree.sha256(nn.meta.unbox(boxed(1)))


def test_the_newest_are_kept_and_the_incomplete_do_not_count(tmp_path) -> None:
    where = plan("replicated", 1, 1, 1)
    store = Checkpoints(tmp_path, keep=2)
    assert store.latest_intact(print) is None
    for step in (2, 4, 6):
        store.save(step, placed(boxed(step), where), PROGRESS)
    store.close()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["4", "6"]
    (tmp_path / "checkpoints" / "8.orbax-checkpoint-tmp").mkdir()
    store = Checkpoints(tmp_path, keep=2)
    assert store.latest_intact(print) == 6
    store.close()


def test_a_workdir_belongs_to_one_spec(tmp_path) -> None:
    """The same spec may come again; another is refused, with the fields that differ and their values."""
    workdir = tmp_path / "deep" / "run"
    lock_workdir(workdir, SPEC)
    assert read_spec(workdir) == SPEC
    assert [path.name for path in workdir.iterdir()] == ["spec.json"]
    lock_workdir(workdir, copy.deepcopy(SPEC))
    other = copy.deepcopy(SPEC)
    other["data"]["batch_rows"] = 64
    other["stages"][0]["train"].append("b")
    with pytest.raises(UserError) as told:
        lock_workdir(workdir, other)
    message = str(told.value)
    assert "data.batch_rows: expected 32, got 64" in message
    assert "stages.0.train.1: expected None, got 'b'" in message
    assert "seed" not in message
    assert "format" not in message
    assert read_spec(workdir) == SPEC


def test_a_workdir_that_cannot_be_written_is_told(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/run: cannot write here .*: choose another --workdir"):
        lock_workdir(tmp_path / "file" / "run", SPEC)


def test_a_disk_that_is_full_is_one_line(tmp_path) -> None:
    """A real one, and as Orbax passes it on from its threads; other errors stay what they are."""

    def fails(error: Exception | None = None) -> None:
        with disk_errors(tmp_path):
            if error is not None:
                raise error
            Path("/dev/full").write_text("x")

    for error in (None, ValueError("INTERNAL: write failed: No space left on device [/run/checkpoints]")):
        with pytest.raises(UserError, match=r"cannot write here \(No space left.*free disk space or choose another"):
            fails(error)
    for error in (ValueError("broken"), RunStopped("saved", 143)):
        with pytest.raises(type(error), match=str(error)):
            fails(error)


def test_a_missing_or_broken_spec_is_told(tmp_path) -> None:
    with pytest.raises(UserError, match=r"no spec\.json, so no run was started here"):
        read_spec(tmp_path)
    (tmp_path / "spec.json").write_text(json.dumps(SPEC, indent=1)[:-9])
    with pytest.raises(UserError, match=r"spec\.json: not valid JSON .*line \d+"):
        lock_workdir(tmp_path, SPEC)


def test_files_and_folders_in_the_place_of_the_other_are_named(tmp_path) -> None:
    """A step that is a file or that lists no files is damaged; names that are no steps do not count."""
    where = plan("replicated", 1, 1, 1)
    store = Checkpoints(tmp_path, keep=9)
    for step in (1, 2):
        store.save(step, placed(boxed(step), where), {"secs": 2.5})
    store.close()
    (tmp_path / "checkpoints" / "2" / "sha256.json").write_text("{}")
    (tmp_path / "checkpoints" / "3").write_text("")
    for name in ("²", "٣", "last", "-4"):
        (tmp_path / "checkpoints" / name).mkdir()
    (tmp_path / "damaged").write_text("")
    damaged: dict[int, str] = {}
    store = Checkpoints(tmp_path, keep=9)
    assert store.latest_intact(damaged.__setitem__) == 1
    assert damaged == {3: "half-written: state is missing", 2: "sha256.json lists no files"}
    with pytest.raises(UserError, match=r"cannot write here \(File exists: .*damaged\)"):
        store.set_aside(2)
    store.close()
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "checkpoints").write_text("")
    with pytest.raises(UserError, match=r"cannot write here \(File exists: .*checkpoints\): .* mend it or choose"):
        Checkpoints(tmp_path / "file")
