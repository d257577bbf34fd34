"""A decoder that visual tokens leave beside the plain one on the same rows: compile time, prefill and train step.

    python -m experiments.compressors.staged_decoder --llm qwen1.5-1.8b --layers 12 --compressor fastv --tokens 288 575

Where nearly all tokens stay (575 of 576), the ratio is what the stages themselves cost. Random weights; pairs of calls
in turn, so that other work on the machine hits both. A train step is the gradient of the decoder without its head.
Prints the table and writes it to README.md.
"""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.flags import whole
from experiments.readme import write_block
from experiments.report import markdown_table
from vlm_jax.cli import ArgumentParser, run_main
from vlm_jax.compress import catalog
from vlm_jax.core.specs import ComputeSpec, ModelSpec
from vlm_jax.core.structs import Inputs, Views, Visual
from vlm_jax.inference import sampling
from vlm_jax.models.vlm import Vlm
from vlm_jax.sizing import cost, zoo

COMPUTE = sampling.compute_for_decoding(ComputeSpec("float32", "none", "xla", 1, "replicated", (1, 1, 1)))


PARTS = ("prefill", "train")


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="python -m experiments.compressors.staged_decoder", description=__doc__)
    parser.add_argument("--llm", default="qwen1.5-1.8b", help="whose shape; see vlm_jax/sizing/zoo.py")
    parser.add_argument("--layers", type=whole(0), default=12, help="0: as the model has")
    parser.add_argument("--encoder", default="clip-l14-336", help="whose grid of patches")
    parser.add_argument("--compressor", default="fastv")
    parser.add_argument("--tokens", type=whole(1), nargs="+", default=[288, 575])
    parser.add_argument("--question", type=whole(1), default=50, help="tokens of text")
    parser.add_argument("--pairs", type=whole(1), default=3)
    args = parser.parse_args(argv)
    decoder = zoo.decoder(args.llm)
    # One row of the head is read, or none: a small vocabulary saves memory and no time.
    decoder = dataclasses.replace(decoder, depth=args.layers or decoder.depth, vocab=64)
    encoder = zoo.encoder(args.encoder)
    plain = catalog.model_spec(encoder, "none", None, decoder, projector="linear")
    staged = [catalog.model_spec(encoder, args.compressor, v, decoder, projector="linear") for v in args.tokens]
    params, lines = random_params(plain), []
    for part in PARTS:
        run, compiling = compiled(part, plain, params, args.question)
        for spec in staged:
            other, compiling_other = compiled(part, spec, params, args.question)
            pairs = [(run(), other()) for _ in range(args.pairs + 1)][1:]
            ratios = sorted(a / b for a, b in pairs)
            secs = (f"{statistics.median(column):.2f}" for column in zip(*pairs, strict=True))
            flops = [cost.flops(each, args.question, 1).prefill.total for each in (plain, spec)]
            spread = f"{ratios[0]:.2f} / **{statistics.median(ratios):.2f}** / {ratios[-1]:.2f}"
            kept, shares = f"{args.compressor}, {spec.compressor.tokens} stay", f"{flops[0] / flops[1]:.2f}"
            lines.append([part, kept, *secs, spread, shares, f"{compiling:.1f}", f"{compiling_other:.1f}"])
            print(" ".join(lines[-1]), flush=True)
    table = markdown_table(
        [["", "stages", "plain, s", "staged, s", "ratio", "of the FLOPs", "compiled in, s", "staged, s"], *lines]
    )
    text = (
        f"{args.llm} with {decoder.depth} layers, {plain.compressor.tokens} patches and {args.question} tokens of "
        f"text, {args.pairs} pairs on {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}."
    )
    write_block(
        Path(__file__).parent / "README.md", "staged", f"{table}\n\n{text}", "experiments.compressors.staged_decoder"
    )


def random_params(spec: ModelSpec) -> Any:
    model = Vlm(spec, COMPUTE)
    shapes = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0)))
    return jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01, leaf.dtype) if leaf.ndim < 2 else draw(leaf), shapes)


def draw(leaf: Any) -> jax.Array:
    return 0.02 * jax.random.normal(jax.random.key(leaf.size % 1000), leaf.shape, leaf.dtype)


def compiled(part: str, spec: ModelSpec, params: Any, question: int) -> tuple[Callable[[], float], float]:
    """A function that runs it and returns its seconds, and the seconds of compilation."""
    model = Vlm(spec, COMPUTE)
    length = model.visual_tokens + question
    position = jnp.arange(length)[None]
    visual = jnp.where(position < model.visual_tokens, position, -1)
    features = Visual(jax.random.normal(jax.random.key(1), (1, 1, spec.encoder.patches, spec.encoder.width)))
    weight = (position >= length - question // 2).astype(jnp.float32)
    inputs = Inputs(
        position % 64, jnp.ones_like(position), position, position, visual, Views(features=features), weight
    )

    def prefill(params: Any, inputs: Inputs) -> Any:
        return sampling.prefill(model, params, inputs._replace(weight=None), 1).hidden

    def train(params: Any, inputs: Inputs) -> Any:
        def loss(decoder: Any) -> jax.Array:
            return jnp.mean(jnp.square(model.forward({**params, "decoder": decoder}, inputs)[0]))

        return jax.grad(loss)(params["decoder"])

    started = time.perf_counter()
    run = jax.jit({"prefill": prefill, "train": train}[part]).lower(params, inputs).compile()
    compiling = time.perf_counter() - started

    def timed() -> float:
        started = time.perf_counter()
        jax.block_until_ready(run(params, inputs))
        return time.perf_counter() - started

    return timed, compiling


if __name__ == "__main__":
    run_main(main)
