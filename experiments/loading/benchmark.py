"""Memory and time of loading a checkpoint, compared with transformers: `python -m experiments.loading.benchmark`.

Writes a random bfloat16 checkpoint of a published shape, loads it in processes of their own, removes it again, and
renews benchmark.json and the table of README.md. transformers is measured with the interpreter of
`--transformers-python`, by default this one if it has transformers; else it is "not measured".
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from experiments.flags import whole
from experiments.readme import write_block
from vlm_jax.cli import ArgumentParser, run_main
from vlm_jax.core.errors import UserError

HERE = Path(__file__).parent
WAYS = ("ours", "sharded", "copy", "transformers")
GIB = 2**30


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="python -m experiments.loading.benchmark", description=__doc__, allow_abbrev=False)
    parser.add_argument("--llm", default="qwen1.5-1.8b", help="whose shape; see vlm_jax/sizing/zoo.py")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is written for a while, if not in /tmp")
    parser.add_argument("--repeats", type=whole(1), default=3, help="loads of each kind, in turn; the median counts")
    parser.add_argument("--transformers-python", default=sys.executable, help="an interpreter with transformers")
    args = parser.parse_args(argv)
    has_peer = (
        subprocess.run([args.transformers_python, "-c", "import transformers"], capture_output=True).returncode == 0
    )
    ways = WAYS if has_peer else WAYS[:-1]
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        size, largest = write(Path(folder), args.llm)
        found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        for _ in range(args.repeats):
            for way in ways:
                python = args.transformers_python if way == "transformers" else sys.executable
                found[way].append(run(python, way, folder))
                print(way, json.dumps(found[way][-1]), flush=True)
    middle = {way: {key: statistics.median(one[key] for one in runs) for key in runs[0]} for way, runs in found.items()}
    cores = len(os.sched_getaffinity(0))
    result = {"llm": args.llm, "file_bytes": size, "largest_tensor_bytes": largest, "cores": cores, **middle}
    (HERE / "benchmark.json").write_text(json.dumps(result, indent=1) + "\n")
    text = table(result)
    write_block(HERE / "README.md", "table", text, "experiments.loading.benchmark")
    print(text)


def run(python: str, way: str, folder: str) -> dict[str, float]:
    """One load in a process of its own."""
    command = [python, str(HERE / "worker.py"), way, folder]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    if done.returncode:
        raise UserError(f"{way} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def write(folder: Path, llm: str) -> tuple[int, int]:
    """A folder of random bfloat16 weights, tensor by tensor -> (its bytes, those of its largest tensor)."""
    from vlm_jax.checkpoints import tensor_files, tensor_tables
    from vlm_jax.checkpoints.huggingface import hf_decoder
    from vlm_jax.sizing import zoo

    spec = zoo.decoder(llm)
    kind = np.dtype(ml_dtypes.bfloat16)
    shapes = {name: (s, kind) for name, s in tensor_tables.expected([hf_decoder.decoder_table(spec)]).items()}
    noise = (0.02 * np.random.default_rng(0).standard_normal(2**20)).astype(kind)

    def arrays() -> Iterator[tuple[str, np.ndarray]]:
        for name, (shape, _) in shapes.items():
            yield name, np.resize(noise, shape)

    tensor_files.write_safetensors(folder, shapes, arrays(), tensor_tables.MAX_SHARD_BYTES)
    (folder / "config.json").write_text(json.dumps({**hf_decoder.hf_config(spec), "torch_dtype": "bfloat16"}))
    sizes = [int(np.prod(shape)) * kind.itemsize for shape, _ in shapes.values()]
    return sum(sizes), max(sizes)


def table(result: dict) -> str:
    """The figures, as the claims put them."""
    size, largest = result["file_bytes"], result["largest_tensor_bytes"]
    names = {
        "ours": "vlm_jax, one device", "sharded": "vlm_jax, 8 devices (fsdp)", "transformers": "transformers",
        "copy": "the file's bytes copied to memory",
    }  # fmt: skip
    lines = [
        "| | seconds | CPU seconds | peak memory, GiB | peak / file | peak above what is held / largest tensor |",
        "|---|---|---|---|---|---|",
    ]
    for way, name in names.items():
        if way not in result:
            lines.append(f"| {name} | not measured | | | | |")
            continue
        one = result[way]
        own = one["peak_bytes"] - one["before_bytes"]
        lines.append(
            f"| {name} | {one['secs']:.1f} | {one['cpu_secs']:.1f} | {one['peak_bytes'] / GIB:.2f} "
            f"| {one['peak_bytes'] / size:.2f} | {(own - one['held_bytes']) / largest:.2f} |"
        )
    text = f"{result['llm']}, random bfloat16 weights: {size / GIB:.2f} GiB, largest tensor {largest / GIB:.2f} GiB"
    return f"{text}; {result['cores']} core(s); medians.\n\n" + "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
