"""Accuracy on easy-VQA by kind of question, beside what the questions alone give; the law and a plan.

python -m experiments.launch --grid experiments/easy_vqa/grid.py --workdir workdirs/easy_vqa
python -m experiments.easy_vqa.report --workdir workdirs/easy_vqa       # writes rows.jsonl, table.json, README.md
"""

import argparse
import json
import shutil
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from experiments.easy_vqa.source import KINDS, EasyVqa, kind_of
from vlm_jax.cli import ArgumentParser, run_main
from vlm_jax.evaluation import clusters, results

HERE = Path(__file__).parent
BEGIN, END = "<!-- written by experiments.easy_vqa.report -->", "<!-- end -->"


def pairs(split: str) -> list[tuple[int, str, str]]:
    """(image, question, answer) of a split, in order."""
    source, found = EasyVqa(split), []
    for image in range(len(source)):
        turns = source[image].turns
        found += [(image, q.text, a.text) for q, a in zip(turns[::2], turns[1::2], strict=True)]
    return found


def baseline() -> dict[str, list[float]]:
    """Accuracy by kind of the most common training answer, and of the most common one to the same question."""
    by_question: dict[str, Counter[str]] = defaultdict(Counter)
    overall: Counter[str] = Counter()
    for _, question, answer in pairs("train"):
        by_question[question][answer] += 1
        overall[answer] += 1
    common, test = overall.most_common(1)[0][0], pairs("test")
    guesses = {
        "most common answer": [common for _ in test],
        "question only": [by_question[q].most_common(1)[0][0] if by_question[q] else common for _, q, _ in test],
    }
    return {
        name: _by_kind([g == a for g, (_, _, a) in zip(guess, test, strict=True)]) for name, guess in guesses.items()
    }


def _by_kind(right: Any) -> dict[str, tuple[float, float]]:
    """{kind: (accuracy, standard error clustered by image)}, and of all questions."""
    test, right = pairs("test"), np.asarray(right, float)
    image, kind = np.array([i for i, _, _ in test]), np.array([kind_of(a) for _, _, a in test])
    chosen = {"all": np.ones(len(test), bool), **{name: kind == name for name in KINDS}}
    return {name: clusters.ratio(right[mask], np.ones(mask.sum()), image[mask]) for name, mask in chosen.items()}


def accuracy(workdir: Path) -> dict[str, tuple[float, float]]:
    """Accuracy by kind of a trained cell."""
    from vlm_jax import build, job
    from vlm_jax.checkpoints.orbax import read_spec
    from vlm_jax.config.resolve import spec_from_dict
    from vlm_jax.core.specs import total_steps

    spec, cache = spec_from_dict(read_spec(workdir)), build.default_cache()
    build.use_compilation_cache(cache)
    run = build.open_run(spec, cache)
    params = job.restore(run.network, workdir, least_step=total_steps(spec))
    questions = job.make_evaluator(run)(params)
    return _by_kind(_in_order(questions.scores.inexact == 0, questions.example))


def _in_order(right: np.ndarray, example: np.ndarray) -> np.ndarray:
    """Evaluation starts image i with its question i q mod K; back to the order of the file."""
    out, q = [], 32
    for image in range(example.max() + 1):
        mine = right[example == image]
        out.append(np.roll(mine, (image * q) % len(mine)))
    return np.concatenate(out)


def table(found: dict[str, dict[str, tuple[float, float]]]) -> list[str]:
    lines = ["| | " + " | ".join(("all", *KINDS)) + " |", "|---|" + "---:|" * (1 + len(KINDS))]
    for name, by_kind in found.items():
        cells = (f"{100 * v:.1f} ± {100 * e:.1f}" for v, e in (by_kind[kind] for kind in ("all", *KINDS)))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def main(argv: list[str]) -> None:
    parser = ArgumentParser(
        prog="python -m experiments.easy_vqa.report", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--workdir", type=Path, default=Path("workdirs/easy_vqa"))
    args = parser.parse_args(argv)
    rows = sorted(results.read(args.workdir / "rows.jsonl"), key=lambda row: (row.llm_params, row.visual_tokens))
    found = baseline()
    for row in rows:
        name = f"{row.llm}, {'no image' if row.visual_tokens == 0 else f'V = {row.visual_tokens}'}"
        found[name] = accuracy(args.workdir / "cells" / row.cell)
    (HERE / "table.json").write_text(json.dumps(found, indent=1) + "\n")
    shutil.copy(args.workdir / "rows.jsonl", HERE / "rows.jsonl")
    readme = HERE / "README.md"
    head, _, rest = readme.read_text().partition(BEGIN)
    readme.write_text("\n".join([head + BEGIN, "", *table(found), "", END + rest.partition(END)[2]]))
    print("\n".join(table(found)))


if __name__ == "__main__":
    run_main(main)
