"""Rewrites tables of the README, the planning page and the study: `python -m experiments.readme`.

Writes between pairs of marks in README.md, docs/planning.md and experiments/size_by_tokens/README.md, from the
committed rows and laws.
"""

import contextlib
import io
import shlex
from pathlib import Path

from experiments import report
from experiments.size_by_tokens import beside
from vlm_jax import plan
from vlm_jax.cli import run_main
from vlm_jax.core.errors import UserError
from vlm_jax.evaluation import results
from vlm_jax.scaling import lawfile

ROOT = Path(__file__).parents[1]
STUDY = ROOT / "experiments" / "size_by_tokens"
_PLAN = (
    "--law experiments/published_law/law.json --family reasoning --question-tokens 50 --answer-tokens 20 "
    "--latency-ms 400 --chip v6e --batch 32 --top 3"
)


def summary() -> str:
    """One line a family: the best and the smallest model, and which exponent is larger."""
    rows, law = results.read(STUDY / "rows.jsonl"), lawfile.read(STUDY / "law.json")
    lines = [["family", "error without the image", "smallest LLM, V = 1", "largest LLM, best V", "alpha - beta, 95 %"]]
    for name, family in law.families.items():
        mine = [row for row in rows if row.family == name and row.visual_tokens]
        smallest, largest = (of(row.llm_params for row in mine) for of in (min, max))
        cells = {(row.llm_params, row.visual_tokens) for row in mine}
        error = {
            cell: beside.mean([row for row in mine if (row.llm_params, row.visual_tokens) == cell]).error
            for cell in cells
        }
        best = min((cell for cell in error if cell[0] == largest), key=error.__getitem__)
        blind = [row.error for row in rows if row.family == name and not row.visual_tokens]
        gap = family.difference
        lines.append([
            name, f"{sum(blind) / len(blind):.2f}", f"{error[smallest, 1]:.2f}", f"{error[best]:.2f} (V = {best[1]})",
            f"{gap['value']:.2f} [{gap['low']:.2f}, {gap['high']:.2f}]",
        ])  # fmt: skip
    return report.markdown_table(lines)


def tables() -> str:
    """The contrast and the errors of every family of the study."""
    rows, law = results.read(STUDY / "rows.jsonl"), lawfile.read(STUDY / "law.json")
    parts = []
    for family in law.families:
        table = report.markdown_table(report.error_table(rows, family))
        parts += [f"**{family}**: {report.contrast(law, family)}.", table]
    return "\n\n".join(parts)


def doubts() -> str:
    """What the fit itself warns of."""
    law = lawfile.read(STUDY / "law.json")
    return "\n".join(f"* {name}: {warning}" for name, family in law.families.items() for warning in family.warnings)


def beside_the_cells() -> dict[str, str]:
    """Tables of the longer and the elastic runs, by the name of their block."""
    rows, longer, elastic = (results.read(STUDY / part / "rows.jsonl") for part in (".", "longer", "elastic"))
    pairs = {
        "convergence": (beside.convergence(rows, longer), beside.corner_contrast(rows, longer)),
        "elastic": (beside.elastic(rows, elastic), beside.elastic_cost(rows, elastic)),
    }
    return {name: "\n\n".join(map(report.markdown_table, pair)) for name, pair in pairs.items()}


def planned() -> str:
    """A command and the ranking that it prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        plan.main([flag.replace("experiments/", f"{ROOT}/experiments/") for flag in shlex.split(_PLAN)])
    ranking = printed.getvalue().split("GFLOPs a request")[0].rstrip()
    return f"    $ python -m vlm_jax.plan {_PLAN}\n" + "\n".join(
        f"    {line}".rstrip() for line in ranking.splitlines()
    )


def write_block(path: Path, name: str, text: str, command: str = "experiments.readme") -> None:
    """Replaces the text between the marks of that name. Raises `UserError` if they are missing."""
    start, end = f"<!-- {name}: written by python -m {command} -->", f"<!-- end of {name} -->"
    whole = path.read_text()
    if start not in whole or end not in whole:
        raise UserError(f"{path}: put the lines {start!r} and {end!r} where the {name} belongs")
    before, after = whole.split(start)[0], whole.split(end)[1]
    path.write_text(f"{before}{start}\n\n{text}\n\n{end}{after}")


def main(argv: list[str]) -> None:
    if argv:
        raise UserError("python -m experiments.readme takes no arguments")
    write_block(ROOT / "README.md", "table", summary())
    write_block(ROOT / "docs" / "planning.md", "plan", planned())
    write_block(STUDY / "README.md", "table", tables())
    write_block(STUDY / "README.md", "doubts", doubts())
    for name, text in beside_the_cells().items():
        write_block(STUDY / "README.md", name, text)


if __name__ == "__main__":
    run_main(main)
