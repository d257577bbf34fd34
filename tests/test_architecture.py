"""The house: every file has a floor, imports only go down, siblings on one floor do not import each other."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    "core": 0,
    "ops": 1,
    "compress": 2,
    "sizing": 3,
    "config": 4,
    "distributed": 5,
    "models": 5,
    "data": 5,
    "evaluation.results": 5,
    "training.metrics": 5,
    "checkpoints": 6,
    "inference.sampling": 6,
    "training": 6,
    "scaling": 6,
    "studies": 6,
    "inference.programs": 7,
    "evaluation": 7,
    "build": 7,
    "logbook": 8,
    "bad_steps": 8,
    "job": 9,
    "cli": 9,
    "inference": 9,
}
COMMANDS = 10
FILES = sorted(ROOT.glob("vlm_jax/**/*.py"))


def folder_of(dotted: str) -> str:
    """`vlm_jax.models.vlm` -> `models`; a file with a floor of its own counts as its own folder."""
    parts = dotted.split(".")
    own = ".".join(parts[1:3])
    return own if own in FLOORS else parts[1] if len(parts) > 1 else ""


def floor(name: str) -> int:
    return FLOORS.get(name, COMMANDS)


def imports(path: Path) -> list[str]:
    """Every project module that a file imports, at its top or inside a function."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom) and node.module:
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            is_file = lambda name: (ROOT / f"{name.replace('.', '/')}.py").exists()  # noqa: E731
            found += [name if node.module == "vlm_jax" or is_file(name) else node.module for name in inside]
    return [name for name in found if name.split(".")[0] in ("vlm_jax", "experiments", "tests")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_go_down(path: Path) -> None:
    dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    mine = folder_of(dotted)
    if mine in ("", "__init__"):
        return
    for name in imports(path):
        assert name.startswith("vlm_jax"), f"the library does not import {name}"
        other = folder_of(name)
        if other in ("", mine, "__version__"):
            continue
        assert floor(other) < floor(mine), f"{dotted} (floor {floor(mine)}) imports {name} (floor {floor(other)})"


def test_no_files_import_each_other() -> None:
    """Nor in a wider circle."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}
    graph = {}
    for name, path in modules.items():
        named = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        inside = {f"{node.module}.{alias.name}" for node in named for alias in node.names}
        graph[name] = (inside | {node.module for node in named} | set(imports(path))) & set(modules)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_only_partitioning_says_mesh() -> None:
    words = ("PartitionSpec", "make_mesh", "NamedSharding")
    speakers = {str(p.relative_to(ROOT)) for p in FILES if any(word in p.read_text() for word in words)}
    assert speakers == {"vlm_jax/distributed/partitioning.py"}


def test_no_file_of_a_thousand_ideas() -> None:
    """No module outgrows what one can hold in mind, and none is named after having no subject."""
    for path in FILES:
        assert len(path.read_text().splitlines()) <= 400, path
        assert path.stem not in ("utils", "common", "helpers", "misc", "base"), path


def test_no_two_public_types_have_one_name() -> None:
    """A name means one thing in the library and in the experiments."""
    named: dict[str, list[str]] = {}
    for path in (*FILES, *ROOT.glob("experiments/**/*.py")):
        for node in ast.parse(path.read_text()).body:
            target = node.targets[0] if isinstance(node, ast.Assign) else node
            name = getattr(target, "name", getattr(target, "id", ""))
            is_type = isinstance(node, ast.ClassDef) or (isinstance(node, ast.Assign) and not name.isupper())
            if is_type and name[:1].isupper():
                named.setdefault(name, []).append(str(path.relative_to(ROOT)))
    assert {name: paths for name, paths in named.items() if len(paths) > 1} == {}
