"""How full packed rows are, and what packing saves: `python -m experiments.data_speed.packing`.

Drawn text lengths like those of LLaVA's mix665k (log-normal: median 120, mean 230), one image a conversation, in the
rows of `configs/llava.py`. FLOPs are those of stage 2. A step is timed with a decoder of width 96, on rows of the same
2,048 positions and stored features of the encoder, pooled to V tokens; the time of an epoch is that of its rows. Renews
packing.json, figures/packing.png and the table of README.md.
"""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.flags import whole
from experiments.inference_speed.measuring import cpu_name
from experiments.readme import write_block
from experiments.report import markdown_table
from vlm_jax.cli import ArgumentParser, run_main
from vlm_jax.core.specs import DataSpec, RunSpec
from vlm_jax.data import packing, rows, tokenized
from vlm_jax.data.conversations import IMAGE
from vlm_jax.data.examples import Example, Source
from vlm_jax.data.packing import RowLayout
from vlm_jax.data.tokenized import Mixture, TokenizedDataset
from vlm_jax.scaling.plots import CONTRAST, label_ends, log_axis, save, styled
from vlm_jax.sizing import cost

HERE = Path(__file__).parent
TOKENS = (1, 4, 16, 36, 64, 144, 576)
TIMED = (1, 16, 144, 576)  # V of the steps that are timed
LLMS = ("qwen1.5-0.5b", "qwen1.5-7b")
ENCODER = "clip-l14-336"  # as in the recipe
MEDIAN, MEAN = 120, 230
_ANSWER = 60  # tokens from one end of an answer to the next, where a conversation may be cut
_ID = 5  # of every text token


class DrawnItems(Source):
    """Stands in for the items of a data set of which only lengths matter."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        raise NotImplementedError


def drawn(count: int, seed: int = 0) -> Mixture:
    """Conversations of an image and text of drawn lengths; the second half of the text is learned."""
    sigma = np.sqrt(2 * np.log(MEAN / MEDIAN))
    text = np.random.default_rng(seed).lognormal(np.log(MEDIAN), sigma, count).astype(int).clip(8)
    sizes = text + 1
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    ids = np.full(bounds[-1], _ID, np.int32)
    ids[bounds[:-1]] = IMAGE
    offset = np.arange(bounds[-1]) - np.repeat(bounds[:-1], sizes)
    target = offset > np.repeat(sizes // 2, sizes)
    ends = [np.append(np.arange(_ANSWER, size - _ANSWER // 2, _ANSWER), size) for size in sizes]
    turn_bounds = np.concatenate([[0], np.cumsum([len(e) for e in ends])])
    numbers, none = np.arange(count), np.zeros(0, np.int32)
    dataset = TokenizedDataset(
        source=DrawnItems(count), ids=ids, target=target, bounds=bounds, turn_ends=np.concatenate(ends),
        turn_bounds=turn_bounds, questions=none, question_bounds=np.zeros(count + 1, int),
        images=np.ones(count, np.int32), first_image=numbers, item=numbers, skipped={},
    )  # fmt: skip
    return tokenized.mix([dataset], ["drawn"], [1.0])


def recipe(config: str) -> RunSpec:
    from vlm_jax.config.arguments import load_config
    from vlm_jax.config.resolve import resolve

    return resolve(load_config(config))


def epoch(mixture: Mixture, data: DataSpec, tokens: int) -> tuple[packing.Rows, float, packing.Lengths]:
    """(rows of the first epoch, share of their positions that is used, lengths)."""
    layout = RowLayout(tokens)
    sizes = packing.lengths(mixture, data, layout)
    found = packing.epoch_rows(mixture, data, sizes, layout, seed=0, epoch=0)
    return found, float(sizes.tokens[found.conversation].sum() / (len(found) * data.row_tokens)), sizes


def measure(tokens: int, mixture: Mixture, llms: Sequence[str] = LLMS) -> dict[str, Any]:
    """Rows of an epoch and the FLOPs of each language model, packed and with one conversation a row."""
    out: dict[str, Any] = {"tokens": tokens}
    for pack in ("fit", "none"):
        specs = [
            recipe(f"configs/llava.py:stage=2,llm={llm},tokens={tokens},pack={pack},devices=1,tensor=1") for llm in llms
        ]
        data = specs[0].data
        start = time.perf_counter()
        found, fill, sizes = epoch(mixture, data, tokens)
        secs = time.perf_counter() - start
        flops = {
            llm: len(found) * cost.step_flops(spec, spec.stages[0]) / data.batch_rows
            for llm, spec in zip(llms, specs, strict=True)
        }
        out[pack] = {
            "rows": len(found), "fill": fill, "epoch_flops": flops, "row_images": data.row_images, "cut": sizes.cut,
            "dropped": sizes.dropped, "secs": secs,
        }  # fmt: skip
    return out


def step_secs(mixture: Mixture, tokens: int, batch_rows: int, repeats: int) -> dict[str, Any]:
    """Seconds of a training step of the d96 decoder on packed rows, and on rows of one conversation, in turn."""
    out: dict[str, Any] = {"tokens": tokens, "batch_rows": batch_rows, "repeats": repeats}
    packed = recipe(f"configs/llava.py:tokens={tokens}").data.row_images
    steps = {pack: make_step(mixture, tokens, batch_rows, pack, n) for pack, n in (("fit", packed), ("none", 1))}
    times: dict[str, list[float]] = {pack: [] for pack in steps}
    for _ in range(1 + repeats):  # the first compiles
        for pack, (run, _) in steps.items():
            start = time.perf_counter()
            run()
            times[pack].append(time.perf_counter() - start)
    for pack, (_, conversations) in steps.items():
        out[pack] = {"secs": min(times[pack][1:]), "conversations": conversations}
    return out


def make_step(
    mixture: Mixture, tokens: int, batch_rows: int, pack: str, row_images: int
) -> tuple[Callable[[], object], float]:
    """(a training step that waits for its result, mean conversations of a batch of the epoch)."""
    import flax.linen as nn
    import jax

    from vlm_jax import build
    from vlm_jax.compress import catalog
    from vlm_jax.core.structs import Views, Visual
    from vlm_jax.data.rows import RowPlan
    from vlm_jax.distributed import partitioning
    from vlm_jax.sizing import zoo
    from vlm_jax.training import step as training_step

    spec = recipe("configs/vlm.py:llm=d96")
    encoder = zoo.encoder(ENCODER)
    model = catalog.model_spec(encoder, "pool", tokens, spec.model.decoder)
    data = dataclasses.replace(
        spec.data, row_tokens=2048, pack=pack, row_images=row_images, batch_rows=batch_rows,
        questions_per_example=0, long="cut",
    )  # fmt: skip
    spec = dataclasses.replace(spec, data=data, model=model)
    found, _, sizes = epoch(mixture, data, tokens)
    plans = [RowPlan(found[row].tolist(), sizes.ids[found[row]].tolist()) for row in range(batch_rows)]
    inputs, _ = rows.pack(mixture, plans, RowLayout(tokens), data.row_tokens)
    network = build.lay_out(spec, partitioning.make_plan(spec.compute))
    image = jax.ShapeDtypeStruct((1, encoder.image_size, encoder.image_size, 3), np.uint8)
    weights = nn.meta.unbox(jax.eval_shape(network.model.init_encoder, jax.random.key(0)))
    shape = jax.eval_shape(network.model.encode, {"encoder": weights}, image)
    rng = np.random.default_rng(0)
    features = [
        leaf if leaf is None else rng.standard_normal((batch_rows, row_images, *leaf.shape[1:])).astype(np.float16)
        for leaf in shape
    ]
    inputs = network.plan.put(inputs._replace(views=Views(features=Visual(*features))))
    stage = spec.stages[0]
    update = build.train_step(network, stage)
    params = nn.meta.unbox(network.model.init(jax.random.key(0)))
    state = [training_step.init_state(params, update.optimiser, stage.train)]

    def run() -> None:
        state[0], _, _ = jax.block_until_ready(update.step(state[0], inputs, 1))

    return run, batch_rows * len(mixture) / len(found)


def table(result: dict[str, Any]) -> str:
    llms = list(result["epochs"][0]["fit"]["epoch_flops"])
    head = ["V", "packed rows", "padding", "one a row", "padding"]
    lines = [[*head, *(f"FLOPs of {llm}, packed / one a row" for llm in llms)]]
    for one in result["epochs"]:
        fit, none = one["fit"], one["none"]
        pairs = [(fit["epoch_flops"][llm], none["epoch_flops"][llm]) for llm in llms]
        lines.append([
            str(one["tokens"]), f"{fit['rows']:,}", f"{1 - fit['fill']:.1%}", f"{none['rows']:,}",
            f"{1 - none['fill']:.1%}", *(f"{a:.1e} / {b:.1e} = 1/{b / a:.1f}" for a, b in pairs),
        ])  # fmt: skip
    slowest = max(one["fit"]["secs"] for one in result["epochs"])
    text = (
        f"{result['conversations']:,} conversations (99th percentile of their text: {result['p99']:,} tokens), rows of "
        f"2,048 positions; packing them took at most {slowest:.1f} s.\n\n{markdown_table(lines)}"
    )
    return f"{text}\n\n{timing(result)}" if result["steps"] else text


def timing(result: dict[str, Any]) -> str:
    """The table of the step's time."""
    lines = [["V", "conversations a step", "a step, s", "one a row, s", "an epoch, h", "one a row, h", "ratio"]]
    for step in result["steps"]:
        fit, none = step["fit"], step["none"]
        packed, other = (epoch_secs(result, step, pack) / 3600 for pack in ("fit", "none"))
        lines.append([
            str(step["tokens"]), f"{fit['conversations']:.1f}", f"{fit['secs']:.2f}", f"{none['secs']:.2f}",
            f"{packed:.2f}", f"{other:.2f}", f"1/{other / packed:.1f}",
        ])  # fmt: skip
    step = result["steps"][0]
    return (
        f"{markdown_table(lines)}\n\nSteps of a decoder of width 96, {step['batch_rows']} row(s), fastest of "
        f"{step['repeats']}, {result['cores']} core(s), load average {result['load']}, {result['cpu']}."
    )


def epoch_secs(result: dict[str, Any], step: dict[str, Any], pack: str) -> float:
    """Seconds of an epoch: those of a step for each batch of the epoch's rows."""
    of_tokens = next(one for one in result["epochs"] if one["tokens"] == step["tokens"])
    return of_tokens[pack]["rows"] / step["batch_rows"] * step[pack]["secs"]


@styled
def draw(result: dict[str, Any], path: Path) -> Path:
    """FLOPs and time of an epoch against V, relative to one conversation a row at the largest V."""

    def flops(llm: str) -> dict[str, list[float]]:
        return {pack: [one[pack]["epoch_flops"][llm] for one in result["epochs"]] for pack in ("fit", "none")}

    secs = {pack: [epoch_secs(result, step, pack) for step in result["steps"]] for pack in ("fit", "none")}
    names = [llm.rpartition("-")[2].upper() for llm in LLMS]
    panels = [
        ("FLOPs of an epoch", TOKENS, dict(zip(names, map(flops, LLMS), strict=True))),
        ("Measured time of an epoch", TIMED, {"width 96": secs}),
    ]
    figure, colours = Figure(figsize=(9.4, 4.1), layout="constrained"), iter(CONTRAST)
    for axes, (title, tokens, curves) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        ends = []
        for name, curve in curves.items():
            colour = next(colours)
            for pack, word, line in (("fit", "packed", "-"), ("none", "one a row", (0, (4, 2)))):
                y = np.array(curve[pack]) / curve["none"][-1]
                axes.plot(tokens, y, "o", linestyle=line, color=colour, markersize=4.5)
                ends.append((y[-1], f"{name}, {word}", colour))
        axes.set_xscale("log")
        axes.set_yscale("log")
        log_axis(axes.xaxis, tokens)
        log_axis(axes.yaxis, (0.1, 0.2, 0.5, 1))
        axes.set_xlabel("visual tokens V")
        axes.set_title(title)
        label_ends(axes, ends)
    figure.axes[0].set_ylabel(f"relative to one a row at V = {TOKENS[-1]}")
    figure.suptitle(
        "Fewer visual tokens make training cheaper, where rows are packed", x=0.01, ha="left", fontweight="bold"
    )
    return save(figure, path)


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="python -m experiments.data_speed.packing", description=__doc__, allow_abbrev=False)
    parser.add_argument("--conversations", type=whole(100), default=20_000)
    parser.add_argument("--batch-rows", type=whole(1), default=1, help="of the step that is timed")
    parser.add_argument("--repeats", type=whole(0), default=4, help="of the step that is timed; 0: none is")
    args = parser.parse_args(argv)
    mixture = drawn(args.conversations)
    text = np.diff(mixture.parts[0].bounds) - 1
    timed = TIMED if args.repeats else ()
    result = {
        "cores": len(os.sched_getaffinity(0)), "load": round(os.getloadavg()[0], 1), "cpu": cpu_name(),
        "conversations": len(mixture), "p99": int(np.percentile(text, 99)),
        "epochs": [measure(tokens, mixture) for tokens in TOKENS],
        "steps": [step_secs(mixture, tokens, args.batch_rows, args.repeats) for tokens in timed],
    }  # fmt: skip
    (HERE / "packing.json").write_text(json.dumps(result, indent=1) + "\n")
    write_block(HERE / "README.md", "packing", table(result), "experiments.data_speed.packing")
    if args.repeats:
        draw(result, HERE / "figures" / "packing.png")
    print(table(result))


if __name__ == "__main__":
    run_main(main)
