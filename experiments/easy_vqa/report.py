"""Accuracy on easy-VQA by kind of question, beside what the questions alone give; the law and a plan.

python -m experiments.launch --grid experiments/easy_vqa/grid.py --workdir workdirs/easy_vqa
python -m experiments.easy_vqa.report --workdir workdirs/easy_vqa       # writes rows.jsonl, table.json, README.md
"""

import argparse
import contextlib
import io
import json
import shutil
import tempfile
from pathlib import Path

from experiments.easy_vqa import scores
from experiments.easy_vqa.source import EasyVqa
from experiments.readme import write_block
from vlm_jax import fit_law, plan
from vlm_jax.cli import ArgumentParser, run_main
from vlm_jax.evaluation import results

HERE = Path(__file__).parent
COMMAND = "experiments.easy_vqa.report"
_PLAN = "--family easy-vqa --question-tokens 8 --answer-tokens 1 --tflops 1.2e-4 --top 5"


def law_and_plan(rows: Path, law: Path) -> str:
    """What `fit_law` and `plan` print for these rows."""
    runs = (
        ("fit_law --rows rows.jsonl --out law.json", fit_law.main, ["--rows", str(rows), "--out", str(law)]),
        (f"plan --law law.json {_PLAN}", plan.main, ["--law", str(law), *_PLAN.split()]),
    )
    parts = []
    for command, main, argv in runs:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            main(argv)
        lines = [line.rstrip() for line in printed.getvalue().splitlines() if not line.startswith("wrote ")]
        parts.append("\n".join(f"    {line}".rstrip() for line in [f"$ python -m vlm_jax.{command}", *lines]))
    return "\n\n".join(parts)


def main(argv: list[str]) -> None:
    parser = ArgumentParser(
        prog=f"python -m {COMMAND}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, default=Path("workdirs/easy_vqa"))
    args = parser.parse_args(argv)
    rows = sorted(results.read(args.workdir / "rows.jsonl"), key=lambda row: (row.llm_params, row.visual_tokens))
    found = scores.baselines(scores.questions(EasyVqa("test")))
    for row in rows:
        name = f"{row.llm}, {'no image' if row.visual_tokens == 0 else f'V = {row.visual_tokens}'}"
        _, found[name] = scores.trained(args.workdir / "cells" / row.cell)
    (HERE / "table.json").write_text(json.dumps(found, indent=1) + "\n")
    shutil.copy(args.workdir / "rows.jsonl", HERE / "rows.jsonl")
    steps, questions = max(row.train_steps for row in rows), rows[0].questions
    text = f"After {steps:,} steps, on all {questions:,} test questions:\n\n{scores.table(found)}"
    write_block(HERE / "README.md", "table", text, COMMAND)
    with tempfile.TemporaryDirectory() as folder:
        write_block(HERE / "README.md", "law", law_and_plan(HERE / "rows.jsonl", Path(folder, "law.json")), COMMAND)
    print(text)


if __name__ == "__main__":
    run_main(main)
