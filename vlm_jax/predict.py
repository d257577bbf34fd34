"""Ask a trained run about an image: `python -m vlm_jax.predict --workdir workdirs/one --image page.png --prompt "read
row two"`.
"""

from pathlib import Path

from vlm_jax.core.errors import Flags, UserError, door


def main(argv: list[str]) -> None:
    parser = Flags(prog="python -m vlm_jax.predict", description=__doc__, allow_abbrev=False)
    parser.add_argument("--workdir", required=True, type=Path, help="a folder that vlm_jax.train made")
    parser.add_argument("--image", required=True, type=Path, help="PNG or JPEG; resized to the encoder's resolution")
    parser.add_argument("--prompt", required=True, help="the question, in the words of the data set")
    args = parser.parse_args(argv)

    import numpy as np
    from PIL import Image, UnidentifiedImageError

    from vlm_jax import build, job
    from vlm_jax.config.resolve import spec_from_dict
    from vlm_jax.store.checkpoint import read_spec

    build.use_compilation_cache(build.default_cache())
    network = build.open_network(spec_from_dict(read_spec(args.workdir)))
    side = network.spec.model.encoder.image_size
    try:
        image = np.asarray(Image.open(args.image).convert("RGB").resize((side, side), Image.Resampling.BILINEAR))
    except FileNotFoundError:
        raise UserError(f"no image {args.image}") from None
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise UserError(f"{args.image}: not a readable image ({error})") from error
    print(job.answer(network, job.restore(network, args.workdir), image, args.prompt))


if __name__ == "__main__":
    door(main)()
