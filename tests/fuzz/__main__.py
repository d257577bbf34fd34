"""Tries hostile inputs on every entry that reads outside data: `python -m tests.fuzz --cases 10000`.

Writes TABLE.md beside this file (`--out` names another), and exits with 1 where anything got through.
"""

import argparse
import os
import shlex
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from tests.fuzz import answering, asking, folders, numbers, running, sources
from vlm_jax.core.files import write_text

MODULES = (folders, asking, numbers, sources, answering)
ENTRIES = {name: entry for module in MODULES for name, entry in module.ENTRIES.items()}
SHOWN = 40


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, help="in all, spread evenly over the entries")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--entry", action="append", choices=sorted(ENTRIES), help="only this one")
    parser.add_argument("--skip", action="append", default=[], choices=sorted(ENTRIES), help="not this one")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="where to write the table")
    args = parser.parse_args()
    entries = {name: ENTRIES[name] for name in args.entry or ENTRIES if name not in args.skip}
    each, started = -(-args.cases // len(entries)), time.monotonic()
    cases = [(name, seed) for seed in range(args.first, args.first + each) for name in entries]
    for module in (asking, sources, answering):
        module.warm()
    results = running.run(entries, cases, args.processes)
    counted = [one for one in results if one.kind in running.COUNTED]
    kinds: dict[str, running.Result] = {}
    for one in sorted(counted):
        kinds.setdefault(f"{one.entry} {one.kind} {one.detail[-60:]}", one)
    for one in list(kinds.values())[:SHOWN]:
        print(f"{one.entry} {one.seed}: {one.kind}: {one.detail}")
    lines = running.table(results)
    secs = {name: sum(one.secs for one in results if one.entry == name) for name in entries}
    print("slowest:", ", ".join(f"{name} {secs[name]:.0f} s" for name in sorted(secs, key=secs.get)[:-6:-1]))
    print("\n".join(lines), f"\n{time.monotonic() - started:.0f} s; {len(kinds)} kinds got through")
    if args.out:
        command = f"    python -m tests.fuzz {shlex.join(sys.argv[1:])}\n\n"
        write_text(args.out, f"# Hostile inputs\n\n{command}{running.__doc__}\n" + "\n".join(lines) + "\n")
    return int(bool(counted))


if __name__ == "__main__":
    sys.exit(main())
