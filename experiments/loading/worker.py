"""One load in a process of its own, measured from inside: `python worker.py WAY FOLDER` prints JSON.

Run by `benchmark.py`. Memory is the process's resident set, mapped pages of the file included.
"""

import json
import os
import sys
import time
from pathlib import Path

DEVICES = 8


def main(argv: list[str]) -> None:
    how, folder = argv
    load = {"ours": ours, "sharded": sharded, "transformers": transformers, "copy": copy}[how]
    print(json.dumps(load(folder)))


def ours(folder: str) -> dict:
    """All of it on one device."""
    from vlm_jax import load

    return _measure(lambda: load(folder, dtype="bfloat16").params)


def sharded(folder: str) -> dict:
    """Split over the devices of this host. Nothing of it is held twice, so the shards are as large as the file."""
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"
    from vlm_jax import load
    from vlm_jax.core.specs import ComputeSpec
    from vlm_jax.distributed import partitioning

    plan = partitioning.make_plan(ComputeSpec("bfloat16", "none", "xla", 1, "fsdp", (1, DEVICES, 1)))
    return _measure(lambda: load(folder, dtype="bfloat16", plan=plan).params)


def _measure(load) -> dict:
    import jax

    jax.block_until_ready(jax.numpy.zeros(1))  # the backend is up
    before, cpu, start = _memory("VmRSS"), time.process_time(), time.perf_counter()
    params = jax.block_until_ready(load())
    shards = [shard for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards]
    return _result(start, cpu, before, sum(shard.data.nbytes for shard in shards))


def copy(folder: str) -> dict:
    """The bytes of the file in fresh memory, in the file's order: what no loader that owns its weights can go below."""
    import numpy as np

    from vlm_jax.checkpoints import tensor_files

    before, cpu, start = _memory("VmRSS"), time.process_time(), time.perf_counter()
    there = tensor_files.open_weights(folder)
    held = [np.copy(there.read(name)) for name in there.shapes]
    return _result(start, cpu, before, sum(array.nbytes for array in held))


def transformers(folder: str) -> dict:
    """transformers' own way to a model on the CPU. Every page is touched once, since torch maps weights lazily."""
    import torch
    from transformers import AutoModelForCausalLM

    before, cpu, start = _memory("VmRSS"), time.process_time(), time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.flatten()[:: 4096 // parameter.element_size()].sum()
    return _result(start, cpu, before, sum(parameter.nbytes for parameter in model.parameters()))


def _result(start: float, cpu: float, before: int, held: int) -> dict:
    return {
        "secs": time.perf_counter() - start,
        "cpu_secs": time.process_time() - cpu,
        "before_bytes": before,
        "peak_bytes": _memory("VmHWM"),
        "held_bytes": held,
    }


def _memory(field: str) -> int:
    """Bytes, of this program alone: the kernel's count starts anew with it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main(sys.argv[1:])
