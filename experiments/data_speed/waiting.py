"""How long training waits for its data, with the encoder's features stored.

    python -m experiments.data_speed.waiting

Trains the study's recipes for some steps, and measures the time that the loop spends in taking the next batch from the
prefetched iterator, beside the time of all steps. Writes to README.md.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.flags import whole
from experiments.readme import write_block
from experiments.report import markdown_table
from vlm_jax.cli import ArgumentParser, run_main

HERE = Path(__file__).parent
CONFIGS = (
    "configs/vlm.py:llm=d24,tokens=1,family=ocr",
    "configs/vlm.py:llm=d48,tokens=4,family=facts",
    "configs/vlm.py:llm=d96,tokens=16,family=scene",
    "experiments/easy_vqa/config.py:llm=d48,tokens=4",
)
_WARM_UP = 10  # steps, of which the first compiles


class Timed:
    """An iterator that adds up the time of `next`."""

    def __init__(self, batches: Iterator[Any]):
        self.batches, self.secs = batches, 0.0

    def __iter__(self) -> "Timed":
        return self

    def __next__(self) -> Any:
        start = time.perf_counter()
        batch = next(self.batches)
        self.secs += time.perf_counter() - start
        return batch


def measure(config: str, steps: int) -> dict[str, float]:
    """Seconds of `steps` steps, and of those the ones that the loop waits for batches."""
    import jax

    from vlm_jax import build
    from vlm_jax.config.arguments import load_config
    from vlm_jax.config.resolve import resolve
    from vlm_jax.data import pipeline
    from vlm_jax.training import loop
    from vlm_jax.training.step import init_state

    cache = build.default_cache()
    build.use_compilation_cache(cache)
    run = build.open_run(resolve(load_config(config)), cache)
    network, (stage, *_) = run.network, run.network.spec.stages
    update = build.train_step(network, stage)
    state = init_state(build.first_params(network), update.optimiser, stage.train)
    batches = Timed(pipeline.train_batches(run.train[0], 0, _WARM_UP + steps))
    every = dict(log_every_steps=steps, save_every_steps=0, on_log=lambda log: None, on_save=lambda *args: None)

    def take(state: Any, first: int, last: int) -> Any:
        end = loop.run(state, first, last, batches, network.plan.put, update.step, **every)  # type: ignore[arg-type]
        return jax.block_until_ready(end.state)

    state = take(state, 0, _WARM_UP)
    batches.secs, start = 0.0, time.perf_counter()
    take(state, _WARM_UP, _WARM_UP + steps)
    return {"secs": time.perf_counter() - start, "waiting": batches.secs}


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="python -m experiments.data_speed.waiting", description=__doc__, allow_abbrev=False)
    parser.add_argument("--steps", type=whole(1), default=200)
    args = parser.parse_args(argv)
    lines = [["config", "a step, ms", "of it waiting for data, ms", "share"]]
    for config in CONFIGS:
        found = measure(config, args.steps)
        step, wait = (1e3 * found[name] / args.steps for name in ("secs", "waiting"))
        lines.append([f"`{config}`", f"{step:.1f}", f"{wait:.2f}", f"{wait / step:.1%}"])
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    text = f"{markdown_table(lines)}\n\n{args.steps} steps, {cores} core(s), load average {load:.1f}."
    write_block(HERE / "README.md", "waiting", text, "experiments.data_speed.waiting")
    print(text)


if __name__ == "__main__":
    run_main(main)
