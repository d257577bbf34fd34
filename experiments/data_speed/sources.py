"""Time and memory of opening and reading data sets of published size: `python -m experiments.data_speed.sources`.

Renews sources.json and the table of README.md.
"""

import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from experiments.flags import whole
from experiments.readme import write_block
from experiments.report import markdown_table
from vlm_jax.cli import ArgumentParser, run_main
from vlm_jax.core.specs import SourceSpec
from vlm_jax.data.readers.open import open_source

HERE = Path(__file__).parent
WORDS = ["the", "a", "of", "in", "on", "is", "what", "which", "person", "car", "street", "standing", "next", "naïve"]


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="python -m experiments.data_speed.sources", description=__doc__, allow_abbrev=False)
    parser.add_argument("--rows", type=whole(1), default=665_000, help="of the json; LLaVA's mix665k by default")
    parser.add_argument("--images", type=whole(1), default=4_000, help="rows of the parquet file")
    parser.add_argument("--reads", type=whole(1), default=5_000, help="items read of each, in random order")
    parser.add_argument("--folder", type=Path, help="where the files are written for a while, if not in /tmp")
    parser.add_argument("--measure", nargs=3, metavar=("KIND", "PATH", "FOLDER"), help="one process: prints JSON")
    args = parser.parse_args(argv)
    if args.measure:
        print(json.dumps(measure(*args.measure, args.reads)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        Image.new("RGB", (8, 8)).save(folder / "image.jpg")
        write_json(folder / "rows.json", args.rows)
        write_parquet(folder / "rows.parquet", args.images)
        result = {"cores": len(os.sched_getaffinity(0)), "load": round(os.getloadavg()[0], 1)}
        for kind in ("json", "parquet"):
            command = [sys.executable, "-m", "experiments.data_speed.sources", "--reads", str(args.reads)]
            command += ["--measure", kind, str(folder / f"rows.{kind}"), name]
            result[kind] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    (HERE / "sources.json").write_text(json.dumps(result, indent=1) + "\n")
    write_block(HERE / "README.md", "sources", table(result), "experiments.data_speed.sources")
    print(table(result))


def write_json(path: Path, rows: int) -> None:
    """Rows as LLaVA's: one to six questions, answers of lognormal length; 1.0 to 1.1 GB for 665,000."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, max(1, int(n)))) for n in rng.lognormal(3.4, 1.2, 2_000).clip(1, 400)]
    with open(path, "w", encoding="utf-8") as file:
        for row in range(rows):
            talk = []
            for turn in range(rng.integers(1, 7)):
                asked, answered = texts[(row * 7 + turn) % 2000], texts[(row * 11 + turn) % 2000]
                talk.append({"from": "human", "value": "<image>\n" * (turn == 0) + asked[:120]})
                talk.append({"from": "gpt", "value": answered})
            item = {"id": f"{row:012d}", "image": "image.jpg", "conversations": talk}
            file.write(("[" if row == 0 else ",\n") + json.dumps(item, ensure_ascii=row % 2 == 0))
        file.write("]")


def write_parquet(path: Path, rows: int) -> None:
    """Photographs of 640 x 480 (noise, so that no two compress alike) in row groups of a hundred."""
    rng, jpegs = np.random.default_rng(0), []
    for _ in range(50):
        file = io.BytesIO()
        noise = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).resize((640, 480))
        noise.save(file, "JPEG", quality=92)
        jpegs.append(file.getvalue())
    talk = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A photograph."}]
    columns = {"id": [str(row) for row in range(rows)], "conversations": [talk] * rows}
    columns["image"] = [
        {"bytes": jpegs[row % 50] + row.to_bytes(4, "big"), "path": f"{row}.jpg"} for row in range(rows)
    ]
    pq.write_table(pa.table(columns), path, row_group_size=100)


def measure(kind: str, path: str, images: str, reads: int) -> dict[str, float]:
    """Seconds to open, milliseconds an item (median and 99th percentile), peak GB."""
    spec = SourceSpec({"json": "llava"}.get(kind, kind), path=path, images=images)
    start = time.perf_counter()
    source = open_source(spec, Path(images) / "cache")
    out = {"rows": len(source), "file_gb": os.path.getsize(path) / 1e9, "open_secs": time.perf_counter() - start}
    order = np.random.default_rng(0).integers(0, len(source), reads).tolist()
    for name, read in (("item", source.__getitem__), ("text", source.without_images)):
        times = []
        for index in order:
            start = time.perf_counter()
            read(index)
            times.append(1e3 * (time.perf_counter() - start))
        out |= {f"{name}_p50_ms": float(np.median(times)), f"{name}_p99_ms": float(np.quantile(times, 0.99))}
    start = time.perf_counter()
    for index in range(min(reads, len(source))):
        source[index]
    out["in_order_mean_ms"] = 1e3 * (time.perf_counter() - start) / min(reads, len(source))
    return {**out, "peak_gb": peak_bytes() / 1e9}


def peak_bytes() -> int:
    """Of this process (Linux). Not `ru_maxrss`, which starts with the size of the process that started this one."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def table(result: dict) -> str:
    lines = [
        ["", "items", "file, GB", "opens in, s", "peak, GB", "item, ms (p50, p99)", "text alone", "in order, mean"]
    ]
    for kind, name in (("json", "LLaVA json"), ("parquet", "parquet with images")):
        one = result[kind]
        lines.append([
            name, f"{one['rows']:,}", f"{one['file_gb']:.2f}", f"{one['open_secs']:.1f}", f"{one['peak_gb']:.2f}",
            *(f"{one[f'{what}_p50_ms']:.2f}, {one[f'{what}_p99_ms']:.2f}" for what in ("item", "text")),
            f"{one['in_order_mean_ms']:.2f}",
        ])  # fmt: skip
    return f"{result['cores']} core(s), load average {result['load']}.\n\n{markdown_table(lines)}"


if __name__ == "__main__":
    run_main(main)
