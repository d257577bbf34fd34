"""From rows to a page: fits the law of each family, plans from it, draws the figures and writes report.html.

    python -m experiments.report --workdir workdirs/demo
    python -m experiments.report --workdir experiments/size_by_tokens --readme     # also renews the README's table

Everything in the page is computed from WORKDIR/rows.jsonl.
"""

import argparse
import base64
import html
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from vlm_jax.core.errors import Flags, UserError, door
from vlm_jax.core.rows import ResultRow
from vlm_jax.scaling import fit, frontier, lawfile, plots, table
from vlm_jax.scaling import report as scaling_report
from vlm_jax.scaling.fit import LawFit
from vlm_jax.scaling.latency import Request
from vlm_jax.store import results

_MARK = ("<!-- table: written by python -m experiments.report -->", "<!-- end of table -->")
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; margin: .6rem 0; } td, th { padding: .15rem .8rem; text-align: right; }
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
    gap, params = law.family(family).difference, law.family(family).forms[fit.BASIC].params
    sign = True if gap["low"] > 0 else False if gap["high"] < 0 else None
    return (
        f"alpha = {params['alpha']:.2f}, beta = {params['beta']:.2f}, "
        f"alpha - beta = {gap['value']:.2f} [{gap['low']:.2f}, {gap['high']:.2f}]: {_CONTRAST[sign]}"
    )


def plans(law: LawFit, rows: list[ResultRow], family: str) -> list[list[str]]:
    """Header and lines: the best cell of the study's own ladder at a few budgets of FLOPs a question."""
    mine = [row for row in rows if row.family == family and row.visual_tokens]
    first = mine[0]
    request = Request(first.question_tokens, first.answer_tokens, dtype="float32")
    encoder_flops = first.encoder_flops
    lines = [["budget, MFLOP", "LLM", "V", "predicted error", "binds"]]
    for budget in np.geomspace(1.02 * min(_flops(r) for r in mine), max(_flops(r) for r in mine), 5):
        try:
            best = frontier.plan(
                law,
                frontier.Budget("tflops", float(budget) / 1e12),
                request,
                family=family,
                encoders=(first.encoder,),
                llms=tuple(sorted({row.llm for row in mine})),
                compressors=tuple(sorted({row.compressor for row in mine})),
                tokens=tuple(sorted({row.visual_tokens for row in mine})),
            ).choices[0]
        except UserError:
            continue
        interval = f"{best.predicted_error:.3f} [{best.low:.3f}, {best.high:.3f}]"
        lines.append([f"{budget / 1e6:.1f}", best.llm, str(best.visual_tokens), interval, best.binds])
    lines[0][0] += f" (encoder {encoder_flops / 1e6:.0f})"
    return lines


def _flops(row: ResultRow) -> float:
    return row.encoder_flops + row.compressor_flops + row.question_flops + row.prefill_flops + row.decode_flops


def html_table(lines: list[list[str]]) -> str:
    head, *body = lines
    cells = "".join(f"<th>{html.escape(c)}</th>" for c in head)
    rest = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in line) + "</tr>" for line in body)
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
        f"{html.escape(rows[0].device)}; encoder {html.escape(rows[0].encoder)}, frozen. Error is the share of wrong "
        "answer tokens on held-out images, greedy decoding; ± one standard error over images; (n) is the number of "
        "seeds.</p>"
    )
    for family in law.families:
        parts.append(f"<h2>{html.escape(family)}</h2><p>{html.escape(contrast(law, family))}.</p>")
        parts.append(html_table(error_table(rows, family)))
        for kind in ("by_tokens", "by_params"):
            picture = base64.b64encode((workdir / "figures" / f"{family}_{kind}.png").read_bytes()).decode()
            parts.append(f'<img alt="{family}: error {kind}" src="data:image/png;base64,{picture}">')
        parts.append("<p>What the law chooses from this ladder at a budget of FLOPs a question:</p>")
        parts.append(html_table(plans(law, rows, family)))
        warnings = "".join(f"<li>{html.escape(w)}</li>" for w in law.family(family).warnings)
        parts.append(f'<p class="note">What to doubt:</p><ul class="note">{warnings}</ul>')
    parts.append(f"<p class=note>Rows: <code>{html.escape(str(workdir / 'rows.jsonl'))}</code></p>")
    path = workdir / "report.html"
    path.write_text("\n".join(parts) + "\n")
    return path


def write_readme_table(workdir: Path, rows: list[ResultRow], law: LawFit) -> None:
    """Renews what stands between the two marks of WORKDIR/README.md."""
    path = workdir / "README.md"
    text = path.read_text() if path.exists() else "\n".join(_MARK)
    if not all(mark in text for mark in _MARK):
        raise UserError(f"{path}: put the lines {_MARK[0]!r} and {_MARK[1]!r} where the table belongs")
    body = []
    for family in law.families:
        body += [f"**{family}**: {contrast(law, family)}.", "", markdown_table(error_table(rows, family)), ""]
    before, after = text.split(_MARK[0])[0], text.split(_MARK[1])[1]
    path.write_text(before + _MARK[0] + "\n\n" + "\n".join(body) + _MARK[1] + after)


def report(workdir: Path, loss: str = "log") -> tuple[list[ResultRow], LawFit]:
    """law.json, figures and report.html from the rows of a workdir; prints the tables."""
    rows = results.read(workdir / "rows.jsonl")
    law = fit.fit(table.of_rows(rows), loss=loss, source="rows.jsonl")
    lawfile.write(workdir / "law.json", law)
    (workdir / "figures").mkdir(exist_ok=True)
    console = scaling_report.console()
    for family in law.families:
        plots.error_curves(rows, law, family, workdir / "figures" / f"{family}_by_tokens.png")
        plots.error_by_params(rows, law, family, workdir / "figures" / f"{family}_by_params.png")
        for title, lines in (("error", error_table(rows, family)), ("plan", plans(law, rows, family))):
            console.print(f"\n[bold]{family}[/bold]: {title}")
            widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
            for line in lines:
                console.print("  " + "   ".join(text.rjust(w) for text, w in zip(line, widths, strict=True)))
        console.print(contrast(law, family))
    console.print(
        f"\nlaw:     {workdir / 'law.json'}\nfigures: {workdir / 'figures'}\nreport:  {write_page(workdir, rows, law)}"
    )
    return rows, law


def main(argv: list[str]) -> None:
    parser = Flags(
        prog="python -m experiments.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, type=Path, help="a folder with rows.jsonl")
    parser.add_argument(
        "--loss", default="log", help="how the law is fitted: log (relative errors) or squared (the paper's)"
    )
    parser.add_argument("--readme", action="store_true", help="renew the table in WORKDIR/README.md")
    args = parser.parse_args(argv)
    rows, law = report(args.workdir, args.loss)
    if args.readme:
        write_readme_table(args.workdir, rows, law)


if __name__ == "__main__":
    door(main)()
