"""Disturb a small training run in every way we know, and write down what it did.

    python -m experiments.faults.run --workdir workdirs/faults              # everything; about half an hour on one core
    python -m experiments.faults.run --workdir workdirs/faults --kills 2 --only kills

Renews its parts of results.json and the tables of README.md, unless --kills asks for fewer than fifty.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from experiments import readme, report
from experiments.faults import bad_batches, damage, kills, together, victim
from vlm_jax.cli import ArgumentParser, run_main
from vlm_jax.core.errors import UserError

FOLDER = Path(__file__).parent
KILLS = 50
# Cases of each part, for the progress bar.
PARTS = {"kills": KILLS, "checkpoints": 16, "signals": 2, "disks": 2, "bad_steps": 4, "processes": 6}


def cases(part: str, folder: Path, cache: Path, undisturbed: Path, count: int) -> Iterator[Any]:
    if part == "kills":
        yield from kills.kills(folder, cache, undisturbed, count)
    elif part == "checkpoints":
        yield from damage.broken_checkpoints(folder, cache, undisturbed)
        yield damage.all_broken(folder, cache)
    elif part == "signals":
        yield from damage.sigterm(folder, cache, undisturbed)
    elif part == "disks":
        yield from damage.full_disk(folder, cache, undisturbed)
    elif part == "bad_steps":
        yield from bad_batches.bad_batches(folder, cache)
    else:
        yield from together.layouts(folder, cache, undisturbed)
        yield from together.endings(folder, cache)


def _without_path(value: Any, workdir: Path) -> Any:
    return value.replace(str(workdir.absolute()), "...") if isinstance(value, str) else value


def kill_table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """One line for each thing that a kill struck."""
    head = ["it was", "kills", "moments, s", "steps logged", "checkpoint there", "same end"]
    table = [head]
    for doing, count in Counter(row["doing"] for row in rows).most_common():
        mine = [row for row in rows if row["doing"] == doing]
        span = lambda name, mine=mine: f"{min(r[name] for r in mine):g} to {max(r[name] for r in mine):g}"  # noqa: E731
        same = sum(row["same"] for row in mine)
        spans = (span(name) for name in ("after_secs", "logged_step", "checkpoint"))
        table.append([doing, str(count), *spans, f"{same} of {count}"])
    table.append(["all", str(len(rows)), "", "", "", f"{sum(row['same'] for row in rows)} of {len(rows)}"])
    return table


def case_table(rows: list[dict[str, Any]]) -> list[list[str]]:
    head = [["fault", "exit code", "as promised", "it said"]]
    return head + [
        [r["fault"], str(r["code"]), "yes" if r["promised"] else "NO", f"`{r['said'][:240]}`" if r["said"] else ""]
        for r in rows
    ]


def layout_table(rows: list[dict[str, Any]]) -> list[list[str]]:
    head = [
        ["processes x devices", "from step", "largest relative difference of a loss", f"below {together.TOLERANCE:g}"]
    ]
    return head + [
        [
            f"{r['processes']} x {r['devices']}",
            str(r["from_step"]),
            f"{r['largest_difference']:.1e}",
            "yes" if r["within"] else "NO",
        ]
        for r in rows
    ]


def write(parts: dict[str, list[dict[str, Any]]]) -> None:
    """results.json with these parts renewed, and the tables."""
    path = FOLDER / "results.json"
    results = (json.loads(path.read_text()) if path.exists() else {}) | parts
    path.write_text(json.dumps(results, indent=1) + "\n")
    others = [row for part in PARTS if part != "kills" for row in results.get(part, ()) if "fault" in row]
    tables = {
        "kills": kill_table(results.get("kills", [])),
        "faults": case_table(others),
        "layouts": layout_table([row for row in results.get("processes", ()) if "devices" in row]),
    }
    for name, table in tables.items():
        readme.write_block(FOLDER / "README.md", name, report.markdown_table(table), "experiments.faults.run")


def main(argv: list[str]) -> int:
    parser = ArgumentParser(
        prog="python -m experiments.faults.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--workdir", required=True, type=Path, help="where the disturbed runs and a cache of their own go"
    )
    parser.add_argument("--kills", type=int, default=KILLS, help="how often to kill -9")
    parser.add_argument("--only", choices=PARTS, help="one part")
    args = parser.parse_args(argv)
    if args.workdir.exists():
        raise UserError(f"{args.workdir} exists: name a new folder")
    parts = PARTS if args.only is None else {args.only: PARTS[args.only]}
    cache, undisturbed = args.workdir / "cache", args.workdir / "runs" / "undisturbed"
    results: dict[str, list[dict[str, Any]]] = {}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        bar = progress.add_task(
            "undisturbed run", total=sum(args.kills if p == "kills" else n for p, n in parts.items())
        )
        if victim.finish(undisturbed, cache):
            raise UserError(f"the undisturbed run failed: {victim.last_line(undisturbed)}")
        for part in parts:
            progress.update(bar, description=part)
            results[part] = []
            for case in cases(part, args.workdir / part, cache, undisturbed, args.kills):
                row = {name: _without_path(value, args.workdir) for name, value in case._asdict().items()}
                results[part].append(row)
                progress.console.print(json.dumps(row), soft_wrap=True, highlight=False)
                progress.advance(bar)
    if args.kills >= KILLS:
        write(results)
    bad = [
        row for rows in results.values() for row in rows if not row.get("same", row.get("promised", row.get("within")))
    ]
    print(f"{sum(map(len, results.values())) - len(bad)} as promised, {len(bad)} not")
    return 1 if bad else 0


if __name__ == "__main__":
    run_main(main)
