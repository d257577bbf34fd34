"""The cache that decoding is compiled for is the one that prefill gives, where visual tokens leave."""

from pathlib import Path

import jax
import pytest

from vlm_jax.aot import programs
from vlm_jax.config.arguments import load_config
from vlm_jax.config.resolve import resolve
from vlm_jax.distributed import partitioning

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("compressor", ["fastv", "voco"])
def test_decoding_gets_the_cache_of_prefill(compressor: str) -> None:
    spec = resolve(load_config(f"{ROOT / 'configs' / 'vlm.py'}:smoke,compressor={compressor},tokens=4"))
    plan = partitioning.make_plan(spec.compute, jax.devices()[:1])
    program, (params, inputs) = programs._prefill(spec, plan)
    cache = jax.eval_shape(program, params, inputs).cache
    expected = programs.cache_shapes(spec, plan)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), cache) == jax.tree.map(lambda x: (x.shape, x.dtype), expected)
