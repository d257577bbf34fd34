"""What each visual token reads: how much it changes with each patch of the encoder, for any compressor.

    shares = patch_shares(model, pixels)              # [V, rows, columns], each token's shares add up to one
    draw(model, pixels, shares, "tokens.png")

The share of patch p in token v is |d token_v / d patch_p|, the Frobenius norm of the compressor's Jacobian block at
this image, over the sum of all patches. A patch is what the encoder says of it, tapped layers included.
"""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vlm_jax.compress import catalog
from vlm_jax.core.errors import UserError
from vlm_jax.core.structs import Visual
from vlm_jax.models.vlm import Vlm
from vlm_jax.pretrained.loading import Model

PROBES = 64  # random orthonormal directions of a token; of a narrower token all, and then the norm is exact
SHOWN = 36  # panels of a figure


def patch_shares(
    model: Model, pixels: Float[np.ndarray | Array, "1 H H 3"], vector: Float[Array, "1 D"] | None = None
) -> Float[np.ndarray, "V rows columns"]:
    """One image's shares. `vector` is the question's (`answering.question_vector`), for a compressor that
    reads it.

    |J|^2 = E |r J|^2 over random unit directions r, times the width (Hutchinson); each r J is one vector-Jacobian
    product. Raises `UserError` for a model without visual tokens.
    """
    spec = model.spec.compressor
    if spec is None or not spec.tokens:
        raise UserError("this model has no visual tokens to show")
    method = catalog.row(spec.name)
    if method.query_dependent and vector is None:
        raise UserError(f"compressor {spec.name!r} reads the question: give the prompt (--prompt) whose tokens to show")
    vector = None if vector is None else jnp.asarray(vector, jnp.float32)
    key = jax.random.key(0)
    probes = jnp.linalg.qr(jax.random.normal(key, (spec.encoder_width, min(PROBES, spec.encoder_width))))[0].T

    def shares(params: Any, image: Array) -> Array:
        visual = Vlm(model.spec, model.compute).encode(params, image)
        visual = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), visual)
        weights = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params["connector"]["compressor"])
        tokens, pull = jax.vjp(lambda v: method.apply(weights, v, vector, spec).tokens, visual)

        def of_token(number: Array) -> Array:
            given = jnp.zeros((len(probes), *tokens.shape)).at[:, 0, number].set(probes)
            pulled: Visual = jax.vmap(lambda one: pull(one)[0])(given)
            squares = jnp.sum(pulled.tokens**2, axis=(0, 1, 3))
            return squares if pulled.taps is None else squares + jnp.sum(pulled.taps**2, axis=(0, 1, 2, 4))

        norm = jnp.sqrt(jax.lax.map(of_token, jnp.arange(spec.tokens)))
        return norm / jnp.maximum(norm.sum(axis=1, keepdims=True), jnp.finfo(norm.dtype).tiny)

    return np.asarray(model.plan.jit(shares)(model.params, jnp.asarray(pixels))).reshape(spec.tokens, *spec.grid)


def draw(model: Model, pixels: Float[np.ndarray, "1 H H 3"], shares: Float[np.ndarray, "V r c"], out: Path) -> None:
    """A panel for each token, the image behind its shares, as a picture file."""
    import matplotlib.pyplot as plt

    encoder, spec = model.spec.encoder, model.spec.compressor
    assert encoder is not None
    assert spec is not None
    grey = np.clip(pixels[0] * np.array(encoder.pixel_std) + np.array(encoder.pixel_mean), 0, 1).mean(axis=-1)
    chosen = np.unique(np.linspace(0, len(shares) - 1, min(SHOWN, len(shares))).round().astype(int))
    columns = math.ceil(len(chosen) ** 0.5)
    rows = math.ceil(len(chosen) / columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(1.5 * columns, 1.62 * rows + 0.75), squeeze=False, layout="constrained"
    )
    side = encoder.patch_size * np.array(spec.grid)  # what the patches cover; the rest of the border is not looked at
    extent = (0, side[1], side[0], 0)
    for panel in panels.flat:
        panel.set_axis_off()
    for panel, token in zip(panels.flat, chosen, strict=False):
        panel.imshow(grey[: side[0], : side[1]], cmap="gray", vmin=-0.3, vmax=1.3, extent=extent)
        panel.imshow(
            shares[token], cmap="inferno", alpha=0.65, vmin=0, vmax=shares[token].max(), extent=extent,
            interpolation="nearest",
        )  # fmt: skip
        panel.set_title(f"token {token + 1}", fontsize=8, pad=2)
    some = "" if len(chosen) == len(shares) else f"{len(chosen)} of "
    figure.supxlabel(
        f"What {some}{len(shares)} visual tokens read ({spec.name}): bright patches change the token most\n"
        "(norm of its derivative with respect to the patch, relative to its largest)",
        fontsize=8,
    )
    temporary = out.with_name(f"{out.stem}.partial{out.suffix}")
    try:
        figure.savefig(temporary, dpi=150)
        temporary.replace(out)
    except (OSError, ValueError) as error:
        raise UserError(f"{out}: cannot be written ({error})") from error
    finally:
        plt.close(figure)
