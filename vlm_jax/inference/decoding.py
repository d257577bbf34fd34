"""Decoding with a loaded model: limits and sampling parameters of rows, and the programs that decode them.

params = sampling_params(rows, max_new_tokens, temperature, top_p, seed)
state, hidden = start(model, inputs, params, max_new)       # prefill and the first token
state = advance(model, state, params, until)                # up to `until` tokens
"""

import contextlib
import numbers
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from vlm_jax.core.errors import UserError
from vlm_jax.core.structs import Inputs
from vlm_jax.inference import programs
from vlm_jax.inference import prompts as host
from vlm_jax.inference.loading import Model, as_int, check_seed
from vlm_jax.inference.sampling import Decoding, SamplingParams

_MAX_CONTEXT = 2**20  # where a model's context is unknown


def sampling_params(rows: int, count: int, temperature: Any, top_p: Any, seed: Any) -> SamplingParams:
    """Equal parameters for all rows, each with the key of its index. Raises `UserError` for invalid ones."""
    seed = check_seed(seed)
    if not isinstance(temperature, numbers.Real) or not temperature >= 0:
        raise UserError(f"temperature: expected 0 (greedy) or more, got {temperature!r}")
    if not isinstance(top_p, numbers.Real) or not 0 < top_p <= 1:
        raise UserError(f"top_p: expected a probability above 0, 1 for all tokens, got {top_p!r}")
    # What is below the smallest normal float32 is 0 on the device: greedy.
    temperature = 0 if temperature < np.finfo(np.float32).tiny else temperature
    columns = (np.int32(count), np.float32(temperature), np.float32(top_p), np.uint32(seed))
    return SamplingParams(*(np.full(rows, value) for value in columns), np.arange(rows, dtype=np.int32))


def new_tokens(model: Model, inputs: Inputs, count: int | None, name: str = "max_new_tokens") -> int:
    """The number of new tokens; None: the model's `answer_tokens`, within its context. `name` is that of the argument.

    Raises `UserError` for more than the context allows after the longest prompt."""
    longest = int((inputs.segment != 0).sum(axis=1).max())
    limit = (model.spec.decoder.context or _MAX_CONTEXT) - longest
    if limit < 1:
        raise UserError(f"a prompt of {longest} tokens fills this model's context: shorten it")
    count = as_int(name, min(model.answer_tokens, limit) if count is None else count)
    if not 1 <= count <= limit:
        raise UserError(f"{name}: expected 1 to {limit} after a prompt of {longest} tokens, got {count}")
    return count


def start(model: Model, inputs: Inputs, params: SamplingParams, max_new: int) -> tuple[Decoding, jax.Array]:
    """The state after the first token, and the hidden states of the prompts' last tokens. `max_new` is static."""
    config, kind = (model.spec, model.compute, model.plan), _kind(params)
    inputs, params = host.put((host.to_bucket(inputs, model), params), model.plan)
    prefilled = programs.prefill_program(*config, max_new)(model.params, inputs)
    first = programs.start_program(*config, model.eos_ids, max_new, kind)
    state = first(model.params, prefilled.hidden, params)
    return state._replace(cache=prefilled.cache), prefilled.hidden


def advance(model: Model, state: Decoding, params: SamplingParams, until: int) -> Decoding:
    """The state when all rows have ended or have `until` tokens. A row with a lower `limit` than before ends early."""
    program = programs.decode_program(model.spec, model.compute, model.plan, model.eos_ids, _kind(params))
    return program(model.params, state, host.put(params, model.plan), np.int32(until))


def _kind(params: SamplingParams) -> str:
    return "sampled" if np.any(params.temperature) else "greedy"


def check_finite(model: Model, hidden: np.ndarray) -> None:
    """Raises `UserError` unless the hidden states are finite."""
    if not np.isfinite(hidden).all():
        raise UserError(f"hidden states are not finite: weights are damaged, or out of range for {model.compute.dtype}")


@contextlib.contextmanager
def memory_errors(rows: int, max_new_tokens: int) -> Iterator[None]:
    """Turns the device's error about memory into a `UserError`."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(f"{rows} rows and {max_new_tokens} new tokens do not fit into memory: ask for fewer") from error
