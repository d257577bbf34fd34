"""Prefill of a decoder that visual tokens leave, beside the plain one on the same prompt: compile time and step time.

    python -m experiments.compressors.staged_decoder --llm qwen1.5-1.8b --layers 16 --compressor fastv --tokens 288

Random weights; pairs of calls in turn, so that other work on the machine hits both. Prints the median ratio of the
pairs beside the ratio of their FLOPs, and writes them to README.md.
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
from vlm_jax.cli import ArgumentParser, run_main
from vlm_jax.compress import catalog
from vlm_jax.core.specs import ComputeSpec, ModelSpec
from vlm_jax.core.structs import Inputs, Views, Visual
from vlm_jax.inference import sampling
from vlm_jax.models.vlm import Vlm
from vlm_jax.sizing import cost, zoo

COMPUTE = sampling.compute_for_decoding(ComputeSpec("float32", "none", "xla", 1, "replicated", (1, 1, 1)))


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="python -m experiments.compressors.staged_decoder", description=__doc__)
    parser.add_argument("--llm", default="qwen1.5-1.8b", help="whose shape; see vlm_jax/sizing/zoo.py")
    parser.add_argument("--layers", type=whole(0), default=0, help="0: as the model has")
    parser.add_argument("--encoder", default="clip-l14-336", help="whose grid of patches")
    parser.add_argument("--compressor", default="fastv")
    parser.add_argument("--tokens", type=whole(1), default=288)
    parser.add_argument("--question", type=whole(1), default=50, help="tokens of text")
    parser.add_argument("--pairs", type=whole(1), default=3)
    args = parser.parse_args(argv)
    decoder = zoo.decoder(args.llm)
    # Prefill reads one row of the head: a small vocabulary saves memory and no time.
    decoder = dataclasses.replace(decoder, depth=args.layers or decoder.depth, vocab=64)
    encoder = zoo.encoder(args.encoder)
    staged = catalog.model_spec(encoder, args.compressor, args.tokens, decoder, projector="linear")
    plain = catalog.model_spec(encoder, "none", None, decoder, projector="linear")
    params = random_params(plain)
    runs, compiling = {}, {}
    for name, spec in (("plain", plain), ("staged", staged)):
        run, inputs, secs = compiled(spec, params, args.question)
        compiling[name] = secs
        runs[name] = lambda run=run, inputs=inputs: timed(run, params, inputs)
        print(f"{name}: compiled in {secs:.1f} s")
    pairs = [(runs["plain"](), runs["staged"]()) for _ in range(args.pairs + 1)][1:]
    medians = {}
    for name, number in (("plain", 0), ("staged", 1)):
        medians[name] = statistics.median(pair[number] for pair in pairs)
        print(f"{name}: {medians[name]:.2f} s")
    flops = [cost.flops(spec, args.question, 1).prefill.total for spec in (plain, staged)]
    ratios = sorted(a / b for a, b in pairs)
    ratio = statistics.median(ratios)
    print(f"plain / staged: {ratio:.2f} of the time, {flops[0] / flops[1]:.2f} of the FLOPs")
    text = (
        f"{args.llm} with {decoder.depth} layers, all {plain.compressor.tokens} patches against {args.compressor} that "
        f"keeps {args.tokens}, {args.question} tokens of text, {len(pairs)} pairs on {os.cpu_count()} cores, load "
        f"{os.getloadavg()[0]:.1f}: prefill {medians['plain']:.2f} and {medians['staged']:.2f} s, ratio "
        f"{ratios[0]:.2f} / **{ratio:.2f}** / {ratios[-1]:.2f} (of the FLOPs {flops[0] / flops[1]:.2f}); compiled in "
        f"{compiling['plain']:.1f} and {compiling['staged']:.1f} s."
    )
    write_block(Path(__file__).parent / "README.md", "staged", text, "experiments.compressors.staged_decoder")


def random_params(spec: ModelSpec) -> Any:
    model = Vlm(spec, COMPUTE)
    shapes = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0)))
    return jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01, leaf.dtype) if leaf.ndim < 2 else draw(leaf), shapes)


def draw(leaf: Any) -> jax.Array:
    return 0.02 * jax.random.normal(jax.random.key(leaf.size % 1000), leaf.shape, leaf.dtype)


def compiled(spec: ModelSpec, params: Any, question: int) -> tuple[Callable[..., Any], Inputs, float]:
    model = Vlm(spec, COMPUTE)
    length = model.visual_tokens + question
    position = jnp.arange(length)[None]
    visual = jnp.where(position < model.visual_tokens, position, -1)
    features = Visual(jax.random.normal(jax.random.key(1), (1, 1, spec.encoder.patches, spec.encoder.width)))
    inputs = Inputs(position % 64, jnp.ones_like(position), position, position, visual, Views(features=features))
    started = time.perf_counter()
    program = jax.jit(lambda params, inputs: sampling.prefill(model, params, inputs, 1).hidden)
    run = program.lower(params, inputs).compile()
    return run, inputs, time.perf_counter() - started


def timed(run: Callable[..., Any], params: Any, inputs: Inputs) -> float:
    started = time.perf_counter()
    jax.block_until_ready(run(params, inputs))
    return time.perf_counter() - started


if __name__ == "__main__":
    run_main(main)
