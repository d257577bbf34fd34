"""Every speed claim of the project, measured beside something: `python -m experiments.bench` (or `make bench`).

    python -m experiments.bench --list          # the benchmarks, what they need, and whether it is installed
    python -m experiments.bench --show          # the table of the committed results; measures nothing
    python -m experiments.bench train_step law  # these alone; --list and --show take names as well

Runs each benchmark as a module of its own and prints one row for each result: milliseconds here and at the peer, the
ratio peer / here of interleaved measurements (minimum / median / maximum, above 1 is faster here), the clock, load
average and machine. A benchmark whose peer is not installed is left out and listed, and its committed row stays. Writes
docs/speed.md, also where a benchmark failed; the exit code is 2 then.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from experiments.readme import write_block
from experiments.report import markdown_table
from experiments.training_speed.cells import APART
from vlm_jax.cli import ArgumentParser, run_main
from vlm_jax.core.errors import UserError, unknown

EXPERIMENTS = Path(__file__).parent
PAGE = EXPERIMENTS.parent / "docs" / "speed.md"


CPU, WALL = "CPU", "wall"  # seconds of the processor, or by the clock


class Line(NamedTuple):
    """One result."""

    work: str
    here: float  # milliseconds
    peer: str
    theirs: float
    ratios: list[float]  # of the pairs, or of the medians alone
    clock: str
    circumstances: str


class Comparison(NamedTuple):
    """A module that measures, and how its file is read."""

    module: str
    results: str  # file
    lines: Callable[[Any], Iterator[Line]]
    needs: tuple[str, ...] = ()  # packages of the peer
    args: tuple[str, ...] = ()
    threads: tuple[int, ...] = ()  # it runs once with each number that this machine has cores for


def _machine(result: dict[str, Any]) -> str:
    load = f", load {result['load']}" if "load" in result else ""
    return f"{result.get('cpu', 'unknown processor')}{load}"


def _loss(result: Any) -> Iterator[Line]:
    for row in result["rows"]:
        work = f"output embedding and loss, vocabulary of {row['words']:,}, {row['share']:.0%} of positions with weight"
        ratios = [1 / ratio for ratio in row["ratio"]]
        here, theirs = 1e3 * row["ours_secs"], 1e3 * row["plain_secs"]
        yield Line(work, here, "log_softmax of all", theirs, ratios, CPU, _machine(result))


def _cells(result: Any) -> Iterator[Line]:
    machine, one, several = _machine(result), result["warm"]["secs"], result["several"]
    cold = result["cold"]["secs"]
    yield Line("a cell of the grid, programs cached", 1e3 * one, "not cached", 1e3 * cold, [cold / one], CPU, machine)
    here, work = several["launch_secs"], f"{several['cells']} cells, one launch"
    for key, peer in APART.items():
        if key in several:
            yield Line(work, 1e3 * here, peer, 1e3 * several[key], [several[key] / here], CPU, machine)


def _answering(peer: str) -> Callable[[Any], Iterator[Line]]:
    def lines(rows: Any) -> Iterator[Line]:
        for row in rows:
            for phase, work in (("prefill", f"prefill of {row['prompt_tokens']}"), ("token", "a token")):
                name = f"{work}, {row['model']}, batch {row['batch']}, {row['threads']} thread(s)"
                ratios = row[f"{phase}_ratio"]
                clock = CPU if row["threads"] == 1 else WALL
                yield Line(name, row[f"{phase}_ms"], peer, row[f"theirs_{phase}_ms"], ratios, clock, _machine(row))

    return lines


def _evaluation(result: Any) -> Iterator[Line]:
    for part, work in (("suite", "evaluation of a benchmark"), ("training", "evaluation in training, a batch")):
        one = result[part]
        ratios = [1 / ratio for ratio in one["wall_ratio"]]
        here, theirs = 1e3 * one["wall_secs"], 1e3 * one["generate_wall_secs"]
        yield Line(work, here, "`generate`", theirs, ratios, WALL, _machine(result))


def _images(result: Any) -> Iterator[Line]:
    for row in result["rows"]:
        here, before = (1e3 / row[name] for name in ("current", "replaced"))
        work = f"an image for {row['encoder']}"
        yield Line(work, here, "the previous code", before, row["ratio"], CPU, _machine(result))


def _packing(result: Any) -> Iterator[Line]:
    for step in result["steps"]:
        fit, none = (1e3 * step[name]["secs"] / step[name]["conversations"] for name in ("fit", "none"))
        work = f"training, a conversation, V = {step['tokens']}, packed"
        yield Line(work, fit, "one a row", none, [none / fit], WALL, _machine(result))


def _law(result: Any) -> Iterator[Line]:
    imports = statistics.median(result["import"])
    for name, work in (("fit_law", "`fit_law` of 56 rows"), ("plan", f"`plan` over {result['combinations']:,} models")):
        here = statistics.median(result[name])
        ratios = sorted(other / own for own, other in zip(result[name], result["import"], strict=True))
        yield Line(work, 1e3 * here, "importing jax, flax", 1e3 * imports, ratios, CPU, _machine(result))


def _search(result: Any) -> Iterator[Line]:
    for name, peer in (("loop_secs", "the paper's search, loops"), ("vectorised_secs", "the same, vectorised")):
        here, theirs = result["fit_ms"], 1e3 * result[name]
        yield Line("one fit of the law", here, peer, theirs, [theirs / here], WALL, _machine(result))


def _train_step(result: Any) -> Iterator[Line]:
    for row in result["rows"]:
        work = f"a training step, vocabulary of {row['words']:,}"
        here, theirs = 1e3 * row["ours_secs"], 1e3 * row["theirs_secs"]
        yield Line(work, here, "big_vision", theirs, row["ratio"], WALL, _machine(result))


COMPARISONS = {
    "train_step": Comparison(
        "training_speed.beside_big_vision", "training_speed/beside_big_vision.json", _train_step,
        ("big_vision", "tensorflow"),
    ),
    "loss": Comparison("training_speed.loss", "training_speed/loss.json", _loss),
    "packing": Comparison("data_speed.packing", "data_speed/packing.json", _packing),
    "transformers": Comparison(
        "inference_speed.beside_transformers", "inference_speed/beside_transformers.json",
        _answering("transformers"), ("torch", "transformers"), ("--pairs", "5"), threads=(1, 2, 4),
    ),
    "big_vision": Comparison(
        "inference_speed.beside_big_vision", "inference_speed/beside_big_vision.json",
        _answering("big_vision"), ("big_vision", "tensorflow"),
    ),
    "evaluation": Comparison("inference_speed.evaluation", "inference_speed/evaluation.json", _evaluation),
    "cells": Comparison("training_speed.cells", "training_speed/cells.json", _cells),
    "images": Comparison("data_speed.images", "data_speed/images.json", _images),
    "law": Comparison("published_law.commands", "published_law/commands.json", _law),
    "search": Comparison("published_law.benchmark", "published_law/benchmark.json", _search),
}  # fmt: skip


def main(argv: list[str]) -> None:
    parser = ArgumentParser(
        prog="python -m experiments.bench", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("names", nargs="*", help=f"of {', '.join(COMPARISONS)}; none: all")
    parser.add_argument("--list", action="store_true", help="print the benchmarks and the packages of their peers")
    parser.add_argument("--show", action="store_true", help="print the table of the committed results")
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in COMPARISONS:
            raise unknown("benchmark", name, COMPARISONS)
    chosen = args.names or list(COMPARISONS)
    if args.list:
        for name in chosen:
            benchmark = COMPARISONS[name]
            missing = _missing(benchmark)
            states = (f"{need} ({'missing' if need in missing else 'installed'})" for need in benchmark.needs)
            needs = f"needs {', '.join(states)}" if benchmark.needs else ""
            print(f"{name:>12}  {benchmark.module:<36}  {needs}".rstrip())
        return
    if args.show:
        print(table(chosen))
        return
    failed = _run(chosen)
    text = table()
    print(text)
    write_block(PAGE, "speed", text, "experiments.bench")
    if failed:
        raise UserError(
            f"{', '.join(failed)} failed (python -m experiments.MODULE shows why; --list names the modules)"
        )


def _missing(benchmark: Comparison) -> list[str]:
    return [name for name in benchmark.needs if importlib.util.find_spec(name) is None]


def commands(benchmark: Comparison) -> list[list[str]]:
    """The command lines of a benchmark: one, or one for each number of threads."""
    command = [sys.executable, "-m", f"experiments.{benchmark.module}", *benchmark.args]
    cores = len(os.sched_getaffinity(0))
    return [[*command, "--threads", str(n)] for n in benchmark.threads if n <= cores] or [command]


def _run(names: list[str]) -> list[str]:
    """Runs the benchmarks one after the other; one that fails does not stop the others. Returns the names of those that
    failed."""
    failed = []
    for number, name in enumerate(names, 1):
        benchmark = COMPARISONS[name]
        if missing := _missing(benchmark):
            print(f"[{number}/{len(names)}] {name}: left out, needs {', '.join(missing)}", file=sys.stderr)
            continue
        for command in commands(benchmark):
            shown = " ".join(("python", *command[1:]))
            print(f"[{number}/{len(names)}] {name}: {shown}", file=sys.stderr, flush=True)
            if subprocess.run(command, stdout=subprocess.DEVNULL).returncode and name not in failed:
                failed.append(name)
    return failed


def table(names: Iterable[str] = COMPARISONS) -> str:
    """The rows of the results there are."""
    lines = [["work", "here, ms", "peer", "peer, ms", "peer / here", "clock", "machine"]]
    for name in names:
        benchmark = COMPARISONS[name]
        path = EXPERIMENTS / benchmark.results
        for line in benchmark.lines(json.loads(path.read_text())) if path.is_file() else ():
            low, middle, high = (of(line.ratios) for of in (min, statistics.median, max))
            ratio = f"{low:.2f} / **{middle:.2f}** / {high:.2f}" if len(line.ratios) > 1 else f"**{middle:.2f}**"
            times = f"{line.here:,.1f}", line.peer, f"{line.theirs:,.1f}"
            lines.append([line.work, *times, ratio, line.clock, line.circumstances])
    return markdown_table(lines)


if __name__ == "__main__":
    run_main(main)
