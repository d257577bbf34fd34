"""What each visual token reads: how much it changes with each patch of the encoder, for any compressor.

    which = shown(model)                              # numbers of the tokens that a figure has room for
    shares = patch_shares(model, pixels, which)       # [token, rows, columns], each token's shares add up to one
    draw(model, pixels, shares, which, "tokens.png")

The share of patch p in token v is |d token_v / d patch_p|, the Frobenius norm of the compressor's Jacobian block at
this image, over the sum of all patches. A patch is what the encoder says of it, tapped layers included.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from vlm_jax.compress import catalog
from vlm_jax.core.errors import UserError
from vlm_jax.core.files import atomic_write
from vlm_jax.core.structs import Visual
from vlm_jax.inference.loading import Model
from vlm_jax.models.vlm import Vlm

PROBES = 16  # random orthonormal directions of a token; of a narrower token all, and then the norm is exact
SHOWN = 6  # panels along a side of a figure


def shown(model: Model) -> Int[np.ndarray, " shown"]:
    """Tokens for a figure: all, or so many that are evenly spread; of a square of tokens, rows and columns of it.

    Raises `UserError` for a model without visual tokens.
    """
    count = model.visual_tokens
    if not count:
        raise UserError("this model has no visual tokens to show")
    if count <= SHOWN**2:
        return np.arange(count)
    side = math.isqrt(count)
    if side**2 == count:
        at = np.linspace(0, side - 1, SHOWN).round().astype(int)
        return (side * at[:, None] + at).ravel()
    return np.linspace(0, count - 1, SHOWN**2).round().astype(int)


def patch_shares(
    model: Model,
    pixels: UInt8[np.ndarray, "1 H H 3"] | Float[np.ndarray | Array, "1 H H 3"],
    which: Int[np.ndarray, " shown"],
    vector: Float[Array, "1 D"] | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> Float[np.ndarray, "shown rows columns"]:
    """One image's shares in the tokens `which`. `vector` is the question's (`answering.question_vector`), for a
    compressor that reads it. `on_token` is called after each with (tokens done, tokens in all).

    |J|^2 = E |r J|^2 over random unit directions r, times the width (Hutchinson); each r J is one vector-Jacobian
    product. Raises `UserError` for a compressor that reads the question, and is given none.
    """
    spec = model.spec.compressor
    assert spec is not None
    method = catalog.row(spec.name)
    if method.query_dependent and vector is None:
        raise UserError(f"compressor {spec.name!r} reads the question: give the prompt (--prompt) whose tokens to show")
    vector = None if vector is None else jnp.asarray(vector, jnp.float32)
    key = jax.random.key(0)
    probes = jnp.linalg.qr(jax.random.normal(key, (spec.encoder_width, min(PROBES, spec.encoder_width))))[0].T

    def encode(params: Any, image: Array) -> tuple[Visual, Any]:
        visual, weights = Vlm(model.spec, model.compute).encode(params, image), params["connector"]["compressor"]
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (visual, weights))

    def of_token(visual: Visual, weights: Any, number: Array) -> Array:
        _, pull = jax.vjp(lambda v: method.apply(weights, v, vector, spec).tokens[0, number], visual)
        pulled: Visual = jax.vmap(lambda one: pull(one)[0])(probes)
        squares = jnp.sum(pulled.tokens**2, axis=(0, 1, 3))
        squares = squares if pulled.taps is None else squares + jnp.sum(pulled.taps**2, axis=(0, 1, 2, 4))
        norm = jnp.sqrt(squares)
        return norm / jnp.maximum(norm.sum(), jnp.finfo(norm.dtype).tiny)

    given = model.plan.jit(encode)(model.params, jnp.asarray(pixels))
    program, out = model.plan.jit(of_token), []
    for number in which.tolist():
        out.append(np.asarray(program(*given, np.int32(number))))
        if on_token is not None:
            on_token(len(out), len(which))
    return np.stack(out).reshape(-1, *spec.grid)


def draw(
    model: Model,
    pixels: UInt8[np.ndarray, "1 H H 3"],
    shares: Float[np.ndarray, "shown r c"],
    which: Int[np.ndarray, " shown"],
    out: Path,
) -> None:
    """A panel for each token of `which`, its shares over the image, as a picture file."""
    import matplotlib.pyplot as plt

    encoder, spec = model.spec.encoder, model.spec.compressor
    assert encoder is not None
    assert spec is not None
    grey = pixels[0].mean(axis=-1) / 255
    columns = math.ceil(len(which) ** 0.5)
    rows = math.ceil(len(which) / columns)
    # Of one or two panels, large ones: the words below want their width.
    inches = max(1.5, 4.5 / columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(inches * columns, (inches + 0.12) * rows + 0.75), squeeze=False, layout="constrained"
    )
    side = encoder.patch_size * np.array(spec.grid)  # what the patches cover; the rest of the border is not looked at
    extent = (0, side[1], side[0], 0)
    for panel in panels.flat:
        panel.set_axis_off()
    for panel, token, share in zip(panels.flat, which, shares, strict=False):
        panel.imshow(grey[: side[0], : side[1]], cmap="gray", vmin=-0.3, vmax=1.3, extent=extent)
        # What is not read stays a picture.
        panel.imshow(
            share, cmap="autumn_r", alpha=0.65 * share / max(share.max(), np.finfo(share.dtype).tiny), vmin=0,
            vmax=share.max(), extent=extent, interpolation="nearest",
        )  # fmt: skip
        panel.set_title(f"token {token + 1}", fontsize=8, pad=2)
    some = "" if len(which) == spec.tokens else f"{len(which)} of "
    many = "visual token reads" if spec.tokens == 1 else "visual tokens read"
    figure.supxlabel(
        f"What {some}{spec.tokens} {many} ({spec.name}):\nthe redder a patch, the more it changes the token\n"
        "(norm of its derivative with respect to the patch, relative to its largest)",
        fontsize=8,
    )
    try:
        with atomic_write(out) as new:
            figure.savefig(new, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"{out}: cannot be written ({error})") from error
    finally:
        plt.close(figure)
