"""The cache folder: where it is, and one line where it cannot be."""

import errno
import os
import pwd
from pathlib import Path

import jax
import pytest

from vlm_jax import build
from vlm_jax.config.arguments import load_config
from vlm_jax.config.resolve import resolve
from vlm_jax.core.errors import UserError


def test_a_user_without_a_home_names_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose user id has no name; an empty variable counts as none."""

    def nobody(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.setenv("VLM_JAX_CACHE", "")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    with pytest.raises(UserError, match=r"no cache: .*home.* \(set VLM_JAX_CACHE=FOLDER or HOME=FOLDER\)"):
        build.default_cache()
    monkeypatch.setenv("VLM_JAX_CACHE", "/tmp/cache")
    assert build.default_cache() == Path("/tmp/cache")


@pytest.mark.parametrize("name", ["file", "file/deep", "/proc/nothing", "folder"])
def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "programs").write_text("")
    before = jax.config.jax_compilation_cache_dir
    with pytest.raises(UserError, match=r"the cache cannot be written \(.*\): set VLM_JAX_CACHE to another folder"):
        build.use_compilation_cache(tmp_path / name)
    assert jax.config.jax_compilation_cache_dir == before


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EROFS, "Read-only")])
def test_a_disk_that_fills_while_data_are_prepared_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    def fails(*args: object) -> None:
        raise error

    monkeypatch.setattr(build.run, "open_network", lambda spec: None)
    monkeypatch.setattr(build.run, "_open_run", fails)
    spec = resolve(load_config(str(Path(__file__).parents[1] / "configs" / "vlm.py")))
    with pytest.raises(UserError, match=r"the cache cannot be written .* set VLM_JAX_CACHE") as raised:
        build.open_run(spec, tmp_path)
    assert ("free disk space" in str(raised.value)) == (error.errno == errno.ENOSPC)
    assert os.listdir(tmp_path) == []
