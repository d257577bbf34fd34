"""Report of a compiled program: a flat row, the row as text, and advice if it does not fit."""

import math
from typing import Any

import numpy as np

from vlm_jax.aot.programs import TOPOLOGIES, mesh_axes
from vlm_jax.build.fitting import Program
from vlm_jax.core import axes
from vlm_jax.core.specs import RunSpec, StageSpec, data_of, spec_hash
from vlm_jax.distributed.partitioning import Plan
from vlm_jax.sizing import chips, cost, hlo, roofline
from vlm_jax.sizing.remat import POLICIES

GIB = 2**30


def chip_of(topology: str) -> chips.Chip:
    """The chip of a topology such as `"v5e:16x16"`."""
    return chips.chip(topology.partition(":")[0].replace("tpu7x", "v7x"))


def row(spec: RunSpec, stage: StageSpec, plan: Plan, topology: str, mode: str, program: Program) -> dict[str, Any]:
    """The program's model, layout, memory, collectives and predicted time as JSON values. Bytes are of one device.

    The fields from `model_flops` on are missing if the program does not fit. A decode row is of the whole loop, with
    `tokens_per_call` steps; other modes have 1.
    """
    chip, count = chips.device(chip_of(topology).name), plan.mesh.size
    sizes, memory = cost.params(spec.model), program.memory
    out = {
        "spec_hash": spec_hash(spec), "llm": spec.model.decoder.name, "encoder": spec.model.encoder.name,
        "compressor": spec.model.compressor.name, "tokens": spec.model.compressor.tokens, "mode": mode,
        "stage": stage.name, "topology": topology, "slices": spec.compute.slices,
        "devices": count, "chips": count // chip_of(topology).devices,
        "strategy": spec.compute.strategy, "mesh": list(plan.mesh.devices.shape[1:]), "remat": spec.compute.remat,
        "attention": spec.compute.attention, "microbatches": spec.compute.microbatches, "moments": spec.compute.moments,
        "batch_examples": data_of(spec, stage).batch_rows if mode == "train" else spec.evaluation.batch_examples,
        "model_params": sizes.total, "llm_params": sizes.decoder + sizes.embedding,
        "params_bytes": memory.params, "optimiser_bytes": memory.optimiser, "inputs_bytes": memory.other_inputs,
        "temporaries_bytes": memory.temporaries, "peak_bytes": memory.peak, "usable_bytes": chip.usable_bytes,
        "fits": bool(program.text) and memory.peak <= chip.usable_bytes,
        "compile_secs": round(program.compile_secs, 1),
    }  # fmt: skip
    if not program.text:
        return out
    steps = spec.evaluation.max_new_tokens if mode == "decode" else 1  # the loop runs for the longest answer
    found = hlo.collectives(program.text, mesh_axes(plan), steps)
    shards = kernel_shards(plan)
    if mode == "train":
        work = roofline.train_work(spec, stage, count, *shards)
    else:
        work = (roofline.prefill_work if mode == "prefill" else roofline.decode_work)(spec, count, *shards)
    work = roofline.Work(*(steps * amount for amount in work))
    cycles = hlo.compiler_cycles(program.text, steps)
    predicted = roofline.predict(work, found, chip, count, lambda spanned: link_share(plan, chip, spanned), cycles)
    return out | {
        "model_flops": work.model_flops, "flops": work.flops, "memory_traffic_bytes": work.chip_bytes,
        "tokens_per_call": steps, "wire_bytes": sum(each.wire_bytes for each in found), "collectives": summed(found),
        "checks": checks(spec, found, out["batch_examples"] / count), **predicted._asdict(),
    }  # fmt: skip


def kernel_shards(plan: Plan) -> tuple[int, int]:
    """Parts of a kernel while it is multiplied, and in the train state."""
    return plan.axis_size(axes.compute_axis(axes.MLP)), plan.axis_size(axes.EMBED) * plan.axis_size(axes.MLP)


def link_share(plan: Plan, chip: chips.Chip, spanned: tuple[str, ...]) -> float:
    """Share of a chip's links that a group over these mesh axes uses."""
    grid = plan.mesh.devices
    group = grid[tuple(slice(None) if name in spanned else slice(0, 1) for name in mesh_axes(plan))]
    coords = [tuple(device.coords) for device in np.asarray(group).flat]
    return roofline.ring_share(coords, roofline.torus_extent([tuple(each.coords) for each in grid.flat]), chip)


def summed(found: list[hlo.Collective]) -> list[dict[str, Any]]:
    """Collectives by kind, mesh axes and overlap with products, the largest first."""
    groups: dict[tuple, list[hlo.Collective]] = {}
    for each in found:
        groups.setdefault((each.kind, each.axes, each.beside_products), []).append(each)
    rows = [
        {"kind": kind, "axes": list(spanned), "beside_products": beside, "count": sum(each.trips for each in group),
         "wire_bytes": sum(each.wire_bytes for each in group)}
        for (kind, spanned, beside), group in groups.items()
    ]  # fmt: skip
    return sorted(rows, key=lambda each: -each["wire_bytes"])


def checks(spec: RunSpec, found: list[hlo.Collective], rows_of_chip: float) -> dict[str, float]:
    """Two ratios that a good sharding keeps small.

    gathered_table: bytes of the largest result of an all-gather or all-reduce, over the embedding table's in the dtype
        of the activations. 1 is the whole table, or the logits of as many tokens as it is wide.
    exchanges: all-to-all traffic, over that of looking up the text of one chip's rows: a vector per token, and in
        training its gradient.
    """
    decoder, dtype = spec.model.decoder, cost.dtype_bytes(spec.compute.dtype)
    widest = max((each.whole for each in found if each.kind in ("all-gather", "all-reduce")), default=0.0)
    looked_up = 2 * rows_of_chip * spec.data.row_tokens * decoder.width * dtype
    exchanged = sum(each.wire_bytes for each in found if "all-to-all" in each.kind)
    return {
        "gathered_table": widest / (decoder.vocab * decoder.width * dtype),
        "exchanges": exchanged / max(looked_up, 1),
    }


def lines(r: dict[str, Any]) -> list[str]:
    """The row as lines of text, in GiB and milliseconds."""
    slices = f" x {r['slices']} slices" if r["slices"] > 1 else ""
    head = (
        f"{r['mode']} of {r['encoder']} + {r['llm']}, V={r['tokens']} ({r['compressor']}), {r['batch_examples']} rows "
        f"on {r['topology']}{slices}: {r['strategy']}, "
        f"mesh (data, fsdp, tensor) = {tuple(r['mesh'])}" + (f", remat {r['remat']}" if r["mode"] == "train" else "")
    )
    one = "chip" if r["devices"] == r["chips"] else "device"
    out = [head, f"per {one}, GiB:"]
    for name in ("params", "optimiser", "inputs", "temporaries", "peak"):
        out.append(f"  {name:12s} {r[f'{name}_bytes'] / GIB:9.3f}")
    out.append(f"  {'usable':12s} {r['usable_bytes'] / GIB:9.3f}   {'fits' if r['fits'] else 'DOES NOT FIT'}")
    if "collectives" not in r:
        return out
    out.append(f"sent per {one} and call:")
    for each in r["collectives"]:
        if each["wire_bytes"] > 1e-3 * r["wire_bytes"]:
            overlap = "overlapped" if each["beside_products"] else "exposed"
            out.append(
                f"  {each['kind']:18s} over {'+'.join(each['axes']):20s} {each['count']:6d} x "
                f"{each['wire_bytes'] / 1e9:9.3f} GB   {overlap}"
            )
    out.append(f"model FLOPs {r['model_flops']:.4g} (executed {r['flops']:.4g}) over {r['chips']} chips"
               + (f" of {r['devices'] // r['chips']} devices each" if one == "device" else ""))  # fmt: skip
    out.append(
        f"at vendor peaks, ms: compute {1e3 * r['compute_secs']:.1f}, memory {1e3 * r['memory_secs']:.1f}, "
        f"overlapped network {1e3 * r['hidden_secs']:.1f}, exposed network {1e3 * r['exposed_secs']:.1f}"
    )
    eff, steps = chips.ASSUMED, r["tokens_per_call"]
    ms = 1e3 * r["step_secs"]
    per = f"answer of {steps} tokens ({ms / steps:.1f} per token)" if r["mode"] == "decode" else "call"
    out.append(
        f"predicted: {ms:.1f} ms per {per}, MFU {r['mfu']:.1%}, {r['binds']}-bound "
        f"(assumed shares of the peaks: compute {eff.compute}, memory {eff.bandwidth}, network {eff.interconnect})"
    )
    if r["mode"] == "train":
        out.append(f"MFU: {shares(r)}")
    if r["compiler_secs"]:
        out.append(f"XLA's own estimate of products and memory traffic: {1e3 * r['compiler_secs']:.1f} ms")
    return out


def shares(r: dict[str, Any]) -> str:
    """What leaves of the assumed share of the peak the predicted MFU of a train step."""
    share = chips.ASSUMED.compute
    once = share * r["model_flops"] / r["flops"]
    beside = r["mfu"] * r["step_secs"] / (r["step_secs"] - r["exposed_secs"] / chips.ASSUMED.interconnect)
    parts = [f"{share:.1%} is assumed of products", f"{once:.1%} with those computed again"]
    parts += [f"{beside:.1%} at the speed of {r['binds']}"] if beside < 0.999 * once else []
    return ", ".join([*parts, f"{r['mfu']:.1%} with the exposed network"])


def advice(r: dict[str, Any]) -> str:
    """Single changes with which the program should fit; else a larger topology; else changes that may help.

    An estimate: state and gradients stay, the rest of the peak is proportional to the rows.
    """
    train = r["mode"] == "train"
    state = r["params_bytes"] + r["optimiser_bytes"]
    state += min(r["params_bytes"], r["temporaries_bytes"]) if train else 0.0  # gradients
    of_rows = r["peak_bytes"] - state
    tensor = r["mesh"][2] if r["strategy"] == "fsdp_tensor" else 1
    unit = r["devices"] // tensor * (r["microbatches"] if train else 1)
    saved: dict[str, float] = {}
    if r["strategy"] == "replicated":
        saved["strategy=fsdp"] = state * (1 - 1 / r["devices"])
    if train and r["moments"] == "float32":
        saved["compute.moments=bfloat16"] = r["optimiser_bytes"] / 4
    for times in (2, 4, 8, 16, 32) if train else ():
        if r["batch_examples"] % (unit * times) == 0:
            change = f"compute.microbatches={times * r['microbatches']}"
            saved[change] = max(of_rows - r["inputs_bytes"], 0.0) * (1 - 1 / times)
    rows = int(r["batch_examples"] * (r["usable_bytes"] - state) / max(of_rows, 1.0)) // unit * unit
    if 0 < rows < r["batch_examples"]:
        change = f"data.batch_rows={rows}" if train else f"evaluation.batch_examples={rows}"
        saved[change] = of_rows * (1 - rows / r["batch_examples"])
    enough = [change for change, save in saved.items() if r["peak_bytes"] - save <= r["usable_bytes"]]
    fewest = [change for change in enough if change.startswith("compute.microbatches")][:1]
    enough = [change for change in enough if change in fewest or not change.startswith("compute.microbatches")]
    if not enough and (larger := _larger(r, state, of_rows, unit)):
        enough = [f"--topology {larger}"]
    if enough:
        return "by estimate it would fit with: " + "; or ".join(enough)
    helps = [change for change in saved if not change.startswith("compute.microbatches")]
    helps += ["compute.remat=auto"] if train and r["remat"] != POLICIES[-1] else []
    return "no single change is enough; may help: " + ", ".join(
        [*helps, "fewer rows", "fewer text tokens", "a smaller llm"]
    )


def _larger(r: dict[str, Any], state: float, of_rows: float, unit: int) -> str | None:
    """The smallest topology of the same chip in `TOPOLOGIES` on which the program should fit."""
    kind = r["topology"].partition(":")[0]
    for name in sorted((name for name in TOPOLOGIES if name.startswith(f"{kind}:")), key=_devices):
        times = _devices(name) * r["slices"] / r["devices"]
        split = state if r["strategy"] == "replicated" else state / times
        if times > 1 and r["batch_examples"] % (unit * times) == 0 and split + of_rows / times <= r["usable_bytes"]:
            return name
    return None


def _devices(topology: str) -> int:
    """JAX devices of a topology such as `"v5e:16x16"`."""
    return math.prod(map(int, topology.partition(":")[2].split("x"))) * chip_of(topology).devices
