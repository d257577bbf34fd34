"""The trained cells on easy-VQA as a benchmark of one's own, through the door of public ones; and the law of its rows.

    python -m experiments.easy_vqa.suite --workdir workdirs/easy_vqa --limit 2000

Writes the test questions to WORKDIR/data/own, evaluates every cell with `vlm_jax.evaluate --benchmarks own`, gathers
the rows into suite_rows.jsonl here, and fits them with `vlm_jax.fit_law --weights stderr`.
"""

import contextlib
import io
import json
import shutil
from pathlib import Path

from experiments.easy_vqa.scores import kind_of
from experiments.easy_vqa.source import EasyVqa
from experiments.flags import whole
from experiments.readme import write_block
from vlm_jax import evaluate, fit_law
from vlm_jax.cli import ArgumentParser, run_main
from vlm_jax.core.errors import UserError
from vlm_jax.core.files import write_text

HERE = Path(__file__).parent
COMMAND = "experiments.easy_vqa.suite"


def write_questions(folder: Path, limit: int) -> None:
    """The first test questions in the layout of `evaluation.benchmarks.own`."""
    source, lines = EasyVqa("test"), []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number in range(len(source)):
        example = source[number]
        name = f"images/{number}.png"
        shutil.copyfile(example.images[0], folder / name)
        turns = [turn.text for turn in example.turns if turn.role != "system"]
        for i, (question, answer) in enumerate(zip(turns[::2], turns[1::2], strict=True)):
            row = {"question_id": f"{number}-{i}", "image": name, "text": question.replace("<image>", "").strip()}
            lines.append(json.dumps({**row, "answer": answer, "group": kind_of(answer)}))
    write_text(folder / "questions.jsonl", "\n".join(lines[:limit]) + "\n")


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog=f"python -m {COMMAND}", description=__doc__, allow_abbrev=False)
    parser.add_argument("--workdir", type=Path, default=Path("workdirs/easy_vqa"))
    parser.add_argument("--limit", type=whole(1), default=2000, help="test questions")
    args = parser.parse_args(argv)
    cells = sorted(args.workdir.glob("cells/*"))
    if not cells:
        raise UserError(f"--workdir {args.workdir}: expected trained cells, got none (launch the grid there)")
    write_questions(args.workdir / "data" / "own", args.limit)
    rows = []
    for cell in cells:
        out = args.workdir / "suite" / cell.name
        evaluate.main([
            "--model", str(cell), "--benchmarks", "own", "--data", str(args.workdir / "data"), "--out", str(out),
            "--batch", "256", "--set", "new_tokens=2",
        ])  # fmt: skip
        rows.append((out / "rows.jsonl").read_text())
    (HERE / "suite_rows.jsonl").write_text("".join(rows))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        fit_law.main(["--rows", str(HERE / "suite_rows.jsonl"), "--family", "own", "--weights", "stderr", "--out",
                      str(args.workdir / "suite_law.json")])  # fmt: skip
    lines = [line.rstrip() for line in printed.getvalue().splitlines() if not line.startswith("wrote ")]
    command = "$ python -m vlm_jax.fit_law --rows suite_rows.jsonl --family own --weights stderr --out law.json"
    write_block(HERE / "README.md", "suite", "\n".join(f"    {line}".rstrip() for line in [command, *lines]), COMMAND)


if __name__ == "__main__":
    run_main(main)
