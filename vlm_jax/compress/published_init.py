"""Initial values as in the published code of a method, where they differ from LeCun's normal and zero biases."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.compress.layers import Weights

InitialValues = Callable[
    [jax.Array, tuple[int, ...], int, str], Float[Array, "..."] | None
]  # (key, shape, fan in, kind)


def truncated_normal(key: jax.Array, shape: tuple[int, ...], fan_in: int, kind: str) -> Float[Array, "..."] | None:
    """Kernels normal with standard deviation 0.02 (truncated at +-2, where nothing is), biases zero (TokenPacker, MQT);
    the projections of attention as `torch_default`."""
    if kind == "in_proj":
        return uniform(key, shape, math.sqrt(6 / (4 * fan_in)))
    return 0.02 * jax.random.normal(key, shape, jnp.float32) if kind == "kernel" else None


def torch_default(key: jax.Array, shape: tuple[int, ...], fan_in: int, kind: str) -> Float[Array, "..."]:
    """Kernels and biases uniform within 1 / sqrt(fan in); the projections of attention's queries, keys and values
    Xavier-uniform as one kernel of three times the width (QueCC, LDPv2)."""
    return uniform(key, shape, math.sqrt(6 / (4 * fan_in)) if kind == "in_proj" else fan_in**-0.5)


def normal(key: jax.Array, shape: tuple[int, ...], fan_in: int, kind: str) -> Float[Array, "..."] | None:
    """Kernels normal with standard deviation 0.02, biases zero (C-Abstractor; Q-Former, as BERT)."""
    return None if kind == "bias" else 0.02 * jax.random.normal(key, shape, jnp.float32)


def torch_linear(key: jax.Array, shape: tuple[int, ...], fan_in: int, kind: str) -> Float[Array, "..."]:
    """`torch_default` where queries, keys and values have a linear layer each (Perceiver resampler)."""
    return uniform(key, shape, fan_in**-0.5)


def xavier(key: jax.Array, shape: tuple[int, ...], fan_in: int, kind: str) -> Float[Array, "..."] | None:
    """Kernels Xavier-uniform, biases zero (TokenLearner 1.1)."""
    fan_out = math.prod(shape) // fan_in
    return None if kind == "bias" else uniform(key, shape, math.sqrt(6 / (fan_in + fan_out)))


def draw(weights: Weights, key: jax.Array, rule: InitialValues) -> Weights:
    """The same boxed weights with kernels and biases of `rule`; norms stay, and so does what it gives None for. The
    kinds are "kernel", "bias", and "in_proj" for attention, whose biases stay zero."""
    keys = iter(jax.random.split(key, 2 * len(jax.tree.leaves(weights))))

    def walk(part: Weights, inside: str) -> Weights:
        out: dict[str, Any] = {}
        for name, value in part.items():
            out[name] = walk(value, name) if isinstance(value, dict) else value
        if "kernel" in part:
            is_inward, is_attention = inside in ("query", "key", "value"), part["kernel"].value.ndim == 3
            shape = part["kernel"].value.shape
            fan_in = math.prod(shape[:-1]) if inside == "out" else shape[0]
            kinds = {"kernel": "in_proj" if is_attention and is_inward else "kernel"}
            kinds |= {} if is_attention or "bias" not in part else {"bias": "bias"}
            for leaf, kind in kinds.items():
                new = rule(next(keys), part[leaf].value.shape, fan_in, kind)
                out[leaf] = part[leaf] if new is None else nn.LogicallyPartitioned(new, part[leaf].names)
        return out

    return walk(weights, "")


def uniform(key: jax.Array, shape: tuple[int, ...], bound: float) -> Float[Array, "..."]:
    """float32 in [-bound, bound)."""
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)
