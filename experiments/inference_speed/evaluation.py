"""Evaluation beside `generate` on the same questions: `python -m experiments.inference_speed.evaluation`.

Two pairs, each measured in turn in one process, without compilation:

    suite       `vlm_jax.evaluate --suite` on GQA (answers and scores written) / `generate` at its best batch size
    training    greedy and teacher-forced errors, as evaluation in training has them / greedy decoding alone, where both
                decode at most as many tokens of a row as its true answer has

Random weights of SigLIP-B/16 and SmolLM2-135M with fewer layers and an output embedding of its own, JPEGs of 640 x 480
pixels, questions of 6 to 39 words; every sixth token ends an answer, so that their lengths differ. Prints JSON, and
updates evaluation.json and the table of README.md. A ratio is the time of the evaluation over that of `generate`.
"""

import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

import vlm_jax
from experiments.flags import whole
from experiments.inference_speed.measuring import cpu_name
from experiments.readme import write_block
from experiments.report import markdown_table
from experiments.serving_load.load import write_model
from vlm_jax.cli import ArgumentParser, run_main
from vlm_jax.compress import catalog
from vlm_jax.core import files
from vlm_jax.data.pipeline import Questions
from vlm_jax.data.rows import bucket
from vlm_jax.evaluation import harness, suite_run, suites
from vlm_jax.evaluation.benchmarks.items import Item
from vlm_jax.inference import answering, api, decoding
from vlm_jax.inference import prompts as host
from vlm_jax.inference.loading import Model
from vlm_jax.models.vlm import Vlm
from vlm_jax.sizing import zoo

HERE = Path(__file__).parent
TOKENS, ANSWER = 49, 8  # visual tokens; tokens of a true answer
Seconds = tuple[float, float]  # by the clock, of the processor


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="python -m experiments.inference_speed.evaluation", description=__doc__)
    parser.add_argument("--questions", type=whole(1), default=64)
    parser.add_argument("--layers", type=whole(1), nargs=2, default=[2, 4], metavar=("ENCODER", "LLM"))
    parser.add_argument("--new-tokens", type=whole(1), default=16)
    parser.add_argument("--batch", type=whole(1), default=16, help="questions a batch of the evaluation")
    parser.add_argument("--batches", type=whole(1), nargs="+", default=[8, 16], help="batch sizes of `generate`")
    parser.add_argument("--pairs", type=whole(1), default=4)
    args = parser.parse_args(argv)
    encoder, llm = zoo.encoder("siglip-b16-224"), dataclasses.replace(zoo.decoder("smollm2-135m"), tied_head=False)
    depths = dict(zip(("encoder", "llm"), args.layers, strict=True))
    spec = catalog.model_spec(
        dataclasses.replace(encoder, depth=depths["encoder"]), "pool", TOKENS,
        dataclasses.replace(llm, depth=depths["llm"]),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = write_model(folder, spec, range(0, spec.decoder.vocab, 6))
        write_gqa(folder / "data", args.questions)
        model = vlm_jax.load(paths[0], llm=paths[1], compressor="pool", tokens=TOKENS)
        result = {
            "model": f"{encoder.name} ({args.layers[0]} layers), {TOKENS} tokens, {llm.name} ({args.layers[1]} layers)",
            **{key: getattr(args, key) for key in ("questions", "new_tokens", "batch", "batches", "pairs")},
            "suite": measure_suite(model, folder, args.new_tokens, args.batch, args.batches, args.pairs),
            "training": measure_training(model, folder, args.new_tokens, args.batch, args.pairs),
            "cores": len(os.sched_getaffinity(0)), "load": round(os.getloadavg()[0], 1), "cpu": cpu_name(),
        }  # fmt: skip
    print(json.dumps(result, indent=1))
    files.write_json(HERE / "evaluation.json", result)
    write_block(HERE / "README.md", "evaluation", table(result), "experiments.inference_speed.evaluation")


def write_gqa(root: Path, questions: int) -> None:
    """Drawn images and questions in GQA's layout."""
    rng, folder = np.random.default_rng(0), root / "gqa/data"
    (folder / "images").mkdir(parents=True)
    truth = {}
    for n in range(questions):
        levels = rng.integers(0, 256, (24, 32, 3), np.uint8)
        Image.fromarray(levels).resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"images/n{n}.jpg")
        words = " ".join(f"w{i}" for i in rng.integers(10, 49_000, rng.integers(6, 40)))
        truth[str(n)] = {"question": words, "answer": "yes", "imageId": f"n{n}", "types": {}}
    (folder / "testdev_balanced_questions.json").write_text(json.dumps(truth))


def measure_suite(
    model: Model, folder: Path, new_tokens: int, batch: int, batches: Sequence[int], pairs: int
) -> dict[str, Any]:
    """Seconds and ratios of an evaluation and of `generate` at the best of `batches`."""
    suite = suites.find(None, ["gqa"], [f"new_tokens={new_tokens}"])
    loaded = suite_run.load(suite, folder / "data", 0)
    items = loaded["gqa"].items

    def evaluate() -> list[str]:
        with tempfile.TemporaryDirectory(dir=folder) as out:
            file = suite_run.answer_file(Path(out), "answers", "gqa")
            answering.answer(model, "gqa", items, file, new_tokens, suite.options.system, batch)
            suite_run.finish(suite, loaded, folder / "data", Path(out), 0)
            found = file.matched(items)
        return [found[item.id].text for item in items]

    def generate(size: int) -> list[str]:
        return [text for start in range(0, len(items), size) for text in _texts(items[start : start + size])]

    def _texts(some: Sequence[Item]) -> list[str]:
        images = [[str(image) for image in item.images] for item in some]
        return vlm_jax.generate(model, images, [item.prompt for item in some], new_tokens)

    answers = evaluate()
    same = np.mean([a == b.strip() for a, b in zip(answers, generate(batches[0]), strict=True)])
    for size in batches:  # compiles
        generate(size)
    best = min(batches, key=lambda size: timed(lambda: generate(size))[0])
    lengths = [len(text.split()) for text in answers]
    found = measure(evaluate, lambda: generate(best), pairs)
    return {"best_batch": best, "same_answers": float(same), "answer_words": statistics.mean(lengths), **found}


def measure_training(model: Model, folder: Path, new_tokens: int, batch: int, pairs: int) -> dict[str, Any]:
    """Seconds and ratios of the program of evaluation in training, and of greedy decoding of the same inputs. Both
    decode at most as many tokens of a row as its true answer has."""
    items = suite_run.load(suites.find(None, ["gqa"], []), folder / "data", 0)["gqa"].items[:batch]
    rows = api.prompt_rows(model, [[str(image) for image in item.images] for item in items], [i.prompt for i in items])
    inputs = host.to_bucket(api.inputs_of_rows(model, rows), model)
    rng = np.random.default_rng(0)
    answer = rng.integers(0, model.spec.decoder.vocab, (len(items), ANSWER)).astype(np.int32)
    answer[np.arange(ANSWER) >= rng.integers(2, ANSWER + 1, (len(items), 1))] = -1
    questions = Questions(inputs, answer, np.arange(len(items), dtype=np.int32))
    vlm, end = Vlm(model.spec, model.compute), model.eos_ids[0]
    program = model.plan.jit(harness.make_evaluate(vlm, new_tokens, end))
    one_end = model._replace(eos_ids=(end,))
    counted = np.sum((answer >= 0) & (answer != end), axis=1, dtype=np.int32)
    params = decoding.sampling_params(len(items), new_tokens, 0.0, 1.0, 0)._replace(limit=counted)

    def evaluate() -> None:
        jax.device_get(program(model.params, model.plan.put(questions)))

    def generate() -> None:
        state, hidden = decoding.start(one_end, inputs, params, bucket(new_tokens))
        state = decoding.advance(one_end, state, params, new_tokens)
        jax.device_get((state.out, hidden))

    evaluate(), generate()
    return measure(evaluate, generate, pairs)


def measure(evaluate: Callable[[], Any], generate: Callable[[], Any], pairs: int) -> dict[str, Any]:
    """Median seconds of both sides, and the ratios of the pairs in ascending order."""
    times: list[tuple[Seconds, Seconds]] = []
    for number in range(pairs):  # each side goes first in turn
        sides = (evaluate, generate) if number % 2 else (generate, evaluate)
        first, second = timed(sides[0]), timed(sides[1])
        times.append((first, second) if number % 2 else (second, first))
    out: dict[str, Any] = {}
    for at, clock in enumerate(("wall", "cpu")):
        out[f"{clock}_secs"], out[f"generate_{clock}_secs"] = (
            round(statistics.median(pair[side][at] for pair in times), 3) for side in (0, 1)
        )
        out[f"{clock}_ratio"] = sorted(round(mine[at] / other[at], 3) for mine, other in times)
    return out


def timed(function: Callable[[], Any]) -> Seconds:
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


def table(result: dict[str, Any]) -> str:
    lines = [["evaluation", "seconds", "`generate`", "ratio", "ratio of processor time"]]
    for key, name in (("suite", "a benchmark"), ("training", "in training, a batch")):
        one = result[key]
        ratios = (one[f"{clock}_ratio"] for clock in ("wall", "cpu"))
        spreads = [f"{r[0]:.2f} / **{statistics.median(r):.2f}** / {r[-1]:.2f}" for r in ratios]
        lines.append([name, f"{one['wall_secs']:.2f}", f"{one['generate_wall_secs']:.2f}", *spreads])
    text = (
        f"{result['model']}; {result['questions']} questions, at most {result['new_tokens']} new tokens, batches of "
        f"{result['batch']} (`generate`: {result['suite']['best_batch']}, the best of {result['batches']}), "
        f"{result['suite']['same_answers']:.0%} same answers; minimum / **median** / maximum of {result['pairs']} "
        f"pairs; {result['cores']} core(s), load average {result['load']}, {result['cpu']}."
    )
    return f"{markdown_table(lines)}\n\n{text}"


if __name__ == "__main__":
    run_main(main)
