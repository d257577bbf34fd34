"""Ask a model: about an image, or, without --image, in text alone.

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
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from vlm_jax.cli import ArgumentParser, run_main
from vlm_jax.core.errors import UserError

_PICTURES = (".png", ".pdf", ".svg", ".jpg")
_PATIENCE_SECS = 5.0  # what takes longer says how far it is


def _asked(argv: list[str]) -> argparse.Namespace:
    """The flags, as far as they can be checked before anything is loaded."""
    parser = ArgumentParser(
        prog="python -m vlm_jax.predict",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", type=Path, required=True, help="a Hugging Face folder, a big_vision .npz, or a run's workdir"
    )
    parser.add_argument("--image", type=Path, help="an image file; without it the model reads text alone")
    parser.add_argument("--prompt", help="the question; for a run, in the words of its data set")
    parser.add_argument("--llm", type=Path, help="join the encoder of --model with this language model")
    parser.add_argument("--compressor", help="make the visual tokens by this method")
    parser.add_argument("--tokens", type=int, help="how many visual tokens")
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="a side, if not that of the files")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json or *.model, where the weights have none beside")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on CPU, else bfloat16")
    parser.add_argument("--max-new-tokens", type=int, help="the longest answer (default: 64; a run's own)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw of the likeliest words of this probability")
    parser.add_argument("--seed", type=int, default=0, help="of sampling and of fresh weights")
    parser.add_argument("--show-tokens", type=Path, metavar="PNG", help="draw what each visual token reads")
    args = parser.parse_args(argv)
    if args.prompt is None and args.show_tokens is None:
        raise UserError("nothing to do: give --prompt TEXT, --show-tokens PNG, or both")
    if args.show_tokens is not None and args.image is None:
        raise UserError("--show-tokens draws over an image: give --image FILE")
    if args.show_tokens is not None and args.show_tokens.suffix.lower() not in _PICTURES:
        raise UserError(f"--show-tokens {args.show_tokens}: a name that ends in {', '.join(_PICTURES)} is wanted")
    if args.show_tokens is not None and not args.show_tokens.parent.is_dir():
        raise UserError(f"--show-tokens {args.show_tokens}: there is no folder {args.show_tokens.parent}")
    return args


def main(argv: list[str]) -> None:
    args = _asked(argv)
    import jax
    from rich.progress import DownloadColumn, MofNCompleteColumn

    import vlm_jax
    from vlm_jax.compress import catalog
    from vlm_jax.data.images import fit, read_image
    from vlm_jax.inference import api, token_maps

    image = None if args.image is None else read_image(args.image)
    with _progress("reading weights", DownloadColumn()) as on_read:
        model = vlm_jax.load(
            args.model, dtype=args.dtype, llm=args.llm, compressor=args.compressor, tokens=args.tokens,
            tokenizer=args.tokenizer, image_size=args.image_size, seed=args.seed, on_read=on_read,
        )  # fmt: skip
    if image is not None and model.spec.encoder is None:
        raise UserError(f"{args.model}: a language model alone sees no image; leave --image out, or join an encoder")
    if args.llm or (args.compressor and jax.tree.leaves(model.params["connector"]["compressor"])):
        print("note: the connector is fresh, not trained: its answers mean nothing yet", file=sys.stderr)
    if args.show_tokens is not None:
        which, pixels = token_maps.shown(model), fit([image], model.spec.encoder)
        with _progress("what visual tokens read", MofNCompleteColumn()) as on_token:
            method = model.spec.compressor and catalog.row(model.spec.compressor.name)
            asks = args.prompt is not None and method is not None and method.query_dependent
            vector = api.question_vector(model, args.prompt) if asks else None
            shares = token_maps.patch_shares(model, pixels, which, vector, on_token)
        token_maps.draw(model, pixels, shares, which, args.show_tokens)
    if args.prompt is not None:
        with _status("answering (the first prompt of its length compiles a program)"):
            (answer,) = vlm_jax.generate(
                model,
                None if image is None else [image],
                [args.prompt],
                args.max_new_tokens,
                args.temperature,
                args.top_p,
                args.seed,
            )
        print(answer)


def _status(what: str) -> AbstractContextManager[Any]:
    """A line that moves while something is done, on a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    return console.status(what) if console.is_terminal else nullcontext()


@contextmanager
def _progress(doing: str, amount: Any) -> Iterator[Callable[[int, int], None]]:
    """Hears (done so far, in all), and shows both, in rich's column `amount`, with the time left once it takes long."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(doing), BarColumn(), amount, TimeRemainingColumn())
    screen, started = Console(stderr=True), time.monotonic()
    bar = Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal)
    task = bar.add_task(doing, total=None)

    def told(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total)
        if time.monotonic() - started > _PATIENCE_SECS:
            bar.start()

    try:
        yield told
    finally:
        if bar.live.is_started:
            bar.stop()


if __name__ == "__main__":
    run_main(main)
