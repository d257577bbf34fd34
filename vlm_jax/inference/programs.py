"""Jitted inference programs, cached by model, plan and size; the ahead-of-time compiler lowers the same ones."""

import functools
from collections.abc import Callable
from typing import Any

from jaxtyping import Array

from vlm_jax.core.specs import ComputeSpec, ModelSpec
from vlm_jax.distributed.partitioning import Plan
from vlm_jax.inference import sampling
from vlm_jax.inference.sampling import Decoding, SamplingParams
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
def start_program(
    spec: ModelSpec, compute: ComputeSpec, plan: Plan, eos_ids: tuple[int, ...], max_new: int, kind: str
) -> Callable[..., Any]:
    """`(params, hidden, sampling_params) -> Decoding` after the first token, without its cache. `kind` is "greedy" or
    "sampled".
    """
    vlm = Vlm(spec, compute)

    def start(params: Any, hidden: Array, sampling_params: SamplingParams) -> Decoding:
        prefilled = sampling.Prefilled(hidden, None)
        return sampling.start(vlm, params, prefilled, _pick(kind, sampling_params), eos_ids, max_new)

    return plan.jit(start)


@functools.lru_cache(maxsize=32)
def decode_program(
    spec: ModelSpec, compute: ComputeSpec, plan: Plan, eos_ids: tuple[int, ...], kind: str
) -> Callable[..., Any]:
    """`(params, decoding, sampling_params, until) -> Decoding` when all rows have ended or have `until` tokens; donates
    `decoding`.
    """
    vlm = Vlm(spec, compute)

    def decode(params: Any, decoding: Decoding, sampling_params: SamplingParams, until: Array) -> Decoding:
        pick = _pick(kind, sampling_params)
        return sampling.decode(vlm, params, decoding, pick, eos_ids, sampling_params.limit, until)

    return plan.jit(decode, donate_argnums=1)


def _pick(kind: str, sampling_params: SamplingParams) -> sampling.Pick:
    if kind == "greedy":
        return sampling.greedy
    keys = sampling.row_keys(sampling_params.seed, sampling_params.row)
    return sampling.sampler(keys, sampling_params.temperature, sampling_params.top_p)
