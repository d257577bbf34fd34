"""Jitted inference programs, cached by model, plan and size; the ahead-of-time compiler lowers the same ones."""

import functools
from collections.abc import Callable
from typing import Any

from jaxtyping import Array

from vlm_jax.core.specs import ComputeSpec, ModelSpec
from vlm_jax.distributed.partitioning import Plan
from vlm_jax.inference import sampling
from vlm_jax.models.vlm import Vlm


@functools.lru_cache(maxsize=32)
def hidden_program(spec: ModelSpec, compute: ComputeSpec, plan: Plan) -> Callable[..., Any]:
    """`(params, inputs) -> hidden states [B, L, D]`."""
    vlm = Vlm(spec, compute)
    return plan.jit(lambda params, inputs: vlm.forward(params, inputs)[0])


@functools.lru_cache(maxsize=32)
def logits_program(spec: ModelSpec, compute: ComputeSpec, plan: Plan) -> Callable[..., Any]:
    """`(params, hidden) -> float32 logits`."""
    return plan.jit(Vlm(spec, compute).logits)


@functools.lru_cache(maxsize=32)
def prefill_program(spec: ModelSpec, compute: ComputeSpec, plan: Plan, max_new: int) -> Callable[..., Any]:
    """`(params, inputs) -> Prefilled`, with a cache for `max_new` new tokens."""
    vlm = Vlm(spec, compute)
    return plan.jit(lambda params, inputs: sampling.prefill(vlm, params, inputs, max_new))


@functools.lru_cache(maxsize=32)
def sample_program(
    spec: ModelSpec, compute: ComputeSpec, plan: Plan, eos_ids: tuple[int, ...], max_new: int, kind: str
) -> Callable[..., Any]:
    """`(params, prefilled, limit, key, temperature, top_p) -> (tokens [B, max_new], prefilled)`; donates `prefilled`.
    `kind` is "greedy" or "sampled".
    """
    vlm = Vlm(spec, compute)

    def sample(
        params: Any, prefilled: sampling.Prefilled, limit: Array, key: Array, temperature: Array, top_p: Array
    ) -> tuple[Array, Any]:
        pick = sampling.greedy if kind == "greedy" else sampling.sampler(key, temperature, top_p)
        out, cache = sampling.sample(vlm, params, prefilled, pick, eos_ids, limit, max_new)
        return out, prefilled._replace(cache=cache)

    return plan.jit(sample, donate_argnums=1)
