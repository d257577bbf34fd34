"""What each policy keeps and computes again, against the traced gradient of the decoder."""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from tests import builders
from vlm_jax.config.arguments import load_config
from vlm_jax.config.resolve import resolve
from vlm_jax.core.specs import RunSpec
from vlm_jax.models.decoder import Decoder
from vlm_jax.sizing import cost, remat

ROWS, LENGTH = 2, 16


def run_spec(**decoder: Any) -> RunSpec:
    """A run that trains the decoder on `ROWS` rows of `LENGTH` tokens."""
    spec = resolve(load_config("configs/vlm.py:smoke,llm=d24,tokens=4"))
    model = dataclasses.replace(spec.model, decoder=dataclasses.replace(builders.DECODER, **decoder))
    data = dataclasses.replace(spec.data, batch_rows=ROWS, row_tokens=LENGTH)
    return dataclasses.replace(spec, model=model, data=data)


def with_policy(spec: RunSpec, policy: str) -> RunSpec:
    return dataclasses.replace(spec, compute=dataclasses.replace(spec.compute, remat=policy))


def loss_of(spec: RunSpec, policy: str) -> tuple[Any, Any]:
    """A loss of the decoder's parameters, and their shapes."""
    module = Decoder(spec.model.decoder, builders.compute(remat=policy))
    metadata, tokens = builders.causal(jnp.ones((ROWS, LENGTH))), jnp.ones((ROWS, LENGTH), int)
    params = nn.meta.unbox(jax.eval_shape(module.init, jax.random.key(0), tokens, metadata))
    return lambda p: jnp.sum(module.apply(p, tokens, metadata) ** 2), params


def product_flops(jaxpr: Any) -> int:
    """FLOPs of the matrix products of a jaxpr, those of a scan's body times its length."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            width = math.prod(equation.invars[0].aval.shape[i] for i in contracted)
            total += 2 * width * math.prod(equation.outvars[0].aval.shape)
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        total += times * sum(map(product_flops, jaxprs_in_params(equation.params)))
    return total


@functools.cache
def traced_flops(family: str, policy: str) -> int:
    loss, params = loss_of(run_spec(**FAMILIES[family]), policy)
    return product_flops(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)


FAMILIES = {"plain": {}, "sandwich": {"sandwich_norm": True}, "heads": {"heads": 2, "kv_heads": 1, "mlp_width": 40}}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", ["dots", "mlp", "block"])
def test_the_flops_that_a_policy_adds_are_those_of_the_traced_gradient(family: str, policy: str) -> None:
    spec = run_spec(**FAMILIES[family])
    none, counted = (remat.recomputed_flops(with_policy(spec, name), spec.stages[-1]) for name in ("none", policy))
    added = traced_flops(family, policy) - traced_flops(family, "none")
    assert ROWS * (counted - none) == pytest.approx(added)
    assert none == cost.row_pass(spec.model, LENGTH, 1).head


def residual_bytes(spec: RunSpec, policy: str) -> int:
    loss, params = loss_of(spec, policy)
    leaves = jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(loss, p)[1], params))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bytes_that_a_policy_keeps_are_residuals_of_the_traced_gradient(family: str) -> None:
    """Against "block": masks, parameters and what follows the blocks are the same. "none" is a lower bound."""
    spec = run_spec(**FAMILIES[family])
    kept, traced = (
        {policy: of(policy) for policy in remat.POLICIES}
        for of in (
            lambda policy: remat.kept_bytes(spec, spec.stages[-1], policy, 1),
            functools.partial(residual_bytes, spec),
        )
    )
    assert kept["block"] == ROWS * LENGTH * spec.model.decoder.depth * spec.model.decoder.width * 4
    for policy in ("dots", "mlp"):
        assert kept[policy] - kept["block"] == traced[policy] - traced["block"]
    assert kept["none"] - kept["block"] <= traced["none"] - traced["block"]


def test_kept_bytes_are_those_of_a_microbatch_on_one_device() -> None:
    spec = run_spec()
    split = dataclasses.replace(spec, compute=dataclasses.replace(spec.compute, microbatches=2))
    whole = remat.kept_bytes(spec, spec.stages[-1], "dots", 1)
    assert remat.kept_bytes(split, spec.stages[-1], "dots", 1) == whole / 2
    assert remat.kept_bytes(spec, spec.stages[-1], "dots", 2) == whole / 2


def test_policies_are_ordered_by_recomputation_and_by_memory() -> None:
    spec = run_spec()
    flops = [remat.recomputed_flops(with_policy(spec, policy), spec.stages[-1]) for policy in remat.POLICIES]
    memory = [remat.kept_bytes(spec, spec.stages[-1], policy, 1) for policy in remat.POLICIES]
    assert flops == sorted(flops)
    assert memory == sorted(memory, reverse=True)
