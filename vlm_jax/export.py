"""Export a model to a folder that transformers loads.

    python -m vlm_jax.export --model workdirs/one --part decoder --out decoder

A model is a Hugging Face folder, a big_vision .npz or the workdir of a run. `--out name.npz` writes the image tower
(`--part encoder`) or a PaliGemma as a big_vision checkpoint instead.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm_jax.cli import make_parser, run_main
from vlm_jax.core.errors import UserError


def main(argv: list[str]) -> None:
    parser = make_parser("export", __doc__)
    parser.add_argument("--model", required=True, type=Path, help="a Hugging Face folder, a .npz, or a run's workdir")
    parser.add_argument("--out", required=True, type=Path, help="a new folder, or a name ending in .npz")
    parser.add_argument("--part", default="whole", choices=("whole", "decoder", "encoder"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: that of the model")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="largest size of a file of weights")
    args = parser.parse_args(argv)
    if not 0 < args.max_shard_gb < 1e9:
        raise UserError(f"--max-shard-gb: expected a positive, finite size, got {args.max_shard_gb}")

    from rich.console import Console
    from rich.progress import Progress

    from vlm_jax.checkpoints.huggingface import exporting
    from vlm_jax.core import tree

    exporting.check_vacant(args.out)
    screen = Console(stderr=True)
    with Progress(console=screen, transient=True, disable=not screen.is_terminal) as progress:
        reading = progress.add_task("reading", total=None)
        writing = progress.add_task("writing", total=None)

        def on_read(size: int, total: int) -> None:
            progress.update(reading, advance=size, total=total)

        spec, params, image_token = _read(args.model, args.part, args.dtype, args.out, on_read)
        size = sum(leaf.nbytes for leaf in tree.flatten(params).values())
        progress.update(reading, completed=size, total=size)
        progress.update(writing, total=size)
        if args.out.suffix == ".npz":
            exporting.save_npz(args.out, spec, params)
        else:
            exporting.save_folder(
                args.out, spec, params, image_token, args.model if args.model.is_dir() else None,
                int(args.max_shard_gb * 1e9), lambda size: progress.advance(writing, size),
            )  # fmt: skip
        progress.update(writing, completed=size)
    print(args.out)


def _read(
    path: Path, part: str, dtype: str | None, out: Path, on_read: Callable[[int, int], None]
) -> tuple[Any, Any, int | None]:
    """(spec, parameters, image token). Raises `UserError` for a model that cannot be exported, before reading it."""
    import jax

    from vlm_jax.checkpoints import inspection
    from vlm_jax.checkpoints.huggingface import exporting
    from vlm_jax.core.specs import ModelSpec
    from vlm_jax.models.decoder import stack_layers

    if (path / "spec.json").exists():
        from vlm_jax import build, job
        from vlm_jax.checkpoints.orbax import read_spec
        from vlm_jax.config.resolve import spec_from_dict

        network = build.open_network(spec_from_dict(read_spec(path)))
        spec = exporting.part_of(network.model.spec, part)
        exporting.check(out, spec, None)
        params = {"encoder": network.encoder, **job.restore(network, path)}
        params = {name: params[name] for name in params if part in ("whole", name)}
        if "decoder" in params:
            params["decoder"] = stack_layers(params["decoder"])
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params) if dtype else params
        return spec, params, None
    info = inspection.inspect(path)
    if info.missing and part != "decoder":
        raise UserError(info.missing)
    info = info._replace(encoder=inspection.prepared_encoder(info))
    is_vlm = info.encoder is not None and info.decoder is not None
    spec = inspection.model_spec(info) if is_vlm else ModelSpec(info.encoder, None, None, info.decoder, info.mask)
    spec = exporting.part_of(spec, part)
    exporting.check(out, spec, info.image_token)
    parts = inspection.PARTS if part == "whole" else (part,)
    total = inspection.size_bytes(info, parts)
    params = inspection.load_parts(info, parts, None, dtype, lambda size: on_read(size, total))
    return spec, params, info.image_token


if __name__ == "__main__":
    run_main(main)
