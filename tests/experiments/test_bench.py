"""The table of the benchmarks, what is run for it, and the cells that one launch is measured beside."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from experiments import bench
from experiments.training_speed import cells
from vlm_jax.core.errors import UserError


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A page of its own, and no benchmark is really run."""
    path = tmp_path / "speed.md"
    path.write_text("<!-- speed: written by python -m experiments.bench -->\n<!-- end of speed -->\n")
    monkeypatch.setattr(bench, "PAGE", path)
    return path


def run_with(monkeypatch: pytest.MonkeyPatch, fails: str) -> list[list[str]]:
    """Commands that are run from now on; those with `fails` in their module's name fail."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=int(fails in command[2]))

    monkeypatch.setattr(bench, "subprocess", SimpleNamespace(run=run, DEVNULL=None))
    return commands


def test_the_page_is_that_of_the_results() -> None:
    assert bench.table() in bench.PAGE.read_text()
    cells_page = (cells.HERE / "README.md").read_text()
    assert cells.table(json.loads((cells.HERE / "cells.json").read_text())) in cells_page


def test_the_table_is_written_where_a_benchmark_fails(
    page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = run_with(monkeypatch, fails="commands")
    with pytest.raises(UserError, match=r"^law failed"):
        bench.main(["law", "loss"])
    assert len(commands) == 2
    assert bench.table() in page.read_text()
    assert bench.table() in capsys.readouterr().out


@pytest.mark.parametrize(("cores", "threads"), [(1, ["1"]), (2, ["1", "2"]), (3, ["1", "2"]), (8, ["1", "2", "4"])])
def test_transformers_is_measured_with_as_many_threads_as_there_are_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, threads: list[str]
) -> None:
    monkeypatch.setattr(bench, "os", SimpleNamespace(sched_getaffinity=lambda _: set(range(cores))))
    commands = bench.commands(bench.COMPARISONS["transformers"])
    assert [command[command.index("--threads") + 1] for command in commands] == threads
    assert bench.commands(bench.COMPARISONS["loss"]) == [[sys.executable, "-m", "experiments.training_speed.loss"]]


def test_show_and_list_take_names(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = page.read_text()
    bench.main(["--show", "law"])
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.split("|")[1].split()[0] for line in lines[2:]] == ["`fit_law`", "`plan`"]
    bench.main(["--list", "transformers", "loss"])
    first, second = capsys.readouterr().out.splitlines()
    state = r"\((installed|missing)\)"
    assert re.search(rf"needs torch {state}, transformers {state}$", first)
    assert second.split() == ["loss", "training_speed.loss"]
    assert page.read_text() == before


def test_a_row_names_its_clock() -> None:
    clocks = {}
    for name, benchmark in bench.COMPARISONS.items():
        result = json.loads((bench.EXPERIMENTS / benchmark.results).read_text())
        clocks[name] = {line.clock for line in benchmark.lines(result)}
    assert clocks["transformers"] == {bench.CPU, bench.WALL}  # of one thread, of two
    assert {name for name, found in clocks.items() if found == {bench.WALL}} == {
        "train_step", "packing", "evaluation", "search",
    }  # fmt: skip


def test_launches_of_a_third_seed_count_as_those_of_the_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 10 seconds for a launch that finds no program, 3 for one that finds some, and 1 for one that finds all."""
    cached: set[str] = set()

    def launch(folder: Path, arg: str, cold: bool = False) -> dict[str, float]:
        if cold:
            cached.clear()
        shape = arg.partition(",seeds")[0]
        secs = 1.0 if shape in cached else 3.0 if cached else 10.0
        cached.add(shape)
        return {"secs": secs, "programs": 1}

    monkeypatch.setattr(cells, "launch", launch)
    found = cells.measure(tmp_path, 400)
    several = found["several"]
    assert (several["cells"], several["launch_secs"]) == (12, 10.0)
    assert (several["first_secs"], several["second_secs"]) == (10 + 3 * 3, 4)
    assert several["apart_secs"] == 19 + 2 * 4
    assert several["uncached_secs"] == 3 * 4 * 10
    assert "12 cells, a launch for each, one program cache | 27.0 (2.7 times as many)" in cells.table(found)
    peers = {line.peer: line.theirs for line in bench.COMPARISONS["cells"].lines(found)}
    assert peers[cells.APART["apart_secs"]] == 27_000
