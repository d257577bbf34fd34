"""Shared code of the benchmarks against another library: flags, paired measurements, rows and the table.

The two sides are measured in turn, so that other load on the machine affects both; the ratio of each pair counts, and
its spread is reported. Prefill is a call that generates one token; decoding is the time of the other tokens. Both sides
run once, and so compile, before anything is timed.
"""

import argparse
import importlib
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from string import ascii_lowercase
from typing import Any, NamedTuple

import numpy as np

from experiments.flags import whole
from experiments.readme import write_block
from experiments.report import markdown_table
from vlm_jax.cli import ArgumentParser
from vlm_jax.core.errors import UserError
from vlm_jax.core.files import write_json

HERE = Path(__file__).parent
KEY = ("model", "threads", "batch")  # of a row: a new measurement replaces the old one
Row = dict[str, Any]
Generate = Callable[[int], np.ndarray]  # number of new tokens -> generated tokens, int[B, new], on the host
Sides = Callable[[int, int], tuple[Generate, Generate]]  # (rows, prompt tokens) -> (reference, vlm_jax)


class Peer(NamedTuple):
    """Another library, and how both sides load the same weights."""

    name: str  # in beside_NAME (module and rows), and of the block of README.md
    models: tuple[str, ...]  # the first is the default
    visual_tokens: int  # of a prompt
    prompt_tokens: int  # default, including the image
    imports: tuple[str, ...]  # required packages
    versions: Callable[[], dict[str, str]]
    open: Callable[[str, Path, int], Sides]  # (model, an empty folder, threads)


def main(argv: list[str], peer: Peer, doc: str) -> None:
    """Measures all rows, and updates the file and the table after each."""
    module = f"experiments.inference_speed.beside_{peer.name}"
    parser = ArgumentParser(
        prog=f"python -m {module}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=whole(1), default=1, help="cores that each side may use")
    parser.add_argument("--models", nargs="+", default=list(peer.models[:1]), choices=peer.models)
    parser.add_argument("--batches", nargs="+", type=whole(1), default=[1, 8])
    parser.add_argument(
        "--prompt-tokens", type=whole(peer.visual_tokens + 1), default=peer.prompt_tokens, help="including the image"
    )
    parser.add_argument("--new-tokens", type=whole(2), default=32)
    parser.add_argument("--pairs", type=whole(1), default=3, help="measurements of each side")
    parser.add_argument("--folder", type=Path, help="folder for temporary weights")
    parser.add_argument("--out", type=Path, help="write the rows to this file, and no table")
    args = parser.parse_args(argv)
    use_cores(args.threads)
    try:
        for needed in peer.imports:
            importlib.import_module(needed)
    except ImportError as error:
        raise UserError(f"{error} (README.md in this folder lists the packages to install)") from error
    for model in args.models:
        for row in measured(model, peer, args):
            print(json.dumps(row), flush=True)
            rows = keep(args.out or HERE / f"beside_{peer.name}.json", row)
            if not args.out:
                write_block(HERE / "README.md", peer.name, table(rows, peer.name), module)


def measured(model: str, peer: Peer, args: argparse.Namespace) -> Iterator[Row]:
    """A row for each batch size."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        sides = peer.open(model, Path(folder), args.threads)
    settings = {name: getattr(args, name) for name in ("prompt_tokens", "new_tokens", "pairs")}
    settings |= {"cpu": cpu_name(), "versions": peer.versions(), "load": round(os.getloadavg()[0], 1)}
    for batch in args.batches:
        found = measure(*sides(batch, args.prompt_tokens), args.new_tokens, args.pairs, args.threads)
        yield {"model": model, "threads": args.threads, "batch": batch, **settings, **found}


def use_cores(threads: int) -> None:
    """Pins this process to that many of its cores, before jax starts threads."""
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= threads <= len(cores):
        raise UserError(f"--threads: expected 1 to {len(cores)}, got {threads}")
    os.sched_setaffinity(0, cores[:threads])


def measure(reference: Generate, vlm_jax: Generate, new_tokens: int, pairs: int, threads: int) -> Row:
    """Median milliseconds of both sides, and the ratios reference / vlm_jax of paired calls."""
    from rich.console import Console
    from rich.progress import track

    same = float(np.mean(reference(new_tokens) == vlm_jax(new_tokens)))  # and compiles
    reference(1), vlm_jax(1)
    times: dict[str, list[tuple[float, float]]] = {"theirs": [], "ours": []}
    console = Console(stderr=True)
    for _ in track(range(pairs), "measuring", console=console, transient=True, disable=not console.is_terminal):
        for side, generate in (("theirs", reference), ("ours", vlm_jax)):
            prefill, whole = (timed(generate, count, threads) for count in (1, new_tokens))
            times[side].append((prefill, (whole - prefill) / (new_tokens - 1)))
    row: Row = {"same_tokens": round(same, 4)}
    for at, phase in enumerate(("prefill", "token")):
        other, mine = ([pair[at] for pair in times[side]] for side in ("theirs", "ours"))
        row[f"{phase}_ms"] = round(statistics.median(mine) * 1e3, 2)
        row[f"theirs_{phase}_ms"] = round(statistics.median(other) * 1e3, 2)
        row[f"{phase}_ratio"] = sorted(round(a / b, 2) for a, b in zip(other, mine, strict=True))
    return row


def timed(generate: Generate, new_tokens: int, threads: int) -> float:
    """Wall seconds of a call, or CPU seconds on one core, which other load affects less."""
    clock = time.process_time if threads == 1 else time.perf_counter
    start = clock()
    generate(new_tokens)
    return clock() - start


def cpu_name() -> str:
    lines = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return lines[0].partition(":")[2].strip() if lines else platform.processor()


def keep(path: Path, row: Row, key: tuple[str, ...] = KEY) -> list[Row]:
    """Adds the row to a file, replacing one of the same `key`, and returns all rows."""
    rows = json.loads(path.read_text()) if path.is_file() else []
    rows = [old for old in rows if any(old[name] != row[name] for name in key)]
    rows = sorted([*rows, row], key=lambda one: [one[name] for name in key])
    write_json(path, rows)
    return rows


def table(rows: list[Row], peer: str) -> str:
    """The rows as a markdown table, with a legend of how and where they were measured."""
    head = ["model", "cores", "batch", "prefill, ms", peer, "ratio", "each token, ms", peer, "ratio", "same tokens"]
    lines = [[*head, "on a GPU", "measured"]]
    legend: list[str] = []
    for row in rows:
        text = circumstances(row)
        if text not in legend:
            legend.append(text)
        cells = [row["model"], str(row["threads"]), str(row["batch"])]
        for phase in ("prefill", "token"):
            ratios = row[f"{phase}_ratio"]
            spread = f"{ratios[0]:.2f} / **{statistics.median(ratios):.2f}** / {ratios[-1]:.2f}"
            cells += [f"{row[f'{phase}_ms']:.1f}", f"{row[f'theirs_{phase}_ms']:.1f}", spread]
        lines.append([*cells, f"{row['same_tokens']:.1%}", "not measured", ascii_lowercase[legend.index(text)]])
    letters = [f"* {letter}: {text}" for letter, text in zip(ascii_lowercase, legend, strict=False)]
    return "\n".join([markdown_table(lines), "", *letters])


def circumstances(row: Row) -> str:
    """Settings, machine and versions of a row."""
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    sizes = f"prompts of {row['prompt_tokens']} tokens, {row['new_tokens']} new ones"
    load = f", load average {row['load']} before" if "load" in row else ""
    return f"{sizes}, float32, {row['pairs']} pairs; {row['cpu']}{load}; {versions}"
