"""Many clients of `vlm_jax.serve` at once: no request lost, no answer changed, and how much faster than one by one.

    python -m experiments.serving_load.load

Serves random weights of the smallest published shapes (SigLIP-B/16 at 224 pixels, average pooling to 49 tokens,
SmolLM2-135M). Sends distinct requests of mixed sizes one at a time, then requests drawn from them by many clients at
once, and compares every answer with that of the first pass. A pass of each kind before compiles the programs. Writes
load.json and the table of README.md. Exit code 2 where a request is lost or an answer differs by more than the choice
between two tokens whose scores are equal up to rounding (a tie; a batch sums in another order).
"""

import base64
import collections
import http.client
import io
import json
import os
import platform
import tempfile
import time
import urllib.parse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

import vlm_jax
from experiments.flags import real, whole
from experiments.lmms_eval.run import served
from experiments.readme import write_block
from experiments.report import markdown_table
from vlm_jax.checkpoints import tensor_files, tensor_tables
from vlm_jax.checkpoints.huggingface import exporting, processors
from vlm_jax.cli import ArgumentParser, run_main
from vlm_jax.compress import catalog
from vlm_jax.core import files
from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import ModelSpec
from vlm_jax.inference import api, sampling
from vlm_jax.inference.serving import requests
from vlm_jax.sizing import zoo

HERE = Path(__file__).parent
ENCODER, COMPRESSOR, TOKENS, LLM = "siglip-b16-224", "pool", 49, "smollm2-135m"
SPEC = catalog.model_spec(zoo.encoder(ENCODER), COMPRESSOR, TOKENS, zoo.decoder(LLM))
_TIE = 1e-5  # relative difference of scores


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="python -m experiments.serving_load.load", description=__doc__)
    parser.add_argument("--clients", type=whole(1), default=64)
    parser.add_argument("--requests", type=whole(1), default=500, help="of all clients")
    parser.add_argument("--distinct", type=whole(1), default=50, help="requests that the others are drawn from")
    parser.add_argument("--image-share", type=real(0, 1), default=0.25, help="of the requests")
    parser.add_argument("--max-batch", type=whole(1), default=32)
    parser.add_argument("--note", default="", help="about the machine, for the table")
    args = parser.parse_args(argv)
    rng = np.random.default_rng(0)
    distinct = [draw_request(rng, rng.random() < args.image_share) for _ in range(args.distinct)]
    order = rng.permutation(np.arange(args.requests) % args.distinct).tolist()
    with tempfile.TemporaryDirectory() as folder:
        encoder, llm = write_model(Path(folder), SPEC)
        flags = ["--llm", str(llm), "--compressor", COMPRESSOR, "--tokens", str(TOKENS)]
        flags += ["--max-batch", str(args.max_batch), "--queue", str(2 * args.clients)]
        with served(encoder, *flags) as url:
            print("compiling", flush=True)
            for clients in (1, args.clients):
                ask_all(url, [distinct[i] for i in order[: 2 * clients]], clients)
            alone, alone_secs = ask_all(url, distinct, 1)
            print(f"one at a time: {len(distinct) / alone_secs:.2f} requests/s", flush=True)
            together, together_secs = ask_all(url, [distinct[i] for i in order], args.clients)
        lost = sum(answer is None for answer in together)
        other = [(i, answer) for i, answer in zip(order, together, strict=True) if answer not in (None, alone[i])]
        tied = {pair: is_tie(encoder, llm, distinct[pair[0]], alone[pair[0]], pair[1]) for pair in set(other)}
        wrong = sum(not tied[pair] for pair in other)
    row = {
        "model": f"{ENCODER}, {COMPRESSOR} to {TOKENS}, {LLM}",
        "clients": args.clients,
        "requests": args.requests,
        "max_batch": args.max_batch,
        "image_share": args.image_share,
        "lost": lost,
        "wrong": wrong,
        "ties": len(other) - wrong,
        "alone_per_sec": round(len(distinct) / alone_secs, 3),
        "together_per_sec": round(args.requests / together_secs, 3),
        "cores": len(os.sched_getaffinity(0)),
        "cpu": platform.processor() or platform.machine(),
        "note": args.note,
    }
    row["speedup"] = round(row["together_per_sec"] / row["alone_per_sec"], 2)
    print(json.dumps(row, indent=1))
    files.write_json(HERE / "load.json", row)
    write_block(HERE / "README.md", "table", table(row), "experiments.serving_load.load")
    if lost or wrong:
        raise UserError(f"{HERE / 'load.json'}: expected all answers as one at a time, got {lost} lost, {wrong} wrong")


def draw_request(rng: np.random.Generator, has_image: bool) -> dict[str, Any]:
    """8 to 60 words, 16 to 64 new tokens; half of them greedy."""
    words = " ".join(f"w{i}" for i in rng.integers(10, 49_000, rng.integers(8, 61)))
    content: list[dict[str, Any]] = [{"type": "text", "text": words}]
    if has_image:
        side = rng.integers(64, 640, 2)
        out = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize(tuple(side.tolist())).save(out, "JPEG")
        url = f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    sampling = {} if rng.random() < 0.5 else {"temperature": 0.8, "top_p": 0.95, "seed": int(rng.integers(2**31))}
    return {"messages": [{"role": "user", "content": content}], "max_tokens": int(rng.integers(16, 65)), **sampling}


def ask_all(url: str, asked: list[dict[str, Any]], clients: int) -> tuple[list[str | None], float]:
    """The answers, None where there is none, and the seconds until the last."""
    started = time.monotonic()
    with ThreadPoolExecutor(clients) as threads:
        answers = list(threads.map(lambda request: post(url, request), asked))
    return answers, time.monotonic() - started


def post(url: str, request: dict[str, Any]) -> str | None:
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=600)
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(request))
        response = connection.getresponse()
        body = response.read()
        if response.status != 200:
            print(f"{response.status}: {body[:200]!r}", flush=True)
            return None
        return json.loads(body)["choices"][0]["message"]["content"]
    except (OSError, http.client.HTTPException) as error:
        print(f"{error!r}", flush=True)
        return None
    finally:
        connection.close()


def is_tie(encoder: Path, llm: Path, request: dict[str, Any], alone: str | None, together: str) -> bool:
    """Whether the first tokens that differ have the same score up to rounding."""
    first, second = ([int(word[1:]) for word in (text or "").split()] for text in (alone, together))
    count = next((n for n, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]), None)
    if count is None:
        return False
    model = vlm_jax.load(encoder, llm=llm, compressor=COMPRESSOR, tokens=TOKENS)
    parsed = requests.parse(json.dumps(request).encode(), "model")
    images = [parsed.images] if parsed.images else None
    rows = api.prompt_rows(model, images, [requests.prompt_of(parsed, has_template=False)])
    tokens = np.array([[*rows.tokens[0], *first[:count]]])
    logits = np.asarray(vlm_jax.forward(model, rows.images, tokens)[0, -1])
    if parsed.temperature:
        (key,) = sampling.row_keys(np.uint32([parsed.seed]), np.int32([0]))
        noise = jax.random.gumbel(jax.random.fold_in(key, count), logits.shape)
        logits = logits / parsed.temperature + np.asarray(noise)
    return bool(abs(logits[first[count]] - logits[second[count]]) <= _TIE * abs(logits).max())


def write_model(folder: Path, spec: ModelSpec, eos_ids: Sequence[int] = ()) -> tuple[Path, Path]:
    """Folders of the encoder and of the language model of `spec` with random weights. Each id of the tokenizer is a
    word, so that a text shows its tokens.
    """
    for part in ("encoder", "decoder"):
        (folder / part).mkdir()
        config, tables = exporting.layout(exporting.part_of(spec, part))
        expected = tensor_tables.expected(list(tables.values()))
        shapes = {name: (shape, np.dtype(np.float32)) for name, shape in expected.items()}
        rng = np.random.default_rng(0)
        arrays = ((name, draw_weights(rng, name, shape)) for name, (shape, _) in shapes.items())
        tensor_files.write_safetensors(folder / part, shapes, arrays, tensor_tables.MAX_SHARD_BYTES)
        ends = {"eos_token_id": list(eos_ids)} if eos_ids and part == "decoder" else {}
        (folder / part / "config.json").write_text(json.dumps({**config, **ends, "torch_dtype": "float32"}))
    processor = processors.processor_config(spec.encoder)
    (folder / "encoder" / "preprocessor_config.json").write_text(json.dumps(processor))
    words = collections.OrderedDict((f"w{i}", i) for i in range(spec.decoder.vocab))
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "decoder" / "tokenizer.json"))
    return folder / "encoder", folder / "decoder"


def draw_weights(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    noise = rng.standard_normal(shape, np.float32) * (0.02 if len(shape) > 1 else 0.1)
    return noise + 1 if "norm" in name and name.endswith("weight") else noise


def table(row: dict[str, Any]) -> str:
    columns = {
        "model": row["model"], "cores": row["cores"], "clients": row["clients"], "requests": row["requests"],
        "rows of a batch": f"up to {row['max_batch']}", "lost": row["lost"], "wrong": row["wrong"], "ties": row["ties"],
        "one at a time, requests/s": f"{row['alone_per_sec']:.2f}", "together": f"{row['together_per_sec']:.2f}",
        "ratio": f"**{row['speedup']:.2f}**", "note": row["note"],
    }  # fmt: skip
    return markdown_table([list(columns), list(map(str, columns.values()))])


if __name__ == "__main__":
    run_main(main)
