"""A compiled program as one flat row, as text for people, and as advice where it does not fit."""

import math
from typing import Any

import numpy as np

from vlm_jax.aot.programs import TOPOLOGIES, Program, mesh_axes
from vlm_jax.core import axes
from vlm_jax.core.specs import RunSpec, StageSpec, spec_hash
from vlm_jax.distributed.partitioning import Plan
from vlm_jax.sizing import chips, cost, hlo, roofline

GIB = 2**30


def chip_of(topology: str) -> chips.Chip:
    """`"v5e:16x16"` -> the chip, or the half of one that is a device to JAX."""
    return chips.device(topology.partition(":")[0].replace("tpu7x", "v7x"))


def chips_devices(topology: str) -> int:
    """How many devices JAX sees in one chip of a topology."""
    return chips.chip(topology.partition(":")[0].replace("tpu7x", "v7x")).devices


def row(spec: RunSpec, stage: StageSpec, plan: Plan, topology: str, mode: str, program: Program) -> dict[str, Any]:
    """Everything that is known of a program on a topology, flat and ready for JSON. Bytes are of one device."""
    chip, count = chip_of(topology), plan.mesh.size
    sizes = cost.params(spec.model)
    out = {
        "spec_hash": spec_hash(spec), "llm": spec.model.decoder.name, "encoder": spec.model.encoder.name,
        "compressor": spec.model.compressor.name, "tokens": spec.model.compressor.tokens, "mode": mode,
        "stage": stage.name, "topology": topology, "slices": spec.compute.slices,
        "devices": count, "chips": count // chips_devices(topology),
        "strategy": spec.compute.strategy, "mesh": list(plan.mesh.devices.shape[1:]), "remat": spec.compute.remat,
        "attention": spec.compute.attention, "microbatches": spec.compute.microbatches, "moments": spec.compute.moments,
        "batch_examples": spec.data.batch_examples if mode == "train" else spec.evaluation.batch_examples,
        "model_params": sizes.total, "llm_params": sizes.decoder + sizes.embedding,
        "params_bytes": program.memory.params, "optimiser_bytes": program.memory.optimiser,
        "inputs_bytes": program.memory.other_inputs, "temporaries_bytes": program.memory.temporaries,
        "peak_bytes": program.memory.peak, "usable_bytes": chip.usable_bytes,
        "fits": bool(program.text) and program.memory.peak <= chip.usable_bytes,
        "compile_secs": round(program.compile_secs, 1),
    }  # fmt: skip
    if not program.text:
        return out
    steps = spec.evaluation.max_new_tokens if mode == "decode" else 1  # of the longest answer
    found = hlo.collectives(program.text, mesh_axes(plan), steps)
    apart, rests = plan.axis_size(axes.compute_axis(axes.MLP)), plan.axis_size(axes.EMBED) * plan.axis_size(axes.MLP)
    if mode == "train":
        work = roofline.train_work(spec, stage, count, apart, rests)
    else:
        work = (roofline.prefill_work if mode == "prefill" else roofline.decode_work)(spec, count, apart, rests)
    work = roofline.Work(*(steps * amount for amount in work))
    cycles = hlo.compiler_cycles(program.text, steps)
    predicted = roofline.predict(work, found, chip, count, lambda spanned: link_share(plan, chip, spanned), cycles)
    return out | {
        "model_flops": work.model_flops, "flops": work.flops, "memory_traffic_bytes": work.chip_bytes,
        "tokens_per_call": steps, "wire_bytes": sum(each.wire_bytes for each in found), "collectives": summed(found),
        "checks": checks(spec, found, out["batch_examples"] / count), **predicted._asdict(),
    }  # fmt: skip


def link_share(plan: Plan, chip: chips.Chip, spanned: tuple[str, ...]) -> float:
    """Part of a chip's links that a group over these mesh axes uses."""
    grid = plan.mesh.devices
    group = grid[tuple(slice(None) if name in spanned else slice(0, 1) for name in mesh_axes(plan))]
    places = [tuple(device.coords) for device in np.asarray(group).flat]
    return roofline.ring_share(places, roofline.torus_extent([tuple(each.coords) for each in grid.flat]), chip)


def summed(found: list[hlo.Collective]) -> list[dict[str, Any]]:
    """Collectives by kind, mesh axes and whether products run beside them; the heaviest first."""
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
    """What a good placement avoids.

    gathered_table: bytes of the widest array that a gather or a sum makes, as a share of the embedding table's in the
        dtype of the activations. 1 is the whole table, or the logits of as many tokens as it is wide.
    exchanges: all-to-all traffic, as a share of what looking up the text of one chip's rows takes: a vector there for
        every token, in training its gradient back.
    """
    decoder, dtype = spec.model.decoder, cost.dtype_bytes(spec.compute.dtype)
    widest = max((each.whole for each in found if each.kind in ("all-gather", "all-reduce")), default=0.0)
    looked_up = 2 * rows_of_chip * spec.data.text_tokens * decoder.width * dtype
    exchanged = sum(each.wire_bytes for each in found if "all-to-all" in each.kind)
    return {
        "gathered_table": widest / (decoder.vocab * decoder.width * dtype),
        "exchanges": exchanged / max(looked_up, 1),
    }


def lines(r: dict[str, Any]) -> list[str]:
    """The row for people, GiB and milliseconds."""
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
    out.append(f"exchanged per {one} and call:")
    for each in r["collectives"]:
        if each["wire_bytes"] > 1e-3 * r["wire_bytes"]:
            beside = "beside products" if each["beside_products"] else "alone"
            out.append(
                f"  {each['kind']:18s} over {'+'.join(each['axes']):20s} {each['count']:6d} x "
                f"{each['wire_bytes'] / 1e9:9.3f} GB   {beside}"
            )
    out.append(f"model FLOPs {r['model_flops']:.4g} (executed {r['flops']:.4g}) over {r['chips']} chips"
               + (f" of {r['devices'] // r['chips']} devices each" if one == "device" else ""))  # fmt: skip
    out.append(
        f"at vendor peaks, ms: compute {1e3 * r['compute_secs']:.1f}, memory {1e3 * r['memory_secs']:.1f}, "
        f"network beside products {1e3 * r['hidden_secs']:.1f}, network alone {1e3 * r['exposed_secs']:.1f}"
    )
    eff, steps = chips.ASSUMED, r["tokens_per_call"]
    per = f"answer of {steps} tokens ({1e3 * r['step_secs'] / steps:.1f} a token)" if r["mode"] == "decode" else "call"
    out.append(
        f"predicted: {1e3 * r['step_secs']:.1f} ms a {per}, MFU {r['mfu']:.1%}, {r['binds']}-bound "
        f"(assumed shares of the peaks: compute {eff.compute}, memory {eff.bandwidth}, network {eff.interconnect})"
    )
    if r["compiler_secs"]:
        out.append(f"XLA's own estimate of products and memory traffic: {1e3 * r['compiler_secs']:.1f} ms")
    return out


def advice(r: dict[str, Any]) -> str:
    """Each single change with which a program should fit; where there is none, a larger topology; else what may help.

    An estimate: state and gradients stay as they are, the rest of the peak falls as rows do.
    """
    train = r["mode"] == "train"
    state = r["params_bytes"] + r["optimiser_bytes"]
    state += min(r["params_bytes"], r["temporaries_bytes"]) if train else 0.0  # gradients
    of_rows = r["peak_bytes"] - state
    apart = r["mesh"][2] if r["strategy"] == "fsdp_tensor" else 1
    unit = r["devices"] // apart * (r["microbatches"] if train else 1)
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
        change = f"{'data' if train else 'evaluation'}.batch_examples={rows}"
        saved[change] = of_rows * (1 - rows / r["batch_examples"])
    enough = [change for change, save in saved.items() if r["peak_bytes"] - save <= r["usable_bytes"]]
    fewest = [change for change in enough if change.startswith("compute.microbatches")][:1]
    enough = [change for change in enough if change in fewest or not change.startswith("compute.microbatches")]
    if not enough and (larger := _larger(r, state, of_rows, unit)):
        enough = [f"--topology {larger}"]
    if enough:
        return "by estimate it would fit with: " + "; or ".join(enough)
    also = ["compute.remat=block"] if train and r["remat"] != "block" else []
    several = [change for change in saved if not change.startswith("compute.microbatches")]
    return "no single change is enough; may help: " + ", ".join(
        [*several, *also, "fewer rows", "fewer text tokens", "a smaller llm"]
    )


def _larger(r: dict[str, Any], state: float, of_rows: float, unit: int) -> str | None:
    """The smallest topology of the same chip, of those with a name here, on which the program should fit."""
    kind = r["topology"].partition(":")[0]
    for name in sorted((name for name in TOPOLOGIES if name.startswith(f"{kind}:")), key=_devices):
        times = _devices(name) * r["slices"] / r["devices"]
        split = state if r["strategy"] == "replicated" else state / times
        if times > 1 and r["batch_examples"] % (unit * times) == 0 and split + of_rows / times <= r["usable_bytes"]:
            return name
    return None


def _devices(topology: str) -> int:
    """`"v5e:16x16"` -> how many devices JAX sees there."""
    return math.prod(map(int, topology.partition(":")[2].split("x"))) * chips_devices(topology)
