"""Shardings of all parameters on published topologies, against golden files.

To update the golden files after an intended change: `python -m tests.distributed.test_placements`.
"""

from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests import builders
from tests.distributed.test_partitioning import QWEN
from vlm_jax.config.arguments import load_config
from vlm_jax.config.resolve import resolve
from vlm_jax.core import tree
from vlm_jax.distributed import partitioning
from vlm_jax.models.vlm import Vlm

# A small model on the mesh of the tests, and published ones on the pods that `configs/llava.py` is for.
GOLDEN = {
    "qwen_fsdp_tensor": ("", "fsdp_tensor", (2, 2, 2)),
    "qwen1.5-7b_v5e-256": ("qwen1.5-7b", "fsdp", (1, 16, 16)),
    "gemma2-27b_v5p-512": ("gemma2-27b", "fsdp", (1, 32, 16)),
    "qwen2.5-7b_v5e-256_answering": ("qwen2.5-7b", "fsdp_tensor", (16, 1, 16)),
}


def shapes_on(name: str) -> tuple[partitioning.Plan, dict]:
    """The plan, without devices, and the boxed shapes of a golden file's model."""
    llm, strategy, mesh = GOLDEN[name]
    table = tuple(partitioning.TABLES[strategy].items())
    where = partitioning.Plan(jax.sharding.AbstractMesh((1, *mesh), partitioning.MESH_AXES), table)
    if not llm:
        return where, builders.boxed_shapes(Vlm(builders.model(**QWEN), builders.COMPUTE))
    spec = resolve(load_config(f"configs/llava.py:llm={llm}"))
    return where, builders.boxed_shapes(Vlm(spec.model, spec.compute))


def golden(name: str) -> Path:
    return Path(__file__).parents[1] / "golden" / f"placements_{name}.txt"


def placements(name: str) -> str:
    """A line for each parameter: path, shape, logical names, mesh axes."""
    where, boxed = shapes_on(name)
    names = tree.flatten(nn.get_partition_spec(boxed), is_leaf=lambda leaf: isinstance(leaf, P))
    shapes, shardings = tree.flatten(nn.meta.unbox(boxed)), tree.flatten(where.shardings(boxed))
    return "".join(
        f"{path}: {tuple(leaf.shape)} {tuple(names[path])} -> {tuple(shardings[path].spec)}\n"
        for path, leaf in shapes.items()
    )


@pytest.mark.parametrize("name", GOLDEN)
def test_placements_are_those_of_the_golden_file(name: str) -> None:
    assert placements(name).splitlines() == golden(name).read_text().splitlines()


@pytest.mark.parametrize("name", [name for name, (llm, strategy, _) in GOLDEN.items() if llm and strategy == "fsdp"])
def test_published_models_are_split_over_all_of_a_pod(name: str) -> None:
    """All but a hundredth of the parameters, and what a chip holds is no more than a twentieth above its share."""
    where, shapes = shapes_on(name)
    assert partitioning.unsharded_share(where, shapes) < 1e-2
    flat, shards = tree.flatten(nn.meta.unbox(shapes)), tree.flatten(where.shardings(shapes))
    held = sum(int(np.prod(shards[path].shard_shape(leaf.shape))) for path, leaf in flat.items())
    assert held < 1.05 * tree.count(shapes) / where.mesh.size


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    for name in GOLDEN:
        golden(name).write_text(placements(name))
