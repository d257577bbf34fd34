"""Write a model as a folder that transformers loads: `python -m vlm_jax.export --model workdirs/one --part decoder
--out decoder`.

A model is a Hugging Face folder, a big_vision .npz or the workdir of a run. With `--out name.npz` the image tower
(`--part encoder`) or the whole PaliGemma goes into a big_vision checkpoint instead.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm_jax.cli import ArgumentParser, run_main
from vlm_jax.core.errors import UserError

_MOST_GB = 1e9  # the bytes of which are still a number


def main(argv: list[str]) -> None:
    parser = ArgumentParser(
        prog="python -m vlm_jax.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, type=Path, help="a Hugging Face folder, a .npz, or a run's workdir")
    parser.add_argument("--out", required=True, type=Path, help="a new folder, or a name ending in .npz")
    parser.add_argument("--part", default="whole", choices=("whole", "decoder", "encoder"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="as it is held, if not given")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="size at which a file of weights is split")
    args = parser.parse_args(argv)
    if not 0 < args.max_shard_gb < _MOST_GB:
        raise UserError(f"--max-shard-gb {args.max_shard_gb} must be positive, and finite")

    from rich.console import Console
    from rich.progress import Progress

    from vlm_jax.checkpoints.huggingface import exporting
    from vlm_jax.core import tree

    exporting.check_vacant(args.out)
    screen = Console(stderr=True)
    with Progress(console=screen, transient=True, disable=not screen.is_terminal) as progress:
        bars = [
            progress.add_task(f"{doing} {path}", total=None)
            for doing, path in (("reading", args.model), ("writing", args.out))
        ]

        def read(size: int, total: int) -> None:
            progress.update(bars[0], advance=size, total=total)

        spec, params, image_token = _read(args.model, args.part, args.dtype, args.out, read)
        size = sum(leaf.nbytes for leaf in tree.flatten(params).values())
        progress.update(bars[0], completed=size, total=size)
        progress.update(bars[1], total=size)
        if args.out.suffix == ".npz":
            exporting.save_npz(args.out, spec, params)
        else:
            exporting.save_folder(
                args.out, spec, params, image_token, args.model if args.model.is_dir() else None,
                int(args.max_shard_gb * 1e9), lambda size: progress.advance(bars[1], size),
            )  # fmt: skip
        progress.update(bars[1], completed=size)
    print(args.out)


def _read(
    path: Path, part: str, dtype: str | None, out: Path, read: Callable[[int, int], None]
) -> tuple[Any, Any, int | None]:
    """(spec, parameters of its parts, image token). What cannot be exported is refused before weights are read."""
    import jax

    from vlm_jax.checkpoints import inspection
    from vlm_jax.checkpoints.huggingface import exporting, processors
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
    there = inspection.inspect(path)
    if there.encoder is not None:
        there = there._replace(encoder=processors.with_processor_files(there.encoder, path))
    whole = there.encoder is not None and there.decoder is not None
    spec = inspection.model_spec(there) if whole else ModelSpec(there.encoder, None, None, there.decoder, there.mask)
    spec = exporting.part_of(spec, part)
    exporting.check(out, spec, there.image_token)
    parts = inspection.PARTS if part == "whole" else (part,)
    total = inspection.size_bytes(there, parts)
    params = inspection.load_parts(there, parts, None, dtype, lambda size: read(size, total))
    return spec, params, there.image_token


if __name__ == "__main__":
    run_main(main)
