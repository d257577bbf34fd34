"""The part of a token's time that more threads cannot shorten: what the compiled loop does outside matrix products.

    python -m experiments.inference_speed.serial_share

The program of `generate` decodes on one core under JAX's profiler. Each operation of the loop counts with the median of
its times over the tokens, so that other load on the machine, which interrupts some of them, does not count. Products,
and fusions with one inside, use all threads; all others, and the gaps between operations, are serial. Small products
run mostly on one thread, which this does not see. Writes serial_share.json and its table in README.md.
"""

import argparse
import collections
import itertools
import re
import statistics
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from experiments.flags import whole
from experiments.inference_speed import measuring
from experiments.readme import write_block
from experiments.report import markdown_table
from vlm_jax.cli import ArgumentParser, run_main
from vlm_jax.core.errors import UserError
from vlm_jax.sizing import zoo

MODULE = "experiments.inference_speed.serial_share"
FILE = measuring.HERE / "serial_share.json"
WARM = 2  # tokens before those that count; the last has no following one, see `shares`


class Loop(NamedTuple):
    """The compiled loop over tokens: a function of the number of tokens, and its operations."""

    run: Any
    serial: dict[str, bool]  # by name of the operation


def main(argv: list[str]) -> None:
    parser = ArgumentParser(
        prog=f"python -m {MODULE}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["smollm2-135m"])
    parser.add_argument("--batches", nargs="+", type=whole(1), default=[1, 8])
    parser.add_argument(
        "--positions", nargs="+", type=whole(1), default=[288, 2048], help="of the cache, half of them written"
    )
    parser.add_argument("--tokens", type=whole(WARM + 2), default=24, help="at most half of --positions")
    args = parser.parse_args(argv)
    for model in args.models:
        zoo.decoder(model)
    if 2 * args.tokens > min(args.positions):
        raise UserError(f"--tokens: expected at most half of --positions {min(args.positions)}, got {args.tokens}")
    measuring.use_cores(1)
    for model in args.models:
        for batch in args.batches:
            for positions in args.positions:
                row = {"model": model, "threads": 1, "batch": batch, "positions": positions, "tokens": args.tokens}
                row |= {"cpu": measuring.cpu_name()} | share(compiled(model, batch, positions), args.tokens)
                rows = measuring.keep(FILE, row, (*measuring.KEY, "positions"))
                write_block(measuring.HERE / "README.md", "serial share", table(rows), MODULE)


def compiled(name: str, batch: int, positions: int) -> Loop:
    """The loop of a decoder of the zoo with random weights, near the end of a cache of so many positions."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    from vlm_jax.core.specs import ComputeSpec, ModelSpec
    from vlm_jax.core.structs import AttentionMetadata
    from vlm_jax.inference import sampling
    from vlm_jax.models.vlm import Vlm

    compute = ComputeSpec("float32", "none", "xla", 1, "replicated", (1, 1, 1), scan_layers=False)
    model = Vlm(ModelSpec(None, None, None, zoo.decoder(name), "causal"), compute)
    zeros = jnp.zeros((1, 4), jnp.int32)
    init = jax.jit(model.decoder.init)(jax.random.key(0), zeros, AttentionMetadata(zeros, zeros, zeros))
    params = {"decoder": nn.meta.unbox(init)["params"]}

    def state() -> sampling.Decoding:
        cache = model.init_cache(batch, positions, 0)
        row = jnp.tile(jnp.arange(positions), (batch, 1))
        written = positions // 2
        metadata = AttentionMetadata((row < written).astype(jnp.int32), row, row)
        token, out = jnp.zeros(batch, jnp.int32), jnp.zeros((batch, positions), jnp.int32)
        cache = cache._replace(metadata=metadata, length=jnp.int32(written))
        return sampling.Decoding(jnp.int32(1), token, token > 0, out, cache)

    def decode(params: Any, state: sampling.Decoding, until: Any) -> sampling.Decoding:
        return sampling.decode(model, params, state, sampling.greedy, (), until, until)

    count, make = jax.ShapeDtypeStruct((), "int32"), jax.jit(state)
    program = jax.jit(decode, donate_argnums=1).lower(params, jax.eval_shape(state), count).compile()

    def run(tokens: int) -> None:
        jax.block_until_ready(program(params, jax.block_until_ready(make()), jnp.int32(tokens + 1)))

    return Loop(run, serial_operations(program.as_text()))


def serial_operations(text: str) -> dict[str, bool]:
    """The operations of the loop's body by name: whether they have no matrix product, themselves or inside."""
    parts = dict(re.findall(r"^(?:ENTRY )?%?([\w.-]+) [^\n]*\{\n(.*?)^\}", text, re.M | re.S))
    found = {}
    for line in parts[re.search(r"while\(.*body=%?([\w.-]+)", text)[1]].splitlines():  # type: ignore[index]
        name = re.match(r"\s*(?:ROOT )?%?([\w.-]+) = ", line)
        called = re.search(r"(?:calls|to_apply)=%?([\w.-]+)", line)
        if name:
            found[name[1]] = " dot(" not in line + (parts[called[1]] if called else "")
    return found


def share(loop: Loop, tokens: int) -> dict[str, float]:
    """`shares` of a decoding of that many tokens."""
    import jax
    from jax.profiler import ProfileData

    loop.run(2)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            loop.run(tokens)
        (path,) = Path(folder).rglob("*.xplane.pb")
        data = ProfileData.from_file(str(path))
    lines = (line for plane in data.planes for line in plane.lines)
    events = [(e.start_ns, e.duration_ns, e.name) for line in lines for e in line.events if e.name in loop.serial]
    return shares(events, loop.serial)


def shares(events: list[tuple[float, float, str]], serial: dict[str, bool], warm: int = WARM) -> dict[str, float]:
    """Milliseconds a token inside and outside products, and the share of the latter.

    events: (start, duration, operation) in nanoseconds; the first `warm` tokens do not count. An operation that starts
    before the one ahead of it has ended takes its time from that one.
    """
    events = sorted(events)
    products, rest = collections.defaultdict(list), collections.defaultdict(list)
    for (start, length, name), (following, _, _) in itertools.pairwise(events):
        own = 0.0 if serial[name] else min(length, following - start)
        products[name].append(own)
        rest[name].append(following - start - own)
    inside, outside = (sum(statistics.median(of[warm:]) for of in found.values()) / 1e6 for found in (products, rest))
    return {
        "operations": len(rest),
        "products_ms": round(inside, 3),
        "rest_ms": round(outside, 3),
        "serial_share": round(outside / (inside + outside), 4),
    }


def table(rows: list[dict[str, Any]]) -> str:
    head = ["model", "batch", "positions", "operations", "products, ms a token", "all else, ms", "serial share"]
    lines = [head]
    for row in rows:
        sizes = [str(row[name]) for name in ("model", "batch", "positions", "operations")]
        lines.append(
            [*sizes, *(f"{row[name]:.2f}" for name in ("products_ms", "rest_ms")), f"{row['serial_share']:.1%}"]
        )
    return "\n".join([markdown_table(lines), "", f"float32, one core of {', '.join(sorted({r['cpu'] for r in rows}))}"])


if __name__ == "__main__":
    run_main(main)
