"""Generate an answer to a prompt, with or without an image.

    python -m vlm_jax.predict --model llava-folder --image cat.png --prompt "What is this?"
    python -m vlm_jax.predict --model workdirs/one --image page.png --prompt "read row two"
    python -m vlm_jax.predict --model so400m-folder --llm qwen-folder --compressor pool --tokens 81 --image cat.png \\
        --prompt "What is this?" --show-tokens tokens.png

The model is a Hugging Face folder, a big_vision .npz, or the workdir of a run.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from vlm_jax.cli import make_parser, run_main
from vlm_jax.core.errors import UserError

_SUFFIXES = (".png", ".pdf", ".svg", ".jpg")
_PROGRESS_AFTER_SECS = 5.0


def _parse(argv: list[str]) -> argparse.Namespace:
    """The flags. Raises `UserError` for invalid ones before a model is loaded."""
    parser = make_parser("predict", __doc__)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="a Hugging Face folder, a big_vision .npz, or a run's workdir")
    add("--image", type=Path, nargs="+", default=[], help="image files (default: text only)")
    add("--prompt", help="the question; for a run, in the vocabulary of its data set")
    add("--llm", type=Path, help="join the encoder of --model with this language model")
    add("--vision", type=Path, help="folder of the vision tower, for a checkpoint of LLaVA's own code")
    add("--compressor", help="compressor of the visual tokens")
    add("--tokens", type=int, help="number of visual tokens")
    add("--image-size", type=int, metavar="PIXELS", help="image side (default: that of the checkpoint)")
    add("--tokenizer", type=Path, help="tokenizer.json or *.model (default: next to the weights)")
    add("--dtype", choices=("float32", "bfloat16"), help="default: float32 on CPU, else bfloat16")
    add("--max-new-tokens", type=int, help="default: 64, or that of the run")
    add("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    add("--top-p", type=float, default=1.0, help="nucleus sampling probability")
    add("--seed", type=int, default=0, help="of sampling and of random weights")
    add("--show-tokens", type=Path, metavar="PNG", help="plot which patches each visual token depends on")
    args = parser.parse_args(argv)
    if args.prompt is None and args.show_tokens is None:
        raise UserError("nothing to do: give --prompt TEXT, --show-tokens PNG, or both")
    if args.show_tokens is not None:
        if not args.image:
            raise UserError("--show-tokens: expected --image FILE, got none")
        if args.show_tokens.suffix.lower() not in _SUFFIXES:
            raise UserError(
                f"--show-tokens: expected a name that ends in {', '.join(_SUFFIXES)}, got {args.show_tokens}"
            )
        if not args.show_tokens.parent.is_dir():
            raise UserError(f"--show-tokens {args.show_tokens}: there is no folder {args.show_tokens.parent}")
    return args


def main(argv: list[str]) -> None:
    args = _parse(argv)
    import numpy as np
    from rich.console import Console
    from rich.progress import DownloadColumn, MofNCompleteColumn

    import vlm_jax
    from vlm_jax.compress import catalog
    from vlm_jax.core.text import printable
    from vlm_jax.data.images import fit, read_image
    from vlm_jax.inference import api, token_maps

    images = [read_image(path) for path in args.image]
    with _progress("reading weights", DownloadColumn()) as on_read:
        model = vlm_jax.load(
            args.model, dtype=args.dtype, llm=args.llm, vision=args.vision, compressor=args.compressor,
            tokens=args.tokens, tokenizer=args.tokenizer, image_size=args.image_size, seed=args.seed, on_read=on_read,
        )  # fmt: skip
    if images and model.spec.encoder is None:
        raise UserError(f"{args.model}: has no image encoder: leave --image out, or join an encoder with --llm")
    if not model.is_trained:
        print("note: the connector is not trained: answers are meaningless", file=sys.stderr)
    if args.show_tokens is not None:
        indices, pixels = token_maps.shown(model), fit(images[:1], model.spec.encoder)
        with _progress("token maps", MofNCompleteColumn()) as on_token:
            reads_question = catalog.row(model.spec.compressor.name).query_dependent and args.prompt is not None
            question = np.array([api.question_ids(model, args.prompt)]) if reads_question else None
            shares = token_maps.patch_shares(model, pixels, indices, question, on_token)
        token_maps.draw(model, pixels, shares, indices, args.show_tokens)
    if args.prompt is not None:
        console = Console(stderr=True)
        with console.status("generating (compiles first)") if console.is_terminal else nullcontext():
            sampling = (args.max_new_tokens, args.temperature, args.top_p, args.seed)
            (answer,) = vlm_jax.generate(model, [images] if images else None, [args.prompt], *sampling)
        print(printable(answer))  # a model may write control characters


@contextmanager
def _progress(description: str, column: Any) -> Iterator[Callable[[int, int], None]]:
    """Yields `update(done, total)` of a progress bar that appears after some seconds, on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(description), BarColumn(), column, TimeRemainingColumn())
    console, started = Console(stderr=True), time.monotonic()
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task(description, total=None)

    def update(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total)
        if time.monotonic() - started > _PROGRESS_AFTER_SECS:
            bar.start()

    try:
        yield update
    finally:
        if bar.live.is_started:
            bar.stop()


if __name__ == "__main__":
    run_main(main)
