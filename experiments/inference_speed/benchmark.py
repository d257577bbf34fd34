"""How fast a loaded language model reads a prompt and says the next tokens, beside transformers on the same weights.

    python -m experiments.inference_speed.benchmark --threads 1          # needs torch and transformers

Random float32 weights of public shapes are written once as a folder, and both sides load it. Every measurement of one
side is followed by one of the other, so that a machine that is busy with other work is busy for both; the ratio of each
pair counts, and its spread is told. Prefill is a whole call that says one token; decoding is what more tokens take
beyond that. Whether both say the same greedy tokens is checked. Writes benchmark.json and the table in README.md.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
START, END = "<!-- table -->", "<!-- end -->"
MODELS = ("smollm2-135m", "qwen2.5-0.5b")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.inference_speed.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--threads", type=int, default=1, help="cores that each side may use")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=3, help="measurements of each side")
    parser.add_argument("--out", type=Path, default=HERE / "benchmark.json")
    args = parser.parse_args(argv)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    rows: list[dict[str, Any]] = []
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            theirs, ours = both(name, Path(folder), args.threads)
            for batch in args.batches:
                rows.append({"model": name, "batch": batch, **measure(theirs, ours, batch, args)})
                print(json.dumps(rows[-1]), flush=True)
                write(rows, args)
    return 0


def write(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """What has been measured so far, and how."""
    import jax
    import torch
    import transformers

    result = {
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "threads": args.threads,
        "pairs": args.pairs,
        "cpu": cpu_name(),
        "versions": {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "rows": rows,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    if args.out == HERE / "benchmark.json":
        write_table(result)


def both(name: str, folder: Path, threads: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(transformers, ours), each `(tokens, new_tokens) -> the tokens said`."""
    import torch
    import transformers

    import vlm_jax

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = hugging_face_config(name)
    made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    made.save_pretrained(folder)
    del made
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = vlm_jax.load(folder)

    def theirs(tokens: Any, new_tokens: int) -> Any:
        with torch.inference_mode():
            ids = torch.from_numpy(tokens)
            out = reference.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
            )
        return out[:, ids.shape[1] :].numpy()

    return theirs, lambda tokens, new_tokens: vlm_jax.generate_tokens(model, None, tokens, new_tokens)


def hugging_face_config(name: str) -> Any:
    """transformers' configuration of a size in our zoo; no token ends an answer."""
    import transformers

    from vlm_jax.sizing import zoo

    spec = zoo.decoder(name)
    kind = transformers.Qwen2Config if spec.qkv_bias else transformers.LlamaConfig
    return kind(
        hidden_size=spec.width, intermediate_size=spec.mlp_width, num_hidden_layers=spec.depth,
        num_attention_heads=spec.heads, num_key_value_heads=spec.kv_heads, vocab_size=spec.vocab,
        tie_word_embeddings=spec.tied_head, rms_norm_eps=spec.norm_eps, max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope_theta}, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip


def measure(
    theirs: Callable[..., Any], ours: Callable[..., Any], batch: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Seconds of both sides, and the ratios of pairs that were measured one after the other."""
    import numpy as np

    tokens = np.random.default_rng(batch).integers(10, 40_000, (batch, args.prompt_tokens))
    agree = float(np.mean(theirs(tokens, args.new_tokens) == ours(tokens, args.new_tokens)))  # and compiles
    theirs(tokens, 1), ours(tokens, 1)
    times = {"theirs": ([], []), "ours": ([], [])}
    for _ in range(args.pairs):
        for side, run in (("theirs", theirs), ("ours", ours)):
            prefill, whole = (timed(run, tokens, count, args.threads) for count in (1, args.new_tokens))
            times[side][0].append(prefill)
            times[side][1].append((whole - prefill) / (args.new_tokens - 1))
    out: dict[str, Any] = {"same_tokens": round(agree, 4)}
    for at, phase in enumerate(("prefill", "token")):
        mine, other = (np.array(times[side][at]) for side in ("ours", "theirs"))
        out[f"{phase}_ms"] = round(float(np.median(mine)) * 1e3, 2)
        out[f"{phase}_ms_transformers"] = round(float(np.median(other)) * 1e3, 2)
        out[f"{phase}_ratio"] = [round(float(value), 2) for value in sorted(other / mine)]
    return out


def timed(run: Callable[..., Any], tokens: Any, new_tokens: int, threads: int) -> float:
    """Seconds; on one core those of the processor, so that other work on the machine counts less."""
    clock = time.process_time if threads == 1 else time.perf_counter
    start = clock()
    run(tokens, new_tokens)
    return clock() - start


def cpu_name() -> str:
    """As the kernel tells it."""
    lines = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return lines[0].partition(":")[2].strip() if lines else platform.processor()


def write_table(result: dict[str, Any]) -> None:
    """Puts the rows into README.md, between its marks."""
    versions, size = result["versions"], f"{result['prompt_tokens']} tokens, {result['new_tokens']} new ones"
    head = (
        f"Prompt of {size}, float32, {result['threads']} core(s) of {result['cpu']}; jax {versions['jax']}, torch "
        f"{versions['torch']}, transformers {versions['transformers']}. Times are medians of {result['pairs']}; ratios "
        "are theirs over ours: lowest, median, highest.\n\n"
        "| model | batch | prefill, ms | transformers | ratio | each token, ms | transformers | ratio | on a GPU |\n"
        "|---|---|---|---|---|---|---|---|---|\n"
    )
    lines = []
    for row in result["rows"]:
        cells = [row["model"], str(row["batch"])]
        for phase in ("prefill", "token"):
            low, *_, high = ratios = row[f"{phase}_ratio"]
            middle = ratios[len(ratios) // 2]
            cells += [str(row[f"{phase}_ms"]), str(row[f"{phase}_ms_transformers"]), f"{low} / **{middle}** / {high}"]
        lines.append(f"| {' | '.join(cells)} | not measured |\n")
    path = HERE / "README.md"
    before, _, rest = path.read_text().partition(START)
    path.write_text(f"{before}{START}\n{head}{''.join(lines)}{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    import sys

    from vlm_jax.core.errors import door

    sys.exit(door(main)())
