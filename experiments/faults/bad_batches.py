"""One example of the stored features is not a number: the step that draws it is bad, for real."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from experiments.faults import victim
from experiments.faults.damage import Case
from vlm_jax.config.arguments import load_config
from vlm_jax.config.resolve import resolve
from vlm_jax.data import pipeline, sources

_BAD_STEP = 31
# Of the 4096 images of this one, an example comes once in these steps.
_DATA = "--config.data.config=rows4_small"


def bad_batches(folder: Path, cache: Path) -> Iterator[Case]:
    """Under `stop` the run ends with code 4, names the step and its examples, and keeps the checkpoints before it.
    Under `skip_update` it leaves the step out and reaches its end, and beyond its limit it stops.
    """
    spec = resolve(load_config(victim.CONFIG, {"data.config": "rows4_small"}))
    if victim.finish(folder / "undisturbed", cache, _DATA):
        raise RuntimeError(f"the undisturbed run failed: {victim.last_line(folder / 'undisturbed')}")
    split = sources.load(spec.data.dataset, spec.data.config, spec.data.train_split, cache / "data")
    ids = pipeline.drawn_ids(split, spec.data, spec.seed, _BAD_STEP)
    poisoned = folder / "poisoned"
    shutil.copytree(cache, poisoned)
    for path in (poisoned / "features").glob("*/tokens.npy"):
        tokens = np.load(path, mmap_mode="r+")
        if len(tokens) == split.examples:
            # Not one of the first, which are compared with the encoder when the store is opened.
            tokens[max(split.ids.index(name) for name in ids)] = math.nan

    workdir = folder / "stop"
    code = victim.finish(workdir, poisoned, _DATA)
    report = json.loads((workdir / "bad_step" / "report.json").read_text())
    ok = (
        code == 4
        and (report["step"], tuple(report["examples"])) == (_BAD_STEP, ids)
        and victim.steps(workdir)[-1] == _BAD_STEP // victim.EVERY * victim.EVERY
        and (workdir / "bad_step" / "state").is_dir()
    )
    yield Case(f"NaN in step {_BAD_STEP}, policy stop", code, victim.short(victim.last_line(workdir)), ok)

    workdir = folder / "skip"
    code = victim.finish(workdir, poisoned, _DATA, "--config.bad_step.policy=skip_update")
    skipped = [json.loads(line) for line in (workdir / "skipped.jsonl").read_text().splitlines()]
    ok = (
        code == 0
        and [(line["step"], tuple(line["examples"])) for line in skipped] == [(_BAD_STEP, ids)]
        and victim.logged(workdir)[-1]["skipped"] == 1
        and all(line["loss"] is not None for line in victim.logged(workdir))
    )
    yield Case(f"NaN in step {_BAD_STEP}, policy skip_update", code, "1 step in skipped.jsonl", ok)

    workdir = folder / "spike"
    code = victim.finish(workdir, cache, _DATA, "--config.bad_step.spike_factor=1.01")
    ok = code == 4 and (workdir / "bad_step" / "report.json").exists()
    yield Case("a loss above 1.01 times its mean, policy stop", code, victim.short(victim.last_line(workdir)), ok)

    workdir = folder / "limit"
    words = ("--config.bad_step.policy=skip_update", "--config.bad_step.spike_factor=1.0001")
    code = victim.finish(workdir, cache, _DATA, *words, "--config.bad_step.skip_limit=1", "--config.optim.peak_lr=3.0")
    yield Case("more spikes than skip_limit", code, victim.short(victim.last_line(workdir)), code == 4)
