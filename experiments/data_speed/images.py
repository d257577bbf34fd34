"""How fast JPEGs become a model's pixels: `python -m experiments.data_speed.images`.

`read_and_fit` and `normalise` of this version beside the steps that they replace (an array of the whole image between
decoding and resizing, float64 arithmetic for every pixel), on the same drawn files, in turn; and Pillow's part of it,
decoding and resizing alone. One core, processor time; equal pixels are checked. Renews images.json and the table of
README.md.
"""

import io
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from experiments.flags import whole
from experiments.inference_speed.measuring import cpu_name
from experiments.readme import write_block
from experiments.report import markdown_table
from vlm_jax.cli import ArgumentParser, run_main
from vlm_jax.core.specs import EncoderSpec
from vlm_jax.data import images
from vlm_jax.sizing import zoo

HERE = Path(__file__).parent
ENCODERS = ("siglip-so400m14-384", "clip-l14-336")


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="python -m experiments.data_speed.images", description=__doc__)
    parser.add_argument("--images", type=whole(1), default=32)
    parser.add_argument("--pairs", type=whole(1), default=9)
    args = parser.parse_args(argv)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    jpegs = [draw(seed) for seed in range(args.images)]
    rows = [measure(zoo.encoder(name), jpegs, args.pairs) for name in ENCODERS]
    machine = {"load": round(os.getloadavg()[0], 1), "cpu": cpu_name()}
    result = {"images": args.images, "pairs": args.pairs, **machine, "rows": rows}
    print(json.dumps(result, indent=1))
    (HERE / "images.json").write_text(json.dumps(result, indent=1) + "\n")
    write_block(HERE / "README.md", "images", table(result), "experiments.data_speed.images")


def draw(seed: int) -> bytes:
    """A JPEG of 640 x 480 pixels with edges and noise, about as large as a photograph's."""
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).resize((640, 480), Image.Resampling.BICUBIC)
    noisy = np.asarray(smooth, np.int16) + rng.normal(0, 12, (480, 640, 1)).astype(np.int16)
    out = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def measure(encoder: EncoderSpec, jpegs: list[bytes], pairs: int) -> dict[str, Any]:
    """Images a second of both sides and of decoding, and the ratios of the pairs."""

    def replaced(jpeg: bytes) -> np.ndarray:
        whole = np.asarray(images.read_image(jpeg))
        pixels = images.fit([whole], encoder)
        mean, std = (np.asarray(values, np.float32) for values in (encoder.pixel_mean, encoder.pixel_std))
        return ((pixels * encoder.pixel_rescale).astype(np.float32) - mean) / std

    def current(jpeg: bytes) -> np.ndarray:
        return images.normalise(images.read_and_fit(jpeg, encoder), encoder)[None]

    def decode(jpeg: bytes) -> None:
        Image.open(io.BytesIO(jpeg)).load()

    def resize(picture: Image.Image) -> None:
        images.read_and_fit(picture, encoder)

    for jpeg in jpegs:
        np.testing.assert_array_equal(current(jpeg), replaced(jpeg))
    decoded = [Image.open(io.BytesIO(jpeg)).convert("RGB") for jpeg in jpegs]
    times = [
        (*(seconds(function, jpegs) for function in (replaced, current, decode)), seconds(resize, decoded))
        for _ in range(pairs)
    ]
    rates = [round(len(jpegs) / statistics.median(column)) for column in zip(*times, strict=True)]
    ratios = sorted(round(old / new, 2) for old, new, *_ in times)
    return {
        "encoder": encoder.name,
        **dict(zip(("replaced", "current", "decode", "resize"), rates, strict=True)),
        "ratio": ratios,
    }


def seconds(function: Callable[[Any], Any], of: Sequence[Any]) -> float:
    start = time.process_time()
    for one in of:
        function(one)
    return time.process_time() - start


def table(result: dict[str, Any]) -> str:
    head = ["encoder", "images a second", "before", "ratio (min / median / max)", "decoding alone", "resizing alone"]
    lines = [[*head, "ratio if these two were all"]]
    for row in result["rows"]:
        low, middle, high = row["ratio"][0], statistics.median(row["ratio"]), row["ratio"][-1]
        spread = f"{low:.2f} / **{middle:.2f}** / {high:.2f}"
        rates = (str(row[name]) for name in ("decode", "resize"))
        bound = 1 / row["replaced"] / (1 / row["decode"] + 1 / row["resize"])
        lines.append([row["encoder"], str(row["current"]), str(row["replaced"]), spread, *rates, f"{bound:.2f}"])
    text = f"{result['images']} files, {result['pairs']} pairs, one core, load average {result['load']}"
    return f"{markdown_table(lines)}\n\n{text}, {result['cpu']}."


if __name__ == "__main__":
    run_main(main)
