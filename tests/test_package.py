"""A built package is enough to train and plan: it has its configs, the study's encoder and the published law."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vlm_jax.config.arguments import load_config
from vlm_jax.core import located
from vlm_jax.core.errors import UserError

ROOT = Path(__file__).parents[1]
PLAN = "--law experiments/published_law/law.json --family reasoning --tflops 2 --top 1 --json"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a wheel of this checkout has."""
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(site)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)
    return site


def run_python(site: Path, folder: Path, *arguments: str) -> str:
    """Standard output of Python in `folder`, which imports the package of `site`."""
    environment = {**os.environ, "PYTHONPATH": str(site), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        cwd=folder, env=environment, check=True, timeout=120, capture_output=True, text=True,
    ).stdout  # fmt: skip


def test_every_config_resolves_outside_a_checkout(installed: Path, tmp_path: Path) -> None:
    """And its checkpoint is in the package."""
    program = """
import vlm_jax
from vlm_jax.config import arguments, resolve, sweep
from vlm_jax.core.located import located
for name in ("vlm.py:smoke", "llava.py", "paligemma.py"):
    checkpoint = resolve.resolve(arguments.load_config(f"configs/{name}")).encoder_checkpoint
    print(located(checkpoint).is_file() if checkpoint else "random")
print(len(sweep.load_grid("configs/grids/size_by_tokens.py").cells), vlm_jax.__file__)
"""
    *checkpoints, grid = run_python(installed, tmp_path, "-c", program).splitlines()
    assert checkpoints == ["True", "random", "random"]
    cells, file = grid.split(maxsplit=1)
    assert int(cells) > 0
    assert Path(file).is_relative_to(installed)


def test_plan_reads_the_published_law_outside_a_checkout(installed: Path, tmp_path: Path) -> None:
    assert "qwen1.5" in run_python(installed, tmp_path, "-m", "vlm_jax.plan", *PLAN.split())


def test_a_file_of_the_working_directory_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("configs/vlm.py")
    assert located.located(path).samefile(ROOT / path)
    path.parent.mkdir()
    assert located.located(path).samefile(ROOT / path)
    path.write_text("")
    assert located.located(path) == path


@pytest.mark.parametrize("path", ["/configs/vlm.py", "../configs/vlm.py", "x" * 5000, "a\0b", "no_such_file"])
def test_other_paths_are_left_alone(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing outside the shipped files is found by a relative path."""
    monkeypatch.chdir(tmp_path)
    assert located.located(path) == Path(path)


@pytest.mark.parametrize("name", ["vlm.py", "configs/vml.py", "experiments/vlm.py"])
def test_an_unknown_config_outside_a_checkout_suggests_those_of_the_package(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape("did you mean 'configs/vlm.py'? valid: configs/llava.py")):
        load_config(f"{name}:smoke")
