"""How long one train step of PaliGemma takes, beside big_vision's trainer.

    PYTHONPATH=big_vision python -m experiments.training_speed.beside_big_vision

One checkpoint of random float32 weights is written in big_vision's format, and both sides load it: a small image tower
and a small Gemma, with a vocabulary of 32,000 words and with PaliGemma's 257,152. Every part is trained, on the same
rows: an image and a prefix, bidirectional, then a suffix, which is learned. big_vision's side is `update_fn` of
`trainers/proj/paligemma/train.py` with the optimiser of its transfer configs; ours is the train step of
`configs/paligemma.py`. Both rematerialise each block and donate their state. All rows have as many learned tokens, so
that big_vision's mean over rows and ours over tokens are the same loss: the losses of all steps have to agree to five
digits. Writes beside_big_vision.json and its table in README.md.
"""

import argparse
import dataclasses
import importlib
import json
import os
import statistics
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.flags import whole
from experiments.inference_speed import beside_big_vision as inference
from experiments.inference_speed.measuring import cpu_name, use_cores
from experiments.readme import write_block
from experiments.report import markdown_table
from vlm_jax.cli import ArgumentParser, run_main
from vlm_jax.core.errors import UserError
from vlm_jax.core.files import write_json

HERE = Path(__file__).parent
MODULE = "experiments.training_speed.beside_big_vision"
SIDE, VISUAL_TOKENS = 112, 64
TOWER = {"variant": "S/14", "depth": 4, "pool_type": "none", "scan": True}
LLM = {"width": 256, "depth": 6, "mlp_dim": 1024, "num_heads": 4, "num_kv_heads": 1, "head_dim": 64}
TEXT_TOKENS, LEARNED = 64, 24  # of a row: prefix and suffix, and the suffix alone
LR, WEIGHT_DECAY, CLIP_NORM, B2 = 1e-3, 1e-2, 1.0, 0.999  # peak rate; decay a step at that rate
WARMUP = 2
_DECAYED = r".*(/kernel|/w|/gating_einsum|/linear|/input_embedding|/pos_embedding)$"  # as vlm_jax: every matrix


class MeasuredStep(NamedTuple):
    """One train step."""

    program: Any  # compiled: (state, ...) -> (state, ...)
    run: Callable[[], float]  # updates the state, and returns the loss before


def main(argv: list[str]) -> None:
    parser = ArgumentParser(
        prog=f"python -m {MODULE}", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--words", type=whole(1), nargs="+", default=[32_000, 257_152])
    parser.add_argument("--batch-rows", type=whole(1), default=8, help="of a batch")
    parser.add_argument("--pairs", type=whole(1), default=9)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="cores of both sides")
    parser.add_argument("--out", type=Path, help="write the numbers to this file, and no table")
    args = parser.parse_args(argv)
    use_cores(args.threads)
    try:
        importlib.import_module("big_vision.trainers.proj.paligemma.train")
    except ImportError as error:
        raise UserError(f"{error} (README.md in this folder lists the packages to install)") from error
    allow_transfers()
    rows = [measure(words, args.batch_rows, args.pairs) for words in args.words]
    settings = {name: getattr(args, name) for name in ("batch_rows", "pairs", "threads")}
    machine = {"load": round(os.getloadavg()[0], 1), "cpu": cpu_name(), "versions": inference.versions()}
    result = {**settings, **machine, "rows": rows}
    print(json.dumps(result, indent=1))
    write_json(args.out or HERE / "beside_big_vision.json", result)
    if not args.out:
        write_block(HERE / "README.md", "big_vision", table(result), MODULE)


def allow_transfers() -> None:
    """Undoes what importing big_vision's trainer does: forbid implicit transfers to the device."""
    import jax

    jax.config.update("jax_transfer_guard", "allow")


def measure(words: int, rows: int, pairs: int) -> dict[str, Any]:
    """Seconds, memory and losses of both sides, measured in turn. Raises `AssertionError` for losses that differ."""
    steps = pairs + 1
    network, config = network_of(words)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.npz"
        inference.write_weights(file, network, SIDE)
        batch = draw(rows, words)
        sides = {"theirs": big_vision_step(network, config, file, batch, steps), "ours": our_step(file, batch, steps)}
    losses: dict[str, list[float]] = {name: [] for name in sides}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(steps):
        for name, side in sides.items():
            start = time.perf_counter(), time.process_time()
            losses[name].append(side.run())
            times[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    np.testing.assert_allclose(losses["ours"], losses["theirs"], rtol=1e-5)
    out: dict[str, Any] = {"words": words, "losses": [round(loss, 5) for loss in losses["ours"]]}
    paired = {name: [column[1:] for column in zip(*times[name], strict=True)] for name in sides}  # but the first pair
    for at, clock in enumerate(("", "cpu_")):
        ours, theirs = paired["ours"][at], paired["theirs"][at]
        out[f"ours_{clock}secs"], out[f"theirs_{clock}secs"] = (round(statistics.median(x), 3) for x in (ours, theirs))
        out[f"{clock}ratio"] = sorted(round(b / a, 2) for a, b in zip(ours, theirs, strict=True))
    return out | {f"{name}_mb": megabytes(side.program) for name, side in sides.items()}


def megabytes(program: Any) -> int:
    """What a compiled step needs beside its state and its batch."""
    return round(program.memory_analysis().temp_size_in_bytes / 1e6)


def network_of(words: int) -> tuple[Any, Any]:
    """(big_vision's module, the config that its `load` reads)."""
    import ml_collections
    from big_vision.models.ppp import gemma
    from big_vision.models.proj.paligemma import paligemma

    size = {"variant": "gemma_2b", **LLM, "norm_eps": 1e-6, "vocab_size": words}
    gemma.get_config = lambda variant: ml_collections.ConfigDict(size)  # by itself it knows published sizes alone
    config = ml_collections.FrozenConfigDict({"img": TOWER, "llm": {"variant": "gemma_2b", "vocab_size": words}})
    return paligemma.Model(**config), config


def draw(rows: int, words: int) -> dict[str, np.ndarray]:
    """A batch in big_vision's layout: an image, then a prefix and the suffix to learn."""
    rng = np.random.default_rng(0)
    suffix = np.broadcast_to(np.arange(TEXT_TOKENS) >= TEXT_TOKENS - LEARNED, (rows, TEXT_TOKENS)).astype(np.int32)
    return {
        "image": rng.uniform(-1, 1, (rows, SIDE, SIDE, 3)).astype(np.float32),
        "text": rng.integers(0, words, (rows, TEXT_TOKENS), np.int32),
        "mask_ar": suffix,
        "mask_loss": suffix,
    }


def big_vision_step(network: Any, config: Any, file: Path, batch: dict[str, np.ndarray], steps: int) -> MeasuredStep:
    """big_vision's `update_fn`. It is a function inside its `main`, compiled with the rest of the module, and is given
    the variables of `main` that it reads."""
    import big_vision.optax as bv_optax
    import jax
    import ml_collections
    from big_vision.models.proj.paligemma import paligemma
    from big_vision.trainers.proj.paligemma import train

    params = jax.device_put(paligemma.load(None, str(file), config))
    settings = ml_collections.ConfigDict({
        "optax_name": "scale_by_adam", "optax": {"b2": B2}, "lr": LR, "wd": LR * WEIGHT_DECAY,
        "wd_mults": [(_DECAYED, 1.0)], "grad_clip_norm": CLIP_NORM,
        "schedule": {"decay_type": "cosine", "warmup_steps": WARMUP},
    })  # fmt: skip
    optimiser, _ = bv_optax.make(settings, params, sched_kw={"total_steps": steps, "batch_size": 1, "data_size": 1})
    code = next(part for part in train.main.__code__.co_consts if getattr(part, "co_name", "") == "update_fn")
    read = {"config": settings, "model": network, "tx": optimiser}
    cells = tuple(types.CellType(read[name]) for name in code.co_freevars)
    update = types.FunctionType(code, vars(train), "update_fn", None, cells)
    state, key, arrays = {"params": params, "opt": optimiser.init(params)}, jax.random.key(0), jax.device_put(batch)
    program = jax.jit(update, donate_argnums=0).lower(state, key, arrays).compile()
    held = [state]
    del state, params

    def run() -> float:
        held[0], measured = jax.block_until_ready(program(held[0], key, arrays))
        return float(measured["training_loss"])

    return MeasuredStep(program, run)


def our_step(file: Path, batch: dict[str, np.ndarray], steps: int) -> MeasuredStep:
    """The train step of `configs/paligemma.py` for this checkpoint, in float32."""
    import jax

    from vlm_jax import build
    from vlm_jax.checkpoints import inspection
    from vlm_jax.config.arguments import load_config
    from vlm_jax.config.resolve import resolve
    from vlm_jax.distributed import partitioning
    from vlm_jax.training import step as training_step

    info = inspection.inspect(file)
    run = resolve(load_config("configs/paligemma.py"))
    stage = dataclasses.replace(run.stages[0], total_steps=steps, warmup_steps=WARMUP, peak_lr=LR)
    spec = dataclasses.replace(
        run,
        model=inspection.model_spec(info),
        data=dataclasses.replace(run.data, batch_rows=len(batch["text"]), tokenizer=""),
        optim=dataclasses.replace(run.optim, weight_decay=WEIGHT_DECAY, clip_norm=CLIP_NORM, b2=B2, final_lr_share=0.0),
        compute=dataclasses.replace(run.compute, dtype="float32", mesh=(1, 1, 1)),
        stages=(stage,),
    )
    network = build.lay_out(spec, partitioning.make_plan(spec.compute))
    update = build.train_step(network, stage)
    params = inspection.load_parts(info, plan=network.plan)
    state = training_step.init_state(params, update.optimiser, stage.train)
    inputs = network.plan.put(our_rows(batch))
    program = update.program.lower(state, inputs, None).compile()
    held = [state]
    del state, params

    def step() -> float:
        held[0], sums, _ = jax.block_until_ready(program(held[0], inputs, None))
        return float(sums.nll / sums.count)

    return MeasuredStep(program, step)


def our_rows(batch: dict[str, np.ndarray]) -> Any:
    """The batch as `Inputs`: visual tokens, then the text; the weight of a token is that of the next."""
    from vlm_jax.core.structs import Inputs, Views

    rows = len(batch["text"])
    length = VISUAL_TOKENS + TEXT_TOKENS
    before = [(0, 0), (VISUAL_TOKENS, 0)]
    position = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    suffix = np.pad(batch["mask_ar"], before)
    weight = np.roll(np.pad(batch["mask_loss"], before), -1, axis=1).astype(np.float32)
    weight[:, -1] = 0
    return Inputs(
        tokens=np.pad(batch["text"], before),
        segment=np.ones_like(position),
        position=position,
        order=np.where(suffix, position, 0).astype(np.int32),
        visual=np.where(position < VISUAL_TOKENS, position, -1),
        views=Views(pixels=batch["image"][:, None]),
        weight=weight,
    )


def table(result: dict[str, Any]) -> str:
    lines = [["vocabulary", "seconds", "big_vision", "ratio", "CPU seconds", "big_vision", "ratio", "MB", "big_vision"]]
    for row in result["rows"]:
        cells = [f"{row['words']:,}"]
        for clock in ("", "cpu_"):
            ratios = row[f"{clock}ratio"]
            spread = f"{ratios[0]:.2f} / **{statistics.median(ratios):.2f}** / {ratios[-1]:.2f}"
            cells += [*(f"{row[f'{side}_{clock}secs']:.2f}" for side in ("ours", "theirs")), spread]
        lines.append([*cells, str(row["ours_mb"]), str(row["theirs_mb"])])
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    first, last = (" and ".join(f"{row['losses'][at]:.4f}" for row in result["rows"]) for at in (0, -1))
    text = (
        f"Tower {TOWER['variant']} of {TOWER['depth']} blocks, Gemma of width {LLM['width']} and {LLM['depth']} "
        f"layers; {result['batch_rows']} rows of {VISUAL_TOKENS} visual tokens and {TEXT_TOKENS} of text, {LEARNED} of "
        f"them learned; float32. The losses of both sides are equal to 5 digits in all {result['pairs'] + 1} steps "
        f"(from {first} to {last}). {result['pairs']} pairs, {result['threads']} core(s), load average "
        f"{result['load']}, {result['cpu']}; {versions}."
    )
    return f"{markdown_table(lines)}\n\n{text}"


if __name__ == "__main__":
    run_main(main)
