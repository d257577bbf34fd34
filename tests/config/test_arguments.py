"""Overrides change what they name or are refused; whatever goes wrong in a user's file is one line with its number."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlm_jax.config.arguments import load_config
from vlm_jax.config.resolve import resolve
from vlm_jax.config.sweep import load_grid
from vlm_jax.core.errors import UserError

VLM = str(Path(__file__).parents[2] / "configs" / "vlm.py")


@pytest.mark.parametrize(
    ("name", "text", "read", "value"),
    [
        ("compute.mesh.0", "7", lambda spec: spec.compute.mesh, (7, 1, 1)),
        ("compute.mesh.2", "-1", lambda spec: spec.compute.mesh, (-1, 1, -1)),
        ("stages.0.train.0", "decoder", lambda spec: spec.stages[0].train, ("decoder",)),
        ("stages.1.train.1", "encoder", lambda spec: spec.stages[1].train, ("connector", "encoder")),
        ("stages.1.lr_factor", "2", lambda spec: spec.stages[1].peak_lr, 6e-3),
        ("optim.lr_scale.0.1", "5.0", lambda spec: spec.optim.lr_scale, (("^decoder/", 5.0),)),
        ("optim.lr_scale.0.1", "5", lambda spec: spec.optim.lr_scale, (("^decoder/", 5.0),)),
        ("optim.lr_scale.0.0", "kernel", lambda spec: spec.optim.lr_scale[0][0], "kernel"),
        ("optim.lr_scale", "[('a', 1.0), ('b', 0.5)]", lambda spec: spec.optim.lr_scale, (("a", 1.0), ("b", 0.5))),
        ("stages.0.total_steps", "75", lambda spec: spec.stages[0].total_steps, 75),
        ("model.compressor.depth", "2", lambda spec: spec.model.compressor.depth, 2),
        ("seed", str(2**32 - 1), lambda spec: spec.seed, 2**32 - 1),
    ],
)
def test_an_override_changes_what_it_names(name: str, text: str, read: Callable[[Any], Any], value: object) -> None:
    """And nothing else: tuples of the config file are not changed in place."""
    overrides = {name: text} | ({"data.frozen_features": "False"} if "train.1" in name else {})
    config = load_config(f"{VLM}:stages=2", overrides)
    spec = resolve(config)
    assert read(spec) == value
    assert read(resolve(load_config(f"{VLM}:stages=2"))) != value


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("compute.mesh.3", "7", ("'compute.mesh.3'", "valid: 0, 1, 2")),
        ("compute.mesh.-1", "7", ("'compute.mesh.-1'", "valid: 0, 1, 2")),
        ("compute.mesh.²", "7", ("valid: 0, 1, 2",)),
        ("compute.mesh.00", "7", ("valid: 0, 1, 2",)),
        ("compute.mesh.0", "7.5", ("compute.mesh.0: expected a int", "'7.5'")),
        ("compute.mesh.0.0", "7", ("compute.mesh.0=-1",)),
        ("compute.mesh", "7", ("expected a tuple",)),
        ("stages.0", "7", ("expected a field, got a group", "stages.0.name")),
        ("compute", "7", ("expected a field, got a group", "compute.")),
        ("optim.lr_scale.0.1", "much", ("expected a float", "'much'")),
        ("optim.lr_scale.1.1", "1.0", ("'optim.lr_scale.1'", "valid: 0")),
        ("stages.0.steps", "5", ("'stages.0.steps'", "total_steps")),
        ("seed.a", "1", ("inside seed=0",)),
        ("", "1", ("config field ''",)),
        ("seed", "9" * 5000, ("seed: expected a int",)),
        ("seed", "²", ("seed: expected a int",)),
        ("seed", "(" * 10_000, ("seed: expected a int",)),
        ("optim.b1", "1" + "0" * 400, ("optim.b1: expected a float",)),
    ],
)
def test_an_override_of_nothing_is_refused(name: str, text: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as error:
        load_config(VLM, {name: text})
    assert all(part in str(error.value) for part in parts), error.value
    assert len(str(error.value)) < 500


FILES = {
    "def get_config(:\n": r"file\.py:1: expected Python, got",
    "x = 1\n  y = 2\n": r"file\.py:2: expected Python, got unexpected indent",
    "x = '\\ud800'\nprint(x\n": r"file\.py:2: expected Python, got '\(' was never closed",
    "import os\nimport no_such_module\n": r"file\.py:2: ModuleNotFoundError: No module named 'no_such_module'",
    "from os import no_such_name\n": r"file\.py:1: ImportError: cannot import name",
    "\n\n1 / 0\n": r"file\.py:3: ZeroDivisionError: division by zero",
    "raise SystemExit(7)\n": r"file\.py:1: SystemExit: 7",
    "x = 1\n": r"file\.py: expected a function {name}\(arg\), got none",
    "{name} = 3\n": r"file\.py: expected a function {name}\(arg\), got int",
    "\ndef {name}():\n    pass\n": r"file\.py:2: expected a function {name}\(arg\), got one of other parameters",
    "def {name}(arg, more):\n    pass\n": r"file\.py:1: expected a function {name}\(arg\), got one of other parameters",
    "def {name}(*, arg):\n    pass\n": r"file\.py:1: expected a function {name}\(arg\), got one of other parameters",
    "def {name}(arg):\n    pass\n": r"file\.py: expected {name} to return a \w+, got NoneType",
    "def {name}(arg):\n    return 3\n": r"file\.py: expected {name} to return a \w+, got int",
    "def {name}(arg):\n    return [][1]\n": r"file\.py:2: IndexError: list index out of range",
    "def f(): f()\ndef {name}(arg): f()\n": r"file\.py:1: RecursionError",
    "def {name}(arg):\n    raise KeyError('a\\nb')\n": r"file\.py:2: KeyError: 'a\\nb'",
    "def {name}(arg):\n    raise ValueError('a\\nb')\n": r"file\.py:2: ValueError: a b",
    "import json\ndef {name}(arg):\n    json.loads('[')\n": r"file\.py:3: JSONDecodeError",
    "def {name}(arg):\n    exit()\n": r"file\.py:2: SystemExit",
    "from vlm_jax.sizing import zoo\ndef {name}(arg):\n    zoo.decoder('d47')\n": "unknown llm 'd47'",
}


@pytest.mark.parametrize("text", FILES)
@pytest.mark.parametrize(("name", "load"), [("get_config", load_config), ("get_grid", load_grid)])
def test_an_error_in_a_users_file_is_one_line(
    tmp_path: Path, name: str, load: Callable[[str], object], text: str
) -> None:
    (tmp_path / "file.py").write_text(text.replace("{name}", name))
    with pytest.raises(UserError, match=FILES[text].replace("{name}", name)) as error:
        load(str(tmp_path / "file.py"))
    assert "\n" not in str(error.value)


def test_ctrl_c_in_a_users_file_is_not_an_error_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "file.py").write_text("def get_config(arg):\n    raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load_config(str(tmp_path / "file.py"))


@pytest.mark.parametrize("load", [load_config, load_grid])
@pytest.mark.parametrize("content", [b"x = 1\0\n", b"x = '\xff'\n", b"\xff\xfe"])
def test_a_file_that_is_no_text(tmp_path: Path, load: Callable[[str], object], content: bytes) -> None:
    (tmp_path / "file.py").write_bytes(content)
    with pytest.raises(UserError, match=r"file\.py"):
        load(str(tmp_path / "file.py"))


@pytest.mark.parametrize("load", [load_config, load_grid])
@pytest.mark.parametrize("name", ["a.txt", "folder.py", "none.py", "x" * 5000, "a\0b", "fifo.py/x", "."])
def test_a_path_that_is_no_config(tmp_path: Path, load: Callable[[str], object], name: str) -> None:
    (tmp_path / "a.txt").write_text("def get_config(arg): pass\n")
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(UserError, match=r"config file|expected a Python file"):
        load(str(tmp_path / name))


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ("param('a', 1, 1)", "'a=1' 2 times"),
        ("3", r"expected Grid\(CONFIG, CELLS\)"),
        ("(3,)", "cell 0: expected a dict of arguments, got 3"),
        ("param('a', 1, '../../b')", r"cell 1: expected arguments that make the name of a folder, got 'a=\.\./\.\./b'"),
        ("param('a', 'x' * 300)", "cell 0: expected arguments that make the name of a folder"),
        (r"param('a', 'x\n')", "cell 0: expected arguments that make the name of a folder"),
        (r"param('a', '\ud800')", "cell 0: expected arguments that make the name of a folder"),
        ("product(param('a', 1), 3)", r"file\.py:3: Type\w*Error"),
    ],
)
def test_cells_that_are_no_grid(tmp_path: Path, cells: str, message: str) -> None:
    text = "from vlm_jax.config.sweep import Grid, param, product\ndef get_grid(arg):\n    return Grid('x.py', {})\n"
    (tmp_path / "file.py").write_text(text.replace("{}", cells))
    with pytest.raises(UserError, match=message):
        load_grid(str(tmp_path / "file.py"))


def test_a_relative_path_has_its_line_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file.py").write_text("\n\n1 / 0\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^file\.py:3: ZeroDivisionError"):
        load_config("file.py")
