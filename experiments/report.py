"""From rows to a page: fits the law of each family, plans from it, draws the figures and writes report.html.

    python -m experiments.report --workdir workdirs/demo

Everything in the page is computed from WORKDIR/rows.jsonl.
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.text import Text

from experiments import report_page
from experiments.report_page import Section
from vlm_jax.cli import ArgumentParser, run_main
from vlm_jax.core.errors import UserError
from vlm_jax.core.files import write_text
from vlm_jax.core.rows import ResultRow
from vlm_jax.core.text import slug
from vlm_jax.evaluation import results
from vlm_jax.scaling import fit, frontier, lawfile, plots, scores
from vlm_jax.scaling import report as scaling_report
from vlm_jax.scaling.budgets import Budget
from vlm_jax.scaling.fitted import BASIC, LawFit
from vlm_jax.sizing.roofline import Request

_CONTRAST = {
    True: "error falls faster with parameters than with visual tokens: spend on the LLM",
    False: "error falls faster with visual tokens than with parameters: spend on tokens",
    None: "the interval covers 0: these rows do not say which pays more",
}
_ANSWERS = {
    True: "Spend on the LLM: error falls faster with parameters than with visual tokens.",
    False: "Spend on visual tokens: error falls faster with them than with parameters.",
    None: "These rows do not say whether parameters or visual tokens pay more.",
}


def error_table(rows: Iterable[ResultRow], family: str) -> list[list[str]]:
    """Header and lines: N down, V across; mean error over seeds, and ± the standard error of one cell."""
    rows = [row for row in rows if row.family == family]
    tokens = sorted({row.visual_tokens for row in rows})
    lines = [["N", *("blind" if v == 0 else f"V = {v}" for v in tokens)]]
    for params in sorted({row.llm_params for row in rows}):
        line = [plots.params_label(params / 1e9)]
        for v in tokens:
            cell = [row for row in rows if (row.llm_params, row.visual_tokens) == (params, v)]
            if not cell:
                line.append("")
                continue
            error = float(np.mean([row.error for row in cell]))
            stderr = float(np.sqrt(np.mean([row.stderr**2 for row in cell])))
            line.append(f"{error:.3f} ± {stderr:.3f}" + (f" ({len(cell)})" if len(cell) > 1 else ""))
        lines.append(line)
    return lines


def contrast(law: LawFit, family: str) -> str:
    """The sentence that the study is about."""
    gap, params = law.family(family).difference, law.family(family).forms[BASIC].params
    return (
        f"alpha = {params['alpha']:.2f}, beta = {params['beta']:.2f}, "
        f"alpha - beta = {gap['value']:.2f} [{gap['low']:.2f}, {gap['high']:.2f}]: {_CONTRAST[_sign(law, family)]}"
    )


def _sign(law: LawFit, family: str) -> bool | None:
    """Whether alpha - beta is above 0; None if its interval covers 0."""
    gap = law.family(family).difference
    return True if gap["low"] > 0 else False if gap["high"] < 0 else None


class Planned(NamedTuple):
    """The best of the study's own ladder at a budget of FLOPs a question, the least that buys it."""

    flops: float
    choice: frontier.Choice


def plans(law: LawFit, rows: list[ResultRow], family: str) -> list[Planned]:
    """The best of the study's own ladder at a few budgets, encoder included; ascending."""
    mine = [row for row in rows if row.family == family and row.visual_tokens]
    request = Request(mine[0].question_tokens, mine[0].answer_tokens + 1, dtype="float32")
    ladder = {"llms": tuple(sorted({row.llm for row in mine})), "tokens": tuple({row.visual_tokens for row in mine})}

    def within(budget: float, top: int = 1) -> list[frontier.Choice]:
        return frontier.plan(law, Budget("tflops", budget / 1e12), request, family=family, top=top, **ladder).choices

    everything = [choice.flops for choice in within(1e15, top=1000)]
    least, most = min(everything), max(everything)
    found: list[Planned] = []
    for budget in least + np.geomspace((most - least) / 300, 1.001 * (most - least), 6):
        one = Planned(float(budget), within(float(budget))[0])
        if not found or one.choice.model != found[-1].choice.model:
            found.append(one)
    return found


def plan_table(law: LawFit, found: list[Planned], family: str) -> list[list[str]]:
    """Header and lines."""
    unit, name = plots.flops_unit(found[-1].flops)
    kind = "predicted" if law.family(family).predicts == "law" else "measured"
    lines = [[f"{name} a question", "LLM", "V", f"{kind} error", "95 %"]]
    for flops, best in found:
        cells = [best.llm, str(best.visual_tokens), f"{best.predicted_error:.3f}", f"{best.low:.3f} to {best.high:.3f}"]
        lines.append([f"{flops / unit:.1f}", *cells])
    return lines


def plan_caption(law: LawFit, rows: list[ResultRow], found: list[Planned], family: str) -> str:
    unit, name = plots.flops_unit(found[-1].flops)
    encoder = next(row.encoder_flops for row in rows if row.family == family and row.visual_tokens) / unit
    chooses = "The law's choice" if law.family(family).predicts == "law" else "The best measured cell"
    return f"{chooses} from these models at a few budgets; the encoder takes {encoder:.0f} {name} of each"


def answer(law: LawFit, family: str) -> str:
    """What to spend on, as a sentence."""
    sign = _sign(law, family)
    if sign is None or law.family(family).fits:
        return _ANSWERS[sign]
    return f"{_ANSWERS[sign][:-1]}, as far as a law that misses these rows can say."


def example(law: LawFit, rows: list[ResultRow], found: list[Planned], family: str) -> str:
    """The best model at a middle budget, as a sentence."""
    fitted, (flops, best) = law.family(family), found[(len(found) - 1) // 2]
    unit, name = plots.flops_unit(flops)
    kind = "predicted" if fitted.predicts == "law" else "measured"
    text = (
        f"Within {flops / unit:.0f} {name} a question, {best.llm} with V = {best.visual_tokens} has the least error, "
        f"{best.predicted_error:.3f} ({kind})"
    )
    blind = [row.error for row in rows if row.family == family and not row.visual_tokens]
    return text + (f"; without the image it is {np.mean(blind):.3f}." if blind else ".")


def markdown_table(lines: list[list[str]]) -> str:
    head, *body = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *body))


def _asked(rows: list[ResultRow]) -> list[str]:
    """What was trained and measured, as sentences."""
    seeds, secs = sorted({row.seed for row in rows}), sum(row.train_secs for row in rows)
    sizes = [plots.params_label(n / 1e9) for n in sorted({row.llm_params for row in rows})]
    tokens = sorted({row.visual_tokens for row in rows if row.visual_tokens})
    time = f" in {secs / 60:.0f} minutes of training on {rows[0].device}" if secs else ""
    return [
        "For a given cost of inference, is it better to have a larger language model or more visual tokens?",
        f"{len(rows)} models{time}: language models of N = {', '.join(sizes)} parameters, V = "
        f"{', '.join(map(str, tokens))} visual tokens{' or none' if any(not r.visual_tokens for r in rows) else ''}, "
        f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}, behind the encoder {rows[0].encoder}. "
        "Error is the share of wrong answer tokens on held-out images under greedy decoding, or 1 - score of a "
        "benchmark.",
    ]


def _commands(
    workdir: Path, rows: list[ResultRow], found: list[Planned], family: str
) -> list[tuple[str, Sequence[str]]]:
    """What each is for, and its arguments."""
    row = next(row for row in rows if row.family == family and row.visual_tokens)
    request = ["--question-tokens", f"{row.question_tokens:.3g}", "--answer-tokens", f"{row.answer_tokens + 1:.3g}"]
    request += ["--tflops", f"{found[(len(found) - 1) // 2].flops / 1e12:.3g}"]
    law, page = ["--law", str(workdir / "law.json"), "--family", family], str(workdir / f"plan-{slug(family)}.html")
    out = [("Ask for another budget, on an interactive page:", ["vlm_jax.plan", *law, *request, "--html", page])]
    if all(row.stderr > 0 for row in rows):
        weighted = ["--out", str(workdir / "law-by-stderr.json"), "--weights", "stderr"]
        fit_again = ["vlm_jax.fit_law", "--rows", str(workdir / "rows.jsonl"), *weighted]
        out.append(("See all forms of the law, with rows weighted by their standard errors:", fit_again))
    return out


def sections(workdir: Path, rows: list[ResultRow], law: LawFit) -> list[Section]:
    """What the page and the terminal show of every family. The figures must be drawn."""
    out = []
    for family, fitted in law.families.items():
        found = plans(law, rows, family)
        sentences = [text for text in (fitted.verdict, fitted.extrapolation) if text]
        seeds = {row.seed for row in rows if row.family == family}
        if len(seeds) == 1:
            sentences.append("every model was trained with one seed; how much another one would differ is not known")
        sentences += [
            text.partition(": ")[2]
            for text in fitted.warnings
            if not text.startswith(("lack_of_fit", "does_not_extrapolate"))
        ]
        out.append(Section(
            family, answer(law, family), example(law, rows, found, family),
            contrast(law, family).partition(": ")[0],
            [workdir / "figures" / f"{slug(family)}_{kind}.png" for kind in ("by_tokens", "by_params")],
            plan_table(law, found, family), plan_caption(law, rows, found, family), error_table(rows, family),
            fitted.fits, sentences, _commands(workdir, rows, found, family),
        ))  # fmt: skip
    return out


def report(workdir: Path, loss: str = "squared") -> None:
    """law.json, figures and report.html from the rows of a workdir; prints the tables."""
    rows = results.read(workdir / "rows.jsonl")
    for field, found in (
        ("encoder_sha256", {row.encoder_sha256 for row in rows}),
        ("compressor", {row.compressor for row in rows if row.visual_tokens}),
    ):
        if len(found) > 1:
            raise UserError(
                f"{workdir / 'rows.jsonl'}: rows of {len(found)} values of {field} in one table; split the file"
            )
    table = scores.of_rows(rows)
    with scaling_report.progress(fit.stages(table) + 2 * len(table.families()) + 1) as progress:
        law = fit.fit(table, loss=loss, source="rows.jsonl", progress=progress)
        lawfile.write(workdir / "law.json", law)
        (workdir / "figures").mkdir(exist_ok=True)
        for family in law.families:
            for across in ("tokens", "params"):
                progress(f"figure, {family}")
                path = workdir / "figures" / f"{slug(family)}_by_{across}.png"
                plots.error_curves(rows, law, family, path, across)
        progress("report.html")
        shown = sections(workdir, rows, law)
        page = report_page.page("How large a language model, how many visual tokens?", _asked(rows), shown)
        write_text(workdir / "report.html", page)
    console = scaling_report.console()
    for one in shown:
        for title, lines in (("error", one.errors), ("plan", one.plan)):
            console.print(Text.assemble("\n", (one.family, "bold"), f": {title}"))
            widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
            for line in lines:
                console.print("  " + "   ".join(text.rjust(w) for text, w in zip(line, widths, strict=True)))
        console.print(Text(f"{one.answer} {one.example}", "bold"))
        console.print(contrast(law, one.family))
        console.print(law.family(one.family).verdict)
    for name, path in (("law", "law.json"), ("figures", "figures"), ("report", "report.html")):
        console.print(f"{name + ':':8} {workdir / path}", soft_wrap=True)


def main(argv: list[str]) -> None:
    parser = ArgumentParser(
        prog="python -m experiments.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, type=Path, help="a folder with rows.jsonl")
    parser.add_argument(
        "--loss", default="squared", help="how the law is fitted: log (relative errors) or squared (the paper's)"
    )
    args = parser.parse_args(argv)
    report(args.workdir, args.loss)


if __name__ == "__main__":
    run_main(main)
