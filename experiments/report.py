"""From rows to a page: fits the law of each family, plans from it, draws the figures and writes report.html.

    python -m experiments.report --workdir workdirs/demo

Everything in the page is computed from WORKDIR/rows.jsonl.
"""

import argparse
import base64
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from rich.text import Text

from vlm_jax.cli import ArgumentParser, run_main
from vlm_jax.core.errors import UserError
from vlm_jax.core.files import write_text
from vlm_jax.core.rows import ResultRow
from vlm_jax.core.text import slug, to_html
from vlm_jax.evaluation import results
from vlm_jax.scaling import fit, frontier, lawfile, plots, scores
from vlm_jax.scaling import report as scaling_report
from vlm_jax.scaling.budgets import Budget
from vlm_jax.scaling.fitted import BASIC, LawFit
from vlm_jax.sizing.roofline import Request

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; margin: .6rem 0; }
td, th { padding: .15rem .6rem; text-align: right; white-space: nowrap; font-size: 15px; }
th { border-bottom: 1px solid #888; font-weight: 600; } td:first-child, th:first-child { text-align: left; }
img { max-width: 48%; } .note { color: #57606a; } code { background: #f2f4f6; padding: 0 .25rem; }
"""
_CONTRAST = {
    True: "error falls faster with parameters than with visual tokens: spend on the LLM",
    False: "error falls faster with visual tokens than with parameters: spend on tokens",
    None: "the interval covers 0: these rows do not say which pays more",
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
    sign = True if gap["low"] > 0 else False if gap["high"] < 0 else None
    return (
        f"alpha = {params['alpha']:.2f}, beta = {params['beta']:.2f}, "
        f"alpha - beta = {gap['value']:.2f} [{gap['low']:.2f}, {gap['high']:.2f}]: {_CONTRAST[sign]}"
    )


def plans(law: LawFit, rows: list[ResultRow], family: str) -> list[list[str]]:
    """Header and lines: the best of the study's own ladder at a few budgets of FLOPs a question, encoder included."""
    mine = [row for row in rows if row.family == family and row.visual_tokens]
    request = Request(mine[0].question_tokens, mine[0].answer_tokens + 1, dtype="float32")
    ladder = {"llms": tuple(sorted({row.llm for row in mine})), "tokens": tuple({row.visual_tokens for row in mine})}

    def within(budget: float, top: int = 1) -> list[frontier.Choice]:
        return frontier.plan(law, Budget("tflops", budget / 1e12), request, family=family, top=top, **ladder).choices

    everything = [choice.flops for choice in within(1e15, top=1000)]
    image = mine[0].encoder_flops
    lines = [[f"MFLOP a question ({image / 1e6:.0f} of them the encoder's)", "LLM", "V", "predicted error"]]
    least, most = min(everything), max(everything)
    for budget in least + np.geomspace((most - least) / 300, 1.001 * (most - least), 6):
        best = within(float(budget))[0]
        interval = f"{best.predicted_error:.3f} [{best.low:.3f}, {best.high:.3f}]"
        choice = [best.llm, str(best.visual_tokens), interval]
        if lines[-1][1:] != choice:  # the least budget that buys it
            lines.append([f"{budget / 1e6:.1f}", *choice])
    return lines


def html_table(lines: list[list[str]]) -> str:
    head, *body = lines
    cells = "".join(f"<th>{to_html(c)}</th>" for c in head)
    rest = "".join("<tr>" + "".join(f"<td>{to_html(c)}</td>" for c in line) + "</tr>" for line in body)
    return f"<table><tr>{cells}</tr>{rest}</table>"


def markdown_table(lines: list[list[str]]) -> str:
    head, *body = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *body))


def write_page(workdir: Path, rows: list[ResultRow], law: LawFit) -> Path:
    """report.html: one file, pictures inside."""
    parts = [f"<!doctype html><meta charset=utf-8><title>vlm_jax study</title><style>{_STYLE}</style>"]
    seeds, secs = sorted({row.seed for row in rows}), sum(row.train_secs for row in rows)
    parts.append(
        "<h1>How large a language model, how many visual tokens?</h1>"
        f"<p>{len(rows)} trained models, seeds {', '.join(map(str, seeds))}; {secs / 60:.0f} minutes of training on "
        f"{to_html(rows[0].device)}; encoder {to_html(rows[0].encoder)}, frozen. Error is the share of wrong "
        "answer tokens on held-out images, greedy decoding; ± one standard error over images; (n) is the number of "
        "seeds.</p>"
    )
    for family in law.families:
        fitted = law.family(family)
        claims = "; ".join(text for text in (fitted.verdict, fitted.extrapolation) if text)
        parts.append(f"<h2>{to_html(family)}</h2><p>{to_html(contrast(law, family))}.</p><p>{to_html(claims)}.</p>")
        parts.append(html_table(error_table(rows, family)))
        for kind in ("by_tokens", "by_params"):
            picture = base64.b64encode((workdir / "figures" / f"{slug(family)}_{kind}.png").read_bytes()).decode()
            parts.append(f'<img alt="{to_html(family)}: error {kind}" src="data:image/png;base64,{picture}">')
        chooses = "the law chooses" if fitted.predicts == "law" else "the measured cells offer"
        parts.append(f"<p>What {chooses} from this ladder at a budget of FLOPs a question:</p>")
        parts.append(html_table(plans(law, rows, family)))
        warnings = "".join(f"<li>{to_html(w.partition(': ')[2])}</li>" for w in fitted.warnings)
        parts.append(f'<p class="note">Warnings:</p><ul class="note">{warnings}</ul>')
    path = workdir / "report.html"
    write_text(path, "\n".join(parts) + "\n")
    return path


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
    law = fit.fit(scores.of_rows(rows), loss=loss, source="rows.jsonl")
    lawfile.write(workdir / "law.json", law)
    (workdir / "figures").mkdir(exist_ok=True)
    console = scaling_report.console()
    for family in law.families:
        plots.error_curves(rows, law, family, workdir / "figures" / f"{slug(family)}_by_tokens.png")
        plots.error_by_params(rows, law, family, workdir / "figures" / f"{slug(family)}_by_params.png")
        for title, lines in (("error", error_table(rows, family)), ("plan", plans(law, rows, family))):
            console.print(Text.assemble("\n", (family, "bold"), f": {title}"))
            widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
            for line in lines:
                console.print("  " + "   ".join(text.rjust(w) for text, w in zip(line, widths, strict=True)))
        console.print(contrast(law, family))
        console.print(law.family(family).verdict)
    console.print(
        f"\nlaw:     {workdir / 'law.json'}\nfigures: {workdir / 'figures'}\nreport:  {write_page(workdir, rows, law)}"
    )
    return rows, law


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
