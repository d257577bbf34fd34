"""The pages name files, modules, flags and config arguments that exist."""

import contextlib
import functools
import importlib.util
import io
import itertools
import math
import re
import shlex
from pathlib import Path

import pytest

from vlm_jax.config.arguments import load_config
from vlm_jax.config.resolve import resolve
from vlm_jax.config.sweep import load_grid
from vlm_jax.core import specs

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/*.md"))]
_COMMAND = re.compile(r"python -m (vlm_jax[.\w]*|experiments[.\w]*)([^`#\n]*)")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """(module, arguments) of every command of a page, lines that end in a backslash count as one."""
    text = re.sub(r"\\\n\s*", " ", page.read_text()).replace(", data=", ",data=")
    return [(module, shlex.split(rest.split("`")[0])) for module, rest in _COMMAND.findall(text)]


@functools.cache
def flags_of(module: str) -> set[str]:
    """What `--help` of a command lists."""
    spec = importlib.util.find_spec(module)
    assert spec is not None, module
    main = importlib.import_module(f"{module}.__main__" if spec.submodule_search_locations else module).main
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit):
        main(["--help"])
    return set(re.findall(r"--[a-z-]+", printed.getvalue()))


@each_page
def test_links_lead_to_files(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        assert link.startswith("https://") or (page.parent / link).exists(), link


@each_page
def test_commands_have_modules_and_flags(page: Path) -> None:
    for module, arguments in commands(page):
        flags = {flag for flag in arguments if re.fullmatch("--[a-z-]+", flag)}
        assert flags <= flags_of(module) if flags else importlib.util.find_spec(module), module


@each_page
def test_configs_have_the_arguments(page: Path) -> None:
    for module, arguments in commands(page):
        for flag, value in itertools.pairwise(arguments):
            overrides = dict(name.removeprefix("--config.").split("=") for name in arguments if "--config." in name)
            if flag == "--config":
                load_config(value, overrides)
            if flag == "--grid" and value.endswith(".py"):
                assert load_grid(value).cells, module


@each_page
def test_batches_divide_over_the_chips_of_a_topology(page: Path) -> None:
    for module, arguments in commands(page):
        if module == "vlm_jax.aot" and "--batch" not in arguments:
            config, topologies = (arguments[arguments.index(flag) + 1] for flag in ("--config", "--topology"))
            spec = resolve(load_config(config))
            chips = math.prod(map(int, topologies.split(":")[1].split("x")))
            assert {specs.data_of(spec, stage).batch_rows % chips for stage in spec.stages} == {0}, topologies


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 120
