"""The cache in the compiled loop over tokens: its arrays are written in place, and no other copy of one is made."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import builders
from vlm_jax.core.structs import AttentionMetadata, Cache
from vlm_jax.distributed import partitioning
from vlm_jax.inference import sampling
from vlm_jax.models.decoder import unstack_layers
from vlm_jax.models.vlm import Vlm

SLOTS = 37  # no other array of the loop has a multiple of 37 x 8 elements for each row and head
NAMES_ONLY = {"parameter", "get-tuple-element", "bitcast", "tuple"}  # nothing is computed


def decoder(kv_heads: int) -> tuple[Vlm, dict]:
    scanned = Vlm(builders.model("blind", tokens=0, kv_heads=kv_heads), builders.COMPUTE)
    params = jax.tree.map(jnp.asarray, builders.params(scanned))
    params["decoder"] = unstack_layers(params["decoder"], scanned.spec.decoder.depth)
    return Vlm(scanned.spec, sampling.compute_for_decoding(builders.COMPUTE)), params


def prompt(model: Vlm, batch: int) -> sampling.Decoding:
    """The state of the loop, of random keys and values: the first 30 positions are written."""
    cache, keys = model.init_cache(batch, SLOTS, 0), iter(jax.random.split(jax.random.key(0), 4))
    key, value = ([jax.random.normal(next(keys), x.shape) for x in leaves] for leaves in (cache.key, cache.value))
    position = jnp.tile(jnp.arange(SLOTS), (batch, 1))
    metadata = AttentionMetadata((position < 30).astype(jnp.int32), position, position)
    token, out = jnp.arange(batch) + 3, jnp.zeros((batch, 6), jnp.int32)
    cache = Cache(tuple(key), tuple(value), metadata, jnp.int32(30))
    return sampling.Decoding(jnp.int32(1), token, token < 0, out, cache)


def greedy(model: Vlm, params: dict, state: sampling.Decoding) -> sampling.Decoding:
    return sampling.decode(model, params, state, sampling.greedy, (), 6, 6)


def of_cache_size(text: str, elements: int) -> list[str]:
    """Instructions of the loop's body that make an array of so many elements: "in place" for an update of a slice, and
    for all others their text."""
    parts = dict(re.findall(r"^(?:ENTRY )?%?([\w.-]+) [^\n]*\{\n(.*?)^\}", text, re.M | re.S))
    found = []
    for line in parts[re.search(r"while\(.*body=%?([\w.-]+)", text)[1]].splitlines():
        made = re.match(r"\s*(?:ROOT )?%?\S+ = \w+\[([\d,]+)\]\S* ([\w-]+)\(", line)
        if made and made[2] not in NAMES_ONLY and np.prod([int(n) for n in made[1].split(",")]) == elements:
            called = re.search(r"calls=%?([\w.-]+)", line)
            inside = parts[called[1]] if called else line
            found.append("in place" if " dynamic-update-slice(" in inside else line.strip())
    return found


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 2, 8])
def test_the_loop_copies_no_array_of_the_cache(batch: int, kv_heads: int) -> None:
    model, params = decoder(kv_heads)
    run = jax.jit(lambda params, state: greedy(model, params, state), donate_argnums=1)
    text = run.lower(params, prompt(model, batch)).compile().as_text()
    spec = model.spec.decoder
    assert of_cache_size(text, batch * SLOTS * kv_heads * spec.head_dim) == ["in place"] * (2 * spec.depth)


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("batch", [1, 4])
def test_the_loop_is_the_same_on_a_mesh(batch: int, kv_heads: int) -> None:
    """Rows over two devices and heads over two, where both divide."""
    model, params = decoder(kv_heads)
    alone = jax.jit(lambda params, state: greedy(model, params, state))(params, prompt(model, batch))
    compute = builders.compute(strategy="fsdp_tensor", mesh=(2, 1, 2), scan_layers=False)
    plan = partitioning.make_plan(compute, jax.devices()[:4])
    split = plan.jit(lambda params, state: greedy(Vlm(model.spec, compute), params, state))(
        *jax.device_put((params, prompt(model, batch)), plan.replicated)
    )
    np.testing.assert_array_equal(split.out, alone.out)
    for ours, theirs in zip(split.cache.key + split.cache.value, alone.cache.key + alone.cache.value, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
