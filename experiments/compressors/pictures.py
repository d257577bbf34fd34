"""What each method reads of a page of handwriting and of a photograph: figures/METHOD.png.

    python -m experiments.compressors.pictures --workdir workdirs/compressors --family ocr --tokens 4

A panel for each visual token that a compressor gives the decoder, as `predict --show-tokens` draws it; and one for the
answer: how much each patch changes the most likely first word, through all that lies between. Methods inside the
decoder have the second panel only. Weights are those of the grid, seed 0; of the training-free methods the model of all
patches. The encoder has seen handwriting only, so that the photograph shows where a method looks, not what it knows.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from experiments.compressors.grid import TRAINED
from experiments.compressors.training_free import METHODS, nearest
from experiments.flags import whole
from vlm_jax.cli import ArgumentParser, run_main
from vlm_jax.compress import catalog
from vlm_jax.core.errors import UserError
from vlm_jax.inference import api, token_maps
from vlm_jax.inference import prompts as host
from vlm_jax.inference.loading import Model, load
from vlm_jax.models.vlm import Vlm
from vlm_jax.scaling import plots

HERE = Path(__file__).parent
PANELS = 4


def answer_shares(model: Model, image: UInt8[np.ndarray, "H H 3"], prompt: str) -> Float[np.ndarray, "rows columns"]:
    """Shares of the patches in the logit of the most likely first word: norms of its gradient with respect to the
    encoder's outputs."""
    rows = api.prompt_rows(model, [image], [prompt])
    tokens, mask = host.padded(rows.tokens)
    inputs = jax.tree.map(jnp.asarray, host.inputs_of(model, rows.images, tokens, mask, None, rows.questions))
    vlm = Vlm(model.spec, model.compute)
    visual = jax.jit(vlm.encode)(model.params, inputs.views.pixels[:, 0])

    def top_logit(tokens: Array, taps: Array | None) -> Array:
        moved = visual._replace(tokens=tokens, taps=taps)
        features = jax.tree.map(lambda leaf: leaf[:, None], moved)
        hidden, _ = vlm.forward(
            model.params, inputs._replace(views=inputs.views._replace(pixels=None, features=features))
        )
        return jnp.max(vlm.logits(model.params, hidden[:, -1:]))

    grads = jax.jit(jax.grad(top_logit, argnums=(0,) if visual.taps is None else (0, 1)))(visual.tokens, visual.taps)
    squares = sum(jnp.sum(grad**2, axis=(*range(grad.ndim - 2), grad.ndim - 1)) for grad in grads)
    shares = np.asarray(jnp.sqrt(squares))
    return (shares / max(shares.sum(), 1e-30)).reshape(model.spec.encoder.grid)


def method_model(workdir: Path, name: str, tokens: int, family: str) -> Model | None:
    """The trained model of a method, or for a training-free one that of all patches with it; None: not in the grid."""
    own, every = ({"compressor": c, "tokens": v} for c, v in ((name, tokens), ("none", 64)))
    found = []
    for want in (own, every):
        start = "".join(f"{key}={value}," for key, value in want.items()) + f"family={family},"
        found += sorted(cell for cell in workdir.glob("cells/*") if cell.name.startswith(start))[:1]
        if found or name in TRAINED:
            break
    if not found:
        return None
    model = load(found[0])
    if name in TRAINED or name == "none":
        return model
    old = model.spec
    given = nearest(name, tokens, old.encoder.token_grid)
    return model._replace(spec=catalog.model_spec(old.encoder, name, given, old.decoder, old.projector, old.mask))


def grey(panel: Any, image: UInt8[np.ndarray, "H H 3"]) -> None:
    panel.imshow(image.mean(axis=-1), cmap="gray", vmin=-80, vmax=330, extent=(0, 1, 1, 0))
    panel.set_axis_off()


@plots.styled
def draw(name: str, model: Model, images: dict[str, tuple[np.ndarray, str]], out: Path) -> None:
    """A row for each image: the image, its tokens, the answer."""
    import matplotlib.pyplot as plt

    inside = bool(catalog.stages(model.spec)) or catalog.hides_tokens(model.spec)
    count = 0 if inside else min(model.visual_tokens, PANELS)
    figure, panels = plt.subplots(
        len(images), count + 2, figsize=(1.35 * (count + 2), 1.5 * len(images) + 0.3), squeeze=False
    )
    for number, (row, (image, prompt)) in enumerate(zip(panels, images.values(), strict=True)):
        for panel in row:
            grey(panel, image)
        shares = [answer_shares(model, image, prompt)]
        if count:
            question = np.array([api.question_ids(model, prompt)]) if model.reads_question else None
            shares = [*token_maps.patch_shares(model, image[None], np.arange(count), question), *shares]
        titles = [*(f"token {i + 1}" for i in range(count)), "answer"]
        for panel, share, title in zip(row[1:], shares, titles, strict=True):
            alpha = 0.75 * share / max(share.max(), 1e-30)
            panel.imshow(share, cmap="autumn_r", alpha=alpha, vmin=0, extent=(0, 1, 1, 0), interpolation="nearest")
            if number == 0:
                panel.set_title(title, fontsize=8, fontweight="normal", loc="center", pad=2)
    panels[0, 0].set_title(name, fontsize=9, pad=2)
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=0.9, wspace=0.04, hspace=0.06)
    plots.save(figure, out)
    plt.close(figure)


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="python -m experiments.compressors.pictures", description=__doc__, allow_abbrev=False)
    parser.add_argument("--workdir", type=Path, required=True, help="of experiments/compressors/grid.py")
    parser.add_argument("--family", default="ocr")
    parser.add_argument("--tokens", type=whole(1), default=4)
    args = parser.parse_args(argv)

    from skimage import data as photographs

    page, question = first_page(args.workdir, args.family)
    photograph = np.asarray(Image.fromarray(photographs.astronaut()).resize(page.shape[:2], Image.Resampling.BICUBIC))
    images = {"page": (page, question), "photograph": (photograph, question)}
    for name in dict.fromkeys((*TRAINED, *METHODS)):
        if (model := method_model(args.workdir, name, args.tokens, args.family)) is not None:
            draw(name, model, images, HERE / "figures" / f"{name}.png")
            print(f"figures/{name}.png")


def first_page(workdir: Path, family: str) -> tuple[UInt8[np.ndarray, "H H 3"], str]:
    """The first test image of a family, and its first question."""
    from vlm_jax import build
    from vlm_jax.checkpoints.orbax import read_spec
    from vlm_jax.config.resolve import spec_from_dict
    from vlm_jax.data.images import read_image
    from vlm_jax.data.readers.open import open_source

    cells = [cell for cell in sorted(workdir.glob("cells/*")) if f"family={family}," in cell.name]
    if not cells:
        raise UserError(f"--workdir {workdir}: expected cells of the family {family}, got none (launch the grid there)")
    spec = spec_from_dict(read_spec(cells[0]))
    example = open_source(spec.data.test[0], build.default_cache())[0]
    text = next(turn.text for turn in example.turns if turn.role == "user")
    return np.asarray(read_image(example.images[0], "page")), text.replace("<image>", "").strip()


if __name__ == "__main__":
    run_main(main)
