"""Layers of the encoder and the decoder. Parameters are float32 with logical axis names."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.core.axes import NORM
from vlm_jax.ops.logical_axes import gather_for_compute
from vlm_jax.ops.products import dense

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}
MLP_INNER = "mlp_inner"  # checkpoint name of the products with the gate and up kernels
REMAT: dict[str, Callable[..., bool]] = {  # of `sizing.remat.POLICIES`, which says what each keeps
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "mlp": jax.checkpoint_policies.save_only_these_names(MLP_INNER),
    "block": jax.checkpoint_policies.nothing_saveable,
}


def remat(block: type[nn.Module], policy: str, in_scan: bool = True) -> type[nn.Module]:
    """The block under a rematerialisation policy; "auto" has no effect on shapes, and `build.fitting` replaces it for
    training. Outside a scan, CSE would undo rematerialisation and is prevented.
    """
    return block if policy in ("none", "auto") else nn.remat(block, policy=REMAT[policy], prevent_cse=not in_scan)


class Linear(nn.Module):
    """Contracts the last `len(inputs)` axes of x with a kernel of axes inputs + outputs, as (size, name) pairs."""

    inputs: tuple[tuple[int, str], ...]
    outputs: tuple[tuple[int, str], ...]
    bias: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        sizes = [size for size, _ in (*self.inputs, *self.outputs)]
        names = [name for _, name in (*self.inputs, *self.outputs)]
        count = len(self.inputs)
        init = nn.initializers.lecun_normal(in_axis=range(count), out_axis=range(count, len(sizes)))
        kernel = self.param("kernel", nn.with_logical_partitioning(init, tuple(names)), tuple(sizes))
        x = dense(x, gather_for_compute(kernel, tuple(names), x.dtype), count)
        if self.bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, tuple(names[count:]))
            x = x + self.param("bias", zeros, tuple(sizes[count:])).astype(x.dtype)
        return x


class RMSNorm(nn.Module):
    """x / rms(x) * w (arXiv 1910.07467), statistics in float32; `plus_one` uses 1 + w with w starting at 0 (Gemma)."""

    eps: float
    plus_one: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        start = nn.initializers.zeros if self.plus_one else nn.initializers.ones
        scale = self.param("scale", nn.with_logical_partitioning(start, (NORM,)), (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * (1 + scale if self.plus_one else scale)).astype(x.dtype)


class LayerNorm(nn.Module):
    """Layer norm with scale and bias, statistics in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "... E"]) -> Float[Array, "... E"]:
        scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, (NORM,)), (x.shape[-1],))
        bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, (NORM,)), (x.shape[-1],))
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.eps)
        return (normed * scale + bias).astype(x.dtype)
