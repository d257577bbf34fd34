"""Token maps: how much each visual token depends on each patch, for any compressor.

    indices = shown(model)                              # tokens to plot
    shares = patch_shares(model, pixels, indices)       # [token, rows, columns], each token sums to one
    draw(model, pixels, shares, indices, "tokens.png")

The share of patch p in token v is |d token_v / d patch_p|, the Frobenius norm of the compressor's Jacobian block,
divided by its sum over patches. A patch is its encoder output, including tapped layers.
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
from vlm_jax.compress.contract import OF_QUESTION
from vlm_jax.core.errors import UserError
from vlm_jax.core.files import atomic_write
from vlm_jax.core.structs import Evidence
from vlm_jax.inference.loading import Model
from vlm_jax.models import connector
from vlm_jax.models.vlm import Vlm

PROBES = 16  # random orthonormal directions; exact for tokens up to this width
SHOWN = 6  # panels along a side of a figure


def shown(model: Model) -> Int[np.ndarray, " shown"]:
    """Indices of all tokens, or of at most SHOWN^2 evenly spaced ones. Raises `UserError` without visual tokens, and
    where the encoder merges tokens, which then have no places."""
    count = model.visual_tokens
    if not count:
        raise UserError("this model has no visual tokens to show")
    if merge := model.spec.encoder.merge:
        raise UserError(
            f"this model's encoder merges tokens, merge={list(merge)}: what they read has no places to show"
        )
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
    indices: Int[np.ndarray, " shown"],
    question: Int[np.ndarray, "1 Q"] | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> Float[np.ndarray, "shown rows columns"]:
    """Shares of the patches of one image in the tokens `indices`; `on_token` is called with (done, total).

    |J|^2 = width |r J|^2 over random unit directions r (Hutchinson); each r J is one vector-Jacobian product.
    `question` is token ids (`api.question_ids`); raises `UserError` if the compressor needs it and it is None.
    """
    spec = model.spec.compressor
    method = catalog.row(spec.name)
    if method.reads & OF_QUESTION and question is None:
        raise UserError(f"compressor {spec.name!r} reads the question: give the prompt (--prompt) whose tokens to show")
    question = None if question is None else jnp.asarray(question, jnp.int32)
    key = jax.random.key(0)
    width = spec.text_width if method.projects else method.output_width(spec)
    probes = jnp.linalg.qr(jax.random.normal(key, (width, min(PROBES, width))))[0].T

    def encode(params: Any, image: Array) -> tuple[Evidence, Any]:
        vlm = Vlm(model.spec, model.compute)
        evidence = vlm.evidence(params, vlm.encode(params, image), question)

        def wide(leaf: Array) -> Array:
            return leaf.astype(jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

        return jax.tree.map(wide, (evidence, params["connector"]))

    def of_token(evidence: Evidence, weights: Any, number: Array) -> Array:
        def token(tokens: Array, taps: Array | None) -> Array:
            moved = evidence._replace(tokens=tokens, taps=taps)
            return connector.apply(weights, moved, model.spec).tokens[0, number]

        _, pull = jax.vjp(token, evidence.tokens, evidence.taps)
        tokens, taps = jax.vmap(pull)(probes)
        squares = jnp.sum(tokens**2, axis=(0, 1, 3))
        squares = squares if taps is None else squares + jnp.sum(taps**2, axis=(0, 1, 2, 4))
        norm = jnp.sqrt(squares)
        return norm / jnp.maximum(norm.sum(), jnp.finfo(norm.dtype).tiny)

    encoded = model.plan.jit(encode)(model.params, jnp.asarray(pixels))
    program, out = model.plan.jit(of_token), []
    for number in indices.tolist():
        out.append(np.asarray(program(*encoded, np.int32(number))))
        if on_token is not None:
            on_token(len(out), len(indices))
    return np.stack(out).reshape(-1, *spec.grid)


def draw(
    model: Model,
    pixels: UInt8[np.ndarray, "1 H H 3"],
    shares: Float[np.ndarray, "shown r c"],
    indices: Int[np.ndarray, " shown"],
    out: Path,
) -> None:
    """Writes a figure with a panel for each token of `indices`: its shares over the image."""
    import matplotlib.pyplot as plt

    encoder, spec = model.spec.encoder, model.spec.compressor
    grey = pixels[0].mean(axis=-1) / 255
    columns = math.ceil(len(indices) ** 0.5)
    rows = math.ceil(len(indices) / columns)
    inches = max(1.5, 4.5 / columns)  # wide enough for the caption
    figure, panels = plt.subplots(
        rows, columns, figsize=(inches * columns, (inches + 0.12) * rows + 0.75), squeeze=False, layout="constrained"
    )
    side = encoder.patch_size * np.array(spec.grid)  # pixels that patches cover
    extent = (0, side[1], side[0], 0)
    for panel in panels.flat:
        panel.set_axis_off()
    for panel, token, share in zip(panels.flat, indices, shares, strict=False):
        panel.imshow(grey[: side[0], : side[1]], cmap="gray", vmin=-0.3, vmax=1.3, extent=extent)
        alpha = 0.65 * share / max(share.max(), np.finfo(share.dtype).tiny)
        panel.imshow(
            share, cmap="autumn_r", alpha=alpha, vmin=0, vmax=share.max(), extent=extent, interpolation="nearest"
        )
        panel.set_title(f"token {token + 1}", fontsize=8, pad=2)
    count = model.visual_tokens
    some = "" if len(indices) == count else f"{len(indices)} of "
    many = "visual token reads" if count == 1 else "visual tokens read"
    figure.supxlabel(
        f"What {some}{count} {many} ({spec.name}):\nthe redder a patch, the more it changes the token\n"
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
