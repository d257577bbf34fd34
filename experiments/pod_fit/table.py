"""Page, figure and checks of the study: `python -m experiments.pod_fit.table`. Exits 1 if one fails."""

import importlib.metadata
import os
from typing import Any

from experiments.pod_fit.sweep import (
    CONFIG,
    HERE,
    LLMS,
    PODS,
    RECIPE,
    TOKENS,
    cells,
    fitted_cells,
    read,
    row_names,
    train_cell,
)
from vlm_jax.aot import ENVIRONMENT
from vlm_jax.cli import ArgumentParser, run_main

GIB = 2**30
CHIPS = (16, 32, 64, 128, 256)
TOLERANCE = 0.05
_SIZES = sorted(LLMS, key=lambda name: float(name.removeprefix("qwen1.5-").removesuffix("b")))

PodRow = dict[str, Any]


def markdown(lines: list[list[str]]) -> str:
    """A markdown table; the first line is the header."""
    head, *rest = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([head, "|" + "---|" * len(lines[0]), *rest])


def figures_of(row: PodRow | None) -> str:
    """Peak, time and MFU of one cell."""
    if row is None:
        return "not compiled"
    if not row["fits"]:
        return f"{row['peak_bytes'] / GIB:.1f}, does not fit"
    return f"{row['peak_bytes'] / GIB:.1f} · {1e3 * row['step_secs']:.0f} · {row['mfu']:.0%}"


def training(rows: dict[str, PodRow]) -> str:
    """A table per pod, and one of the large model."""
    parts = []
    for pod in PODS:
        lines = [[f"{pod}", *(f"V = {tokens}" for tokens in sorted(TOKENS))]]
        for llm in _SIZES:
            names = [train_cell(llm, tokens, pod).name for tokens in sorted(TOKENS)]
            lines.append([llm, *(figures_of(rows.get(name)) for name in names)])
        parts.append(markdown(lines))
    large = [cell for cell in cells() if "gemma" in cell.arg]
    parts.append(markdown([["the largest", "", ""], *(
        [cell.topology, cell.arg.replace(",", ", "), figures_of(rows.get(cell.name))] for cell in large
    )]))  # fmt: skip
    return "\n\n".join(parts)


def state_bytes(llm: str, chips: int) -> float:
    """Parameters and optimiser state that one of that many chips holds in the last stage of training."""
    import flax.linen as nn
    import jax
    import numpy as np
    from jax.sharding import AbstractMesh

    from vlm_jax import build
    from vlm_jax.config.arguments import load_config
    from vlm_jax.config.resolve import resolve
    from vlm_jax.distributed import partitioning

    spec = resolve(load_config(f"{CONFIG},llm={llm},tokens=144"))
    table = tuple(partitioning.TABLES[spec.compute.strategy].items())
    shape = partitioning.mesh_shape(spec.compute.mesh, chips)
    plan = partitioning.Plan(AbstractMesh((1, *shape), partitioning.MESH_AXES), table)
    boxed = build.abstract_state(build.lay_out(spec, plan), spec.stages[-1])
    leaves, shards = jax.tree.leaves(nn.meta.unbox(boxed)), jax.tree.leaves(plan.shardings(boxed))
    return float(sum(
        np.prod(shard.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, shard in zip(leaves, shards, strict=True)
    ))  # fmt: skip


def scaling() -> dict[str, list[float]]:
    """Total state bytes over all chips by LLM, for each of `CHIPS`, relative to the fewest."""
    totals = {llm: [count * state_bytes(llm, count) for count in CHIPS] for llm in _SIZES}
    return {llm: [total / mine[0] for total in mine] for llm, mine in totals.items()}


def checks(rows: dict[str, PodRow], scaled: dict[str, list[float]]) -> list[tuple[str, bool]]:
    """(claim with its figure, whether it holds)."""
    from vlm_jax.config.arguments import load_config
    from vlm_jax.config.resolve import resolve
    from vlm_jax.sizing import cost

    trained = {cell.name: cell for cell in cells() if not cell.overrides and "tensor=1" not in cell.arg}
    study = [row for name, row in rows.items() if name in trained]
    held = []
    for row in study:
        sizes = cost.params(resolve(load_config(f"{CONFIG},{trained[row['cell']].arg}")).model)
        held.append(row["optimiser_bytes"] * row["chips"] / (8 * (sizes.total - sizes.encoder)))
    widest = max(row["checks"]["gathered_table"] for row in study)
    exchanged = max(row["checks"]["exchanges"] for row in study)
    drift = max((abs(share - 1) for mine in scaled.values() for share in mine), default=0.0)
    missing = len(trained) - len(study)
    return [
        (f"of {len(study)} training programs {sum(row['fits'] for row in study)} fit ({missing} not compiled)",
         all(row["fits"] for row in study)),
        (f"no program gathers the whole embedding or head, or sums logits of all words: the widest array that a gather "
         f"or a sum makes is {widest:.0%} of a table", widest < 1),
        (f"no optimiser state is replicated: two float32 moments of what learns, over all chips, weigh at most "
         f"{max(held):.3f} times their size", max(held) < 1 + TOLERANCE),
        (f"all-to-all carries what looking up words takes and nothing else: at most {exchanged:.3f} times it",
         exchanged < 1 + TOLERANCE),
        (f"state a chip falls as one over chips within {TOLERANCE:.0%} from {CHIPS[0]} to {CHIPS[-1]} chips: "
         f"{drift:.2%} at most", drift < TOLERANCE),
    ]  # fmt: skip


def variants(rows: dict[str, PodRow]) -> str:
    """The first cell's train step with other settings."""
    base = cells()[0]
    ways = {base.name: "as configured: fused attention, both directions of the torus"}
    for cell in cells():
        if cell.arg.startswith(base.arg) and cell.name != base.name and cell.topology == base.topology:
            if "tensor=1" in cell.arg:
                ways[cell.name] = "one mesh axis over the whole pod (`tensor=1`)"
            elif cell.mode == "train" and cell not in fitted_cells():
                ways[cell.name] = "plain attention (`compute.attention=xla`)"
    head = [base.arg.replace(",", ", "), "GiB · ms · MFU", "sent by a chip, GB", "of it in sums that are not scattered"]
    lines = [head]
    for name, what in ways.items():
        if row := rows.get(name):
            summed = sum(each["wire_bytes"] for each in row["collectives"] if each["kind"] == "all-reduce")
            lines.append([what, figures_of(row), f"{row['wire_bytes'] / 1e9:.1f}", f"{summed / 1e9:.1f}"])
    return markdown(lines)


def fitted(rows: dict[str, PodRow]) -> str:
    """The train steps with the rematerialisation that fits, at the recipe's batch and at the best one."""
    from vlm_jax.sizing.chips import ASSUMED

    lines = [["pod, V", "rows a step", "policy", "GiB of usable", "ms", "in exposed network", "share of the peak in "
              "products that count", "MFU", "bound by"]]  # fmt: skip
    for cell in fitted_cells():
        for name, batch in zip(row_names(cell), ("recipe", "best"), strict=True):
            if row := rows.get(name):
                once = ASSUMED.compute * row["model_flops"] / row["flops"]
                lines.append([
                    f"{row['topology']}, {row['tokens']}", f"{row['batch_examples']} ({batch})", row["remat"],
                    f"{row['peak_bytes'] / GIB:.1f} of {row['usable_bytes'] / GIB:.1f}",
                    f"{1e3 * row['step_secs']:.0f}", f"{1e3 * row['exposed_secs'] / ASSUMED.interconnect:.0f}",
                    f"{once:.1%}", f"**{row['mfu']:.1%}**", row["binds"],
                ])  # fmt: skip
            else:
                lines.append([f"{cell.topology}, {cell.arg}", batch, "not compiled", *[""] * 6])
    return markdown(lines)


def inference(rows: dict[str, PodRow]) -> str:
    """Prefill and decode programs; milliseconds of a decode step."""
    lines = [["program", "GiB", "ms", "bound by"]]
    for cell in cells():
        row = rows.get(cell.name)
        if cell.mode != "train" and row:
            what = f"{row['mode']}, {row['llm']}, V = {row['tokens']}, {row['batch_examples']} rows"
            ms = 1e3 * row["step_secs"] / row.get("tokens_per_call", 1)
            lines.append([f"{what} on {row['topology']}", f"{row['peak_bytes'] / GIB:.1f}", f"{ms:.1f}", row["binds"]])
    return markdown(lines) if len(lines) > 1 else "Not compiled yet."


def figure(rows: dict[str, PodRow]) -> None:
    """Draws the parts of a step on each pod, at vendor peaks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    parts = {"products": "compute_secs", "memory": "memory_secs", "network beside products": "hidden_secs",
             "network alone": "exposed_secs"}  # fmt: skip
    drawn, axes = plt.subplots(1, len(PODS), figsize=(10, 3.6), layout="constrained")
    for pod, ax in zip(PODS, axes, strict=True):
        mine = [row for llm in _SIZES if (row := rows.get(train_cell(llm, TOKENS[0], pod).name))]
        for shift, (label, field) in enumerate(parts.items()):
            ax.bar(
                [i + 0.2 * shift - 0.3 for i in range(len(mine))], [row[field] * 1e3 for row in mine], 0.2, label=label
            )
        ax.set_xticks(range(len(mine)), [row["llm"].removeprefix("qwen1.5-") for row in mine])
        ax.set(title=f"{pod}, V = {TOKENS[0]}", ylabel="ms at vendor peaks", xlabel="Qwen 1.5")
    axes[0].legend(frameon=False)
    (HERE / "figures").mkdir(exist_ok=True)
    drawn.savefig(HERE / "figures" / "step_parts.png", dpi=120, metadata={"Software": None})
    plt.close(drawn)


def main(argv: list[str]) -> int:
    """Writes the page and prints the checks."""
    os.environ.update(ENVIRONMENT)
    ArgumentParser(prog="python -m experiments.pod_fit.table", description=__doc__).parse_args(argv)
    from vlm_jax.aot.batch import NEAR
    from vlm_jax.config.arguments import load_config
    from vlm_jax.config.resolve import resolve
    from vlm_jax.sizing.chips import ASSUMED

    names = {cell.name for cell in cells()}
    rows = {row["cell"]: row for row in read() if row["cell"] in {name for c in cells() for name in row_names(c)}}
    scaled = scaling()
    judged = checks(rows, scaled)
    spec = resolve(load_config(CONFIG))
    large = resolve(load_config(f"{CONFIG},{next(cell.arg for cell in cells() if 'gemma' in cell.arg)}"))
    shown = fitted_cells()[0]
    pins = [
        text.split(";")[0].strip() for text in importlib.metadata.requires("jax") or () if text.startswith("libtpu")
    ]
    page = (HERE / "README.template.md").read_text().format(
        libtpu=pins[0].removeprefix("libtpu==") if pins else "",
        length=spec.data.row_tokens,
        batch=spec.data.batch_rows, large_batch=large.data.batch_rows,
        measured=len(rows.keys() & names), wanted=len(names), training=training(rows),
        compute_share=ASSUMED.compute, memory_share=ASSUMED.bandwidth, network_share=ASSUMED.interconnect,
        fewest=CHIPS[0],
        scaling=markdown([["chips", *map(str, CHIPS)], *(
            [llm, *(f"{share:.4f}" for share in shares)] for llm, shares in scaled.items()
        )]),
        checks=markdown([["claim", "holds"], *([text, "yes" if holds else "**no**"] for text, holds in judged)]),
        variants=variants(rows), fitted=fitted(rows), near=NEAR,
        fitted_command=f"python -m vlm_jax.aot --config {RECIPE},{shown.arg} \\\n        --topology {shown.topology} "
        "--config.compute.remat=auto --batch auto",
        fitted_encoder=shown.arg.rpartition("=")[2], answering=inference(rows),
    )  # fmt: skip
    (HERE / "README.md").write_text(page)
    figure(rows)
    for text, holds in judged:
        print(f"{'ok  ' if holds else 'FAIL'}  {text}")
    return 0 if all(holds for _, holds in judged) else 1


if __name__ == "__main__":
    run_main(main)
