"""Compiles every cell of the study with XLA:TPU, one row per cell: `python -m experiments.pod_fit.sweep`.

A row that exists is not compiled again. `--part 0/2` and `--part 1/2` share the cells between two processes. A cell
takes one to three minutes on one core.
"""

import json
import os
import re
from pathlib import Path
from typing import NamedTuple

from vlm_jax.aot import ENVIRONMENT
from vlm_jax.cli import ArgumentParser, run_main
from vlm_jax.core.errors import UserError

HERE = Path(__file__).parent
LLMS = ("qwen1.5-7b", "qwen1.5-0.5b", "qwen1.5-14b", "qwen1.5-1.8b", "qwen1.5-4b")
TOKENS = (16, 144, 1, 576)
# Devices of the tensor axis: one side of a 2D torus, or the third dimension of a 3D one, as most bytes travel along the
# fsdp axis, and two dimensions have more links than one.
PODS = {"v5e:16x16": 16, "v5p:4x4x8": 8}


# What all cells share: 256 rows with one image each, and a compressor that gives any V.
RECIPE = "configs/llava.py:compressor=resampler,pack=none,batch=256"
CONFIG = f"{RECIPE},encoder=siglip-so400m14-384"


class PodCell(NamedTuple):
    """One program: a config's argument, a topology and a mode."""

    arg: str
    topology: str
    mode: str = "train"
    overrides: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        return " ".join((self.mode, self.topology, self.arg, *(f"{k}={v}" for k, v in self.overrides)))


def train_cell(llm: str, tokens: int, pod: str) -> PodCell:
    """A cell of the study's grid."""
    return PodCell(f"llm={llm},tokens={tokens},tensor={PODS[pod]}".replace(",tensor=16", ""), pod)


AUTO = (("compute.remat", "auto"),)
BEST = ", best batch"  # in the name of the second row of a cell with `AUTO`: the batch of `--batch auto`


def fitted_cells() -> list[PodCell]:
    """The train step of a 7B model with the rematerialisation that fits, and the recipe's encoder."""
    grid = [train_cell(LLMS[0], tokens, pod) for tokens in TOKENS[:2] for pod in PODS]
    return [cell._replace(arg=f"{cell.arg},encoder=clip-l14-336", overrides=AUTO) for cell in grid]


def row_names(cell: PodCell) -> list[str]:
    """The names of a cell's rows; a cell with `AUTO` has one at the recipe's batch, and one at a better batch."""
    return [cell.name, cell.name + BEST] if cell.overrides == AUTO else [cell.name]


def cells() -> list[PodCell]:
    """The study, the cells that most depends on first."""
    train = [train_cell(llm, tokens, pod) for tokens in TOKENS for pod in PODS for llm in LLMS]
    serving = (("compute.strategy", "fsdp_tensor"), ("compute.mesh", "(16, 1, 16)"))
    answer = [
        PodCell(f"llm=qwen1.5-7b,tokens={tokens}", "v5e:16x16", mode, serving)
        for tokens in (16, 576) for mode in ("prefill", "decode")
    ]  # fmt: skip
    large = PodCell("llm=gemma2-27b,tokens=144,batch=512,tensor=8", "v5p:8x8x8")
    # What the splash kernel, and the placement of the study, are worth.
    plain = PodCell("llm=qwen1.5-7b,tokens=16", "v5e:16x16", "train", (("compute.attention", "xla"),))
    narrow = PodCell("llm=qwen1.5-7b,tokens=16,tensor=1", "v5e:16x16")
    return [*train[:10], *fitted_cells(), large, *train[10:20], *answer, plain, narrow, *train[20:]]


def part(text: str) -> tuple[int, int]:
    """`"i/n"` as numbers. Raises `UserError` unless 0 <= i < n."""
    found = re.fullmatch(r"([0-9]{1,4})/([0-9]{1,4})", text)
    if not found or int(found[1]) >= int(found[2]):
        raise UserError(f"--part: expected i/n with i from 0 to n - 1, got {text!r}")
    return int(found[1]), int(found[2])


def main(argv: list[str]) -> None:
    """Compiles what is missing."""
    flags = ArgumentParser(prog="python -m experiments.pod_fit.sweep", description=__doc__)
    flags.add_argument("--part", default="0/1", help="i/n: every n-th cell, from the i-th")
    flags.add_argument("--hlo", type=Path, help="keep the programs' texts in this folder")
    args = flags.parse_args(argv)
    index, parts = part(args.part)
    os.environ.update(ENVIRONMENT)
    if args.hlo:
        args.hlo.mkdir(parents=True, exist_ok=True)

    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from vlm_jax.aot import batch, variants
    from vlm_jax.config.arguments import load_config
    from vlm_jax.config.resolve import resolve

    mine = [cell for i, cell in enumerate(cells()) if i % parts == index]
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=len(mine))
        for cell in mine:
            progress.update(bar, description=cell.name)
            if cell.name not in {row["cell"] for row in read()}:
                spec = resolve(load_config(f"{CONFIG},{cell.arg}", dict(cell.overrides)))
                if cell.overrides == AUTO:
                    compiled = batch.best(spec, spec.stages[-1], cell.topology)
                else:
                    compiled = [variants.compile_row(spec, spec.stages[-1], cell.topology, cell.mode)]
                for name, (row, text) in zip(row_names(cell), compiled, strict=False):
                    with (HERE / "rows.jsonl").open("a") as out:
                        out.write(json.dumps({"cell": name, **row}) + "\n")
                    if args.hlo:
                        (args.hlo / f"{name.replace('/', '_')}.txt").write_text(text)
            progress.advance(bar)


def read() -> list[dict]:
    """The rows so far."""
    path = HERE / "rows.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    run_main(main)
