"""Train the study's encoder by dense glyph reading, and say how well it reads handwriting it has never seen.

    python -m experiments.glyph_encoder.train                       # writes encoder.npz and reading.json beside this
    file
    python -m experiments.glyph_encoder.train --steps 200 --out /tmp/encoder.npz

Every patch predicts the digit, shape and colour on it (`reading`). The readout is thrown away; the encoder is
saved as the image side of a big_vision checkpoint, and the study starts from it as one starts from a public SigLIP.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from experiments.flags import real, whole
from experiments.glyph_encoder import reading
from experiments.glyph_encoder.pages import Page, pages
from vlm_jax.checkpoints import big_vision
from vlm_jax.cli import ArgumentParser, run_main
from vlm_jax.core.axes import VISION, VOCAB
from vlm_jax.core.specs import ComputeSpec, OptimSpec, StageSpec
from vlm_jax.core.structs import LossSums
from vlm_jax.distributed import partitioning
from vlm_jax.models.vision import Encoder
from vlm_jax.ops import initializers
from vlm_jax.ops.pixels import normalise
from vlm_jax.sizing import zoo
from vlm_jax.training import loop, optim
from vlm_jax.training import step as training_step

HERE = Path(__file__).parent
COMPUTE = ComputeSpec("float32", "none", "xla", 1, "replicated", (-1, 1, 1))
PARTS = ("encoder", "readout")
TASKS = ("digit", "shape", "colour")


def init_params(key: jax.Array, encoder: Encoder) -> dict[str, Any]:
    """Encoder and one linear readout a task."""
    side, width = encoder.spec.image_size, encoder.spec.width
    keys = jax.random.split(key, 4)
    readout = {
        name: {"kernel": initializers.dense(k, (width, n), (VISION, VOCAB)), "bias": initializers.zeros((n,), (VOCAB,))}
        for name, k, n in zip(TASKS, keys[1:], reading.CLASSES, strict=True)
    }
    return {"encoder": encoder.init(keys[0], jnp.zeros((1, side, side, 3)))["params"], "readout": readout}


def read(encoder: Encoder, params: Any, image: jax.Array) -> list[jax.Array]:
    """Logits [B, P, classes] of every task."""
    tokens = encoder.apply({"params": params["encoder"]}, normalise(image, encoder.spec), method="encode").tokens
    return [tokens @ params["readout"][name]["kernel"] + params["readout"][name]["bias"] for name in TASKS]


def forward(encoder: Encoder, params: Any, page: Page) -> LossSums:
    """Cross-entropy summed over patches and tasks; hits are patches with all three right."""
    nll, right = jnp.zeros(()), jnp.ones(page.label.shape[:2], bool)
    for task, logits in enumerate(read(encoder, params, page.image)):
        label = page.label[..., task]
        nll += -jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(logits), label[..., None], axis=-1))
        right &= jnp.argmax(logits, axis=-1) == label
    return LossSums(nll, jnp.sum(right, dtype=jnp.float32), jnp.asarray(right.size, jnp.float32))


def held_out(encoder: Encoder, params: Any, seed: int, batches: int = 16) -> dict[str, float]:
    """Share of non-empty patches read right, by task, on handwriting that training never saw."""
    program = jax.jit(lambda p, image: [jnp.argmax(logits, axis=-1) for logits in read(encoder, p, image)])
    hits, counts = np.zeros(3), np.zeros(3)
    for i in range(batches):
        image, label = reading.reading_batch(seed + 1, "test", 128, i)
        for task, guess in enumerate(program(params, image)):
            shown = label[..., task] != reading.NONE[task]
            hits[task] += np.sum((np.asarray(guess) == label[..., task]) & shown)
            counts[task] += shown.sum()
    return dict(zip(TASKS, (hits / counts).round(4).tolist(), strict=True))


def main(argv: list[str]) -> None:
    parser = ArgumentParser(
        prog="python -m experiments.glyph_encoder.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=whole(1), default=2400)
    parser.add_argument("--batch", type=whole(1), default=64)
    parser.add_argument("--lr", type=real(0, 1), default=1.5e-3)
    parser.add_argument("--seed", type=whole(0, 2**32 - 1), default=0)
    parser.add_argument("--out", type=Path, default=HERE / "encoder.npz")
    args = parser.parse_args(argv)

    encoder = Encoder(zoo.encoder("glyph-64"), COMPUTE)
    stage = StageSpec("reading", args.steps, PARTS, args.lr, args.steps // 20)
    optimiser = optim.make_optimiser(OptimSpec(0.05, 1.0, 0.9, 0.99, 0.01, ()), stage)
    plan = partitioning.make_plan(COMPUTE)
    params = plan.init(lambda key: init_params(key, encoder), jax.random.key(args.seed))
    step = plan.jit(training_step.make_step(lambda p, b: forward(encoder, p, b), optimiser, PARTS), donate_argnums=0)
    with Progress(
        BarColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn(), TimeRemainingColumn()
    ) as progress:
        bar = progress.add_task("", total=args.steps, note="compiling")

        def on_log(log: loop.Log) -> None:
            sums = jax.device_get(log.sums)
            note = f"loss {float(sums.nll / sums.count):.4f}, patches wrong {1 - float(sums.hits / sums.count):.4f}"
            progress.update(bar, completed=log.step, note=note)

        state, _ = loop.run(
            training_step.init_state(params, optimiser, PARTS),
            0,
            args.steps,
            pages(args.seed, args.batch, args.steps),
            plan.put,
            lambda state, batch, number: step(state, batch),
            log_every_steps=max(args.steps // 50, 1),
            save_every_steps=0,
            on_log=on_log,
            on_save=lambda *_: None,
        )
    big_vision.save_encoder(args.out, jax.device_get(nn.meta.unbox(state.params["encoder"])), encoder.spec)
    result = {
        "steps": args.steps,
        "batch": args.batch,
        "seed": args.seed,
        "read_right": held_out(encoder, state.params, args.seed),
    }
    args.out.with_name("reading.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["read_right"]), f"-> {args.out}")


if __name__ == "__main__":
    run_main(main)
