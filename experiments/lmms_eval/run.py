"""lmms-eval against `vlm_jax.serve`: the same answers as `vlm_jax.generate`, and the same scores as `vlm_jax.score`.

    python -m vlm_jax.train --config configs/vlm.py:recipe=demo,family=facts --workdir workdirs/facts
    python -m experiments.lmms_eval.run --model workdirs/facts

Installs lmms-eval in an environment of its own (several GB, torch among them), writes a task over the run's test
images, serves the run, evaluates it with lmms-eval's model `openai`, and compares answer by answer. Writes results.json
and the table of README.md. Exit code 2 where an answer or a score differs, or a request failed.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import vlm_jax
from experiments.flags import whole
from experiments.lmms_eval import task
from experiments.readme import write_block
from experiments.report import markdown_table
from vlm_jax import build
from vlm_jax.checkpoints.orbax import read_spec
from vlm_jax.cli import ArgumentParser, run_main
from vlm_jax.config.resolve import spec_from_dict
from vlm_jax.core import files
from vlm_jax.core.errors import UserError
from vlm_jax.data.images import read_image
from vlm_jax.data.readers.open import open_source

HERE = Path(__file__).parent
LMMS_EVAL = "lmms-eval==0.7.3"
_PINS = ("filelock<4",)  # it patches a private module that filelock 4 does not have
_FAILED = "[LMMS_EVAL_REQUEST_FAILED"  # what lmms-eval scores as the answer of a request that failed


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="python -m experiments.lmms_eval.run", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="the workdir of a run")
    parser.add_argument("--examples", type=whole(1), default=512, help="test images, one question each")
    parser.add_argument("--concurrent", type=whole(1), default=32, help="requests at once")
    parser.add_argument("--venv", type=Path, default=Path("workdirs/lmms_eval_venv"), help="made if it is missing")
    parser.add_argument("--out", type=Path, default=Path("workdirs/lmms_eval"))
    args = parser.parse_args(argv)
    run = spec_from_dict(read_spec(args.model))
    python = install(args.venv)
    questions = task.read(open_source(run.data.test[0], build.default_cache()), args.examples)
    task.write(args.out / "task", questions, run.evaluation.max_new_tokens)
    with served(args.model) as url:
        started = time.monotonic()
        samples, reported = evaluate(python, url, args)
        secs = time.monotonic() - started
    row = compare(args.model, run, questions, samples, reported)
    row |= {"concurrent": args.concurrent, "lmms_eval_secs": round(secs, 1)}
    files.write_json(HERE / "results.json", row)
    write_table(row)
    print(json.dumps(row, indent=1))
    if row["same_answers"] != row["questions"] or row["same_scores"] != row["questions"] or row["failed"]:
        raise UserError(f"{HERE / 'results.json'}: expected the same answers and scores, got others")


def install(venv: Path) -> Path:
    """The Python of an environment with lmms-eval."""
    python = venv / "bin" / "python"
    if not python.exists():
        print(f"installing {LMMS_EVAL} into {venv}: minutes", flush=True)
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", LMMS_EVAL, *_PINS], check=True)
    return python


@contextlib.contextmanager
def served(model: Path, *flags: str) -> Iterator[str]:
    """Serves a model on a free port; yields the URL of its API."""
    command = [sys.executable, "-m", "vlm_jax.serve", "--model", str(model), "--port", "0", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        line = ""
        for line in server.stdout:
            print(line, end="", flush=True)
            if line.startswith("serving "):
                break
        else:
            raise UserError(f"{model}: the server did not start (exit code {server.wait()})")
        try:
            yield line.split()[-1]
        finally:
            server.send_signal(signal.SIGTERM)
            server.communicate(timeout=60)


def evaluate(python: Path, url: str, args: argparse.Namespace) -> tuple[list[dict[str, Any]], float]:
    """The samples and the score that lmms-eval writes."""
    out = args.out / time.strftime("%Y%m%d-%H%M%S")
    model = {"base_url": url, "api_key": "none", "model_version": args.model.resolve().name,
             "num_concurrent": args.concurrent, "max_retries": 1}  # fmt: skip
    command = [
        python, "-m", "lmms_eval", "--model", "openai", "--tasks", task.NAME, "--batch_size", "1", "--log_samples",
        "--model_args", ",".join(f"{name}={value}" for name, value in model.items()),
        "--include_path", args.out / "task", "--output_path", out,
    ]  # fmt: skip
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = {**inherited, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(args.out / "hf")}
    with open(args.out / "lmms_eval.log", "w") as log:
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    found = [next(out.rglob(pattern), None) for pattern in ("*_samples_*.jsonl", "*_results.json")]
    if None in found:  # its exit code is 0 even then
        raise UserError(f"{log.name}: lmms-eval wrote no results: see there")
    samples, results = found
    scores = json.loads(results.read_text())["results"][task.NAME]
    reported = next(value for name, value in scores.items() if name.startswith("exact_match,"))
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    return sorted(rows, key=lambda row: row["doc_id"]), reported


def compare(
    path: Path, run: Any, questions: list[task.DrawnQuestion], samples: list[dict[str, Any]], reported: float
) -> dict[str, Any]:
    """One row: how many answers and scores agree."""
    model = vlm_jax.load(path)
    ours: list[str] = []
    for start in range(0, len(questions), 64):
        some = questions[start : start + 64]
        images = [read_image(each.image) for each in some]
        ours += vlm_jax.generate(model, images, [each.question for each in some], run.evaluation.max_new_tokens)
    theirs = [answer_of(sample) for sample in samples]
    scores = [score(answer, each.answer) for answer, each in zip(theirs, questions, strict=True)]
    return {
        "model": f"{run.model.decoder.name}, {run.model.compressor.name}, V = {run.model.compressor.tokens}",
        "data": f"{run.data.dataset}/{run.data.config}",
        "lmms_eval": LMMS_EVAL,
        "questions": len(questions),
        "failed": sum(answer.startswith(_FAILED) for answer in theirs),
        "same_answers": sum(a == b for a, b in zip(ours, theirs, strict=True)),
        "same_scores": sum(a == sample["exact_match"] for a, sample in zip(scores, samples, strict=True)),
        "lmms_eval_score": reported,
        "our_score": sum(scores) / len(scores),
    }


def answer_of(sample: dict[str, Any]) -> str:
    """The answer in a line of lmms-eval's samples."""
    answer = sample["filtered_resps"]
    while isinstance(answer, list):
        (answer,) = answer
    return answer


def score(answer: str, reference: str) -> float:
    """lmms-eval's exact match, which it uses for GQA."""
    return vlm_jax.score("gqa", answer, [reference], flavour="lmms-eval")


def write_table(row: dict[str, Any]) -> None:
    columns = {
        "model": row["model"],
        "data": row["data"],
        "questions": row["questions"],
        "requests at once": row["concurrent"],
        "failed requests": row["failed"],
        "answers as `generate`": row["same_answers"],
        "scores as `vlm_jax.score`": row["same_scores"],
        "lmms-eval's exact match": f"{row['lmms_eval_score']:.4f}",
        "ours": f"{row['our_score']:.4f}",
    }
    table = markdown_table([list(columns), list(map(str, columns.values()))])
    write_block(HERE / "README.md", "table", table, "experiments.lmms_eval.run")


if __name__ == "__main__":
    run_main(main)
