"""No byte of a checkpoint changes unnoticed."""

from pathlib import Path

import flax.linen as nn
import jax
import pytest

from tests.checkpoints.test_orbax import boxed, placed, plan
from vlm_jax.checkpoints import integrity
from vlm_jax.checkpoints.orbax import Checkpoints, restore_params
from vlm_jax.core import tree
from vlm_jax.core.errors import UserError

# Orbax writes these when the digests have been taken, and does not need them to restore.
UNSIGNED = ("_CHECKPOINT_METADATA", "commit_success.txt", "sha256.json")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A workdir with checkpoints of steps 1, 2 and 3."""
    store = Checkpoints(tmp_path, keep=9)
    for step in (1, 2, 3):
        store.save(step, placed(boxed(step), plan("fsdp", 1, 2, 1)), {"secs": 2.5})
    store.close()
    return tmp_path


def newest(workdir: Path) -> tuple[int | None, dict[int, str]]:
    store, told = Checkpoints(workdir, keep=9), {}
    step = store.latest_intact(told.__setitem__)
    store.close()
    return step, told


def test_every_file_that_holds_data_is_signed(saved: Path) -> None:
    """Whichever of them has a bit flipped, loses its end or is gone: it is named, and sound again when put back."""
    folder = saved / "checkpoints" / "3"
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in UNSIGNED]
    assert len(paths) >= 8
    assert integrity.damage(folder) == ""
    for number, path in enumerate(paths):
        content = path.read_bytes()
        place = (7 * number) % len(content)
        flipped = content[:place] + bytes([content[place] ^ 1 << number % 8]) + content[place + 1 :]
        for spoilt in (flipped, content[:-1], content + b"\0", None):
            path.unlink() if spoilt is None else path.write_bytes(spoilt)
            assert str(path.relative_to(folder)) in integrity.damage(folder)
            path.write_bytes(content)
    assert integrity.damage(folder) == ""


def test_the_one_before_is_used(saved: Path) -> None:
    (saved / "checkpoints" / "3" / "sha256.json").write_text("{")
    (saved / "checkpoints" / "2" / "progress" / "metadata").write_text("{}")
    step, told = newest(saved)
    assert step == 1
    assert "sha256.json cannot be read" in told[3]
    assert "progress/metadata has 2 bytes" in told[2]
    store = Checkpoints(saved, keep=9)
    assert store.set_aside(3) == saved / "damaged" / "3"
    assert (saved / "damaged" / "3" / "state").is_dir()
    store.save(3, placed(boxed(7), plan("fsdp", 1, 2, 1)), {})  # its step is free again
    store.close()
    assert newest(saved)[0] == 3


def test_where_none_is_sound_it_is_told(saved: Path) -> None:
    for step in (1, 2, 3):
        (saved / "checkpoints" / str(step) / "state" / "manifest.ocdbt").unlink()
    with pytest.raises(UserError, match=r"every checkpoint is damaged \(step 3: state/manifest.ocdbt is missing\)"):
        newest(saved)
    assert newest(saved.parent / "empty")[0] is None


def test_a_half_written_one_is_skipped(saved: Path) -> None:
    """Without digests, whether or not data is gone too; or without a whole part."""
    (saved / "checkpoints" / "2" / "sha256.json").unlink()
    for path in sorted((saved / "checkpoints" / "3" / "progress").rglob("*"), reverse=True):
        path.unlink()
    (saved / "checkpoints" / "3" / "progress").rmdir()
    told = {3: "half-written: progress is missing", 2: "half-written: sha256.json is missing"}
    assert newest(saved) == (1, told)
    (saved / "checkpoints" / "2" / "state" / "manifest.ocdbt").unlink()
    assert newest(saved) == (1, told)


def params_of(seed: int) -> dict:
    return nn.meta.unbox(boxed(seed)).params


def test_parameters_come_back_alone(saved: Path) -> None:
    """In the shardings asked for, of the newest sound checkpoint; shapes of the rest are not even known."""
    where, told = plan("fsdp_tensor", 2, 2, 2), {}

    def restored(least_step: int = 0) -> dict:
        shardings = where.shardings(jax.eval_shape(lambda: boxed().params))
        return restore_params(saved, jax.eval_shape(lambda: params_of(0)), shardings, told.__setitem__, least_step)

    got = restored(least_step=3)
    assert tree.sha256(got) == tree.sha256(params_of(3))
    assert got["decoder"]["kernel"].sharding.mesh == where.mesh
    (saved / "checkpoints" / "3" / "progress" / "metadata").unlink()
    assert tree.sha256(restored()) == tree.sha256(params_of(2))
    assert list(told) == [3]
    with pytest.raises(UserError, match=r"expected a checkpoint of step 3, .* step 2; step 3 is damaged: progress/"):
        restored(least_step=3)


def test_some_are_kept_for_good(tmp_path: Path) -> None:
    store, where = Checkpoints(tmp_path, keep=1, keep_every_steps=4), plan("replicated", 1, 1, 1)
    for step in range(1, 11):
        store.save(step, placed(boxed(step), where), {})
    store.close()
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [4, 8, 10]


def test_no_such_workdir(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint here"):
        restore_params(tmp_path, {}, {}, print)
