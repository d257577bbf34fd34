"""report.html: one file, pictures inside. `experiments.report` computes what it shows."""

import base64
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vlm_jax.core.text import to_html

_STYLE = """
* { box-sizing: border-box; }
body { font: 17px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 0; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 16px 64px; overflow-wrap: anywhere; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 10px; }
h2 { font-size: 1.35rem; margin: 48px 0 8px; padding-top: 14px; border-top: 3px solid #2468a2; }
h3 { font-size: 1rem; margin: 24px 0 6px; }
p { margin: 8px 0; max-width: 68ch; }
.faint, caption { color: #5c6369; font-size: .9rem; }
.answers { list-style: none; padding: 0; margin: 18px 0; font-size: 1.1rem; }
.answers li { max-width: none;
  border-left: 5px solid #d1603d; background: #f7f8f9; padding: 10px 14px; margin: 10px 0; }
.answers a { font-weight: 650; color: #1d5484; }
.figures { display: grid; grid-template-columns: 1fr 1fr; gap: 16px; align-items: start; margin: 16px 0; }
img { width: 100%; height: auto; }
.tables { display: flex; flex-wrap: wrap; gap: 12px 40px; align-items: flex-start; }
.table { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: .86rem; overflow-wrap: normal; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: 4px; }
th, td { padding: 4px 8px; text-align: right; white-space: nowrap; }
th { border-bottom: 1px solid #8a8f94; font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
td small { display: block; color: #444; font-size: .78em; white-space: nowrap; }
ul { padding-left: 20px; } li { margin: 4px 0; max-width: 80ch; }
.doubt li:first-child { font-weight: 650; }
.doubt.misses li:first-child { color: #a5431f; }
pre { background: #f2f4f6; border-radius: 6px; padding: 10px 12px; margin: 4px 0 14px; font-size: .85rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 760px) {
  .figures { grid-template-columns: minmax(0, 1fr); }
  body { font-size: 16px; } h1 { font-size: 1.5rem; }
  table { font-size: .8rem; } th, td { padding: 4px 3px; } th, td small { white-space: normal; }
}
"""


class Section(NamedTuple):
    """What the page says of one family."""

    family: str
    answer: str  # what to spend on, as a sentence
    example: str  # a model at one budget, as a sentence
    exponents: str
    pictures: Sequence[Path]
    plan: list[list[str]]  # header and lines
    plan_caption: str
    errors: list[list[str]]
    fits: bool
    doubts: Sequence[str]
    commands: Sequence[tuple[str, Sequence[str]]]  # what each is for, and its arguments


def html_table(lines: list[list[str]], caption: str = "") -> str:
    head, *body = lines
    cells = "".join(f'<th scope="col">{to_html(c)}</th>' for c in head)
    rest = "".join("<tr>" + "".join(_cell(c) for c in line) + "</tr>" for line in body)
    above = f"<caption>{to_html(caption)}</caption>" if caption else ""
    return f'<div class="table"><table>{above}<tr>{cells}</tr>{rest}</table></div>'


def _cell(text: str) -> str:
    """An error with its standard error below it, darker where it is larger; or plain text."""
    if not re.fullmatch(r"\d\.\d+ ± .*", text):
        return f"<td>{to_html(text)}</td>"
    error, _, more = text.replace("± ", "±\N{NO-BREAK SPACE}").partition(" ")
    shade = f"background: rgba(36, 104, 162, {0.45 * min(float(error), 1):.2f})"
    return f'<td style="{shade}">{to_html(error)}<small>{to_html(more)}</small></td>'


def command(arguments: Sequence[str]) -> str:
    """A command line for a shell in this folder, with this interpreter."""
    python = Path(sys.executable)
    here = str(python.relative_to(Path.cwd())) if python.is_relative_to(Path.cwd()) else "python"
    return shlex.join([here, "-m", *arguments])


def page(title: str, asked: Sequence[str], sections: Sequence[Section]) -> str:
    """The whole page."""
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{to_html(title)}</title><style>{_STYLE}</style></head><body><main>",
        f"<h1>{to_html(title)}</h1>",
        *(f"<p>{to_html(text)}</p>" for text in asked),
        '<ul class="answers">',
        *(
            f'<li><a href="#family-{i}">{to_html(one.family)}</a>: {to_html(one.answer)}</li>'
            for i, one in enumerate(sections)
        ),
        "</ul>",
        *(_section(i, one) for i, one in enumerate(sections)),
        "</main></body></html>\n",
    ]
    return "\n".join(parts)


def _section(index: int, one: Section) -> str:
    pictures = "".join(
        f'<img alt="{to_html(f"{one.family}: {path.stem}")}" src="data:image/png;base64,'
        f'{base64.b64encode(path.read_bytes()).decode()}">'
        for path in one.pictures
    )
    doubts = "".join(f"<li>{to_html(text[:1].upper() + text[1:])}.</li>" for text in one.doubts)
    commands = "".join(f"<p>{to_html(why)}</p><pre>{to_html(command(argv))}</pre>" for why, argv in one.commands)
    return "\n".join([
        f'<section id="family-{index}"><h2>{to_html(one.family)}</h2>',
        f"<p>{to_html(one.answer)} {to_html(one.example)}</p>",
        f'<p class="faint">{to_html(one.exponents)}.</p>',
        f'<div class="figures">{pictures}</div>',
        '<div class="tables">',
        html_table(one.plan, one.plan_caption),
        html_table(one.errors, "Measured errors, ± one standard error; in brackets the number of seeds"),
        "</div>",
        f'<h3>What to doubt</h3><ul class="doubt {"fits" if one.fits else "misses"}">{doubts}</ul>',
        f"<h3>What to do next</h3>{commands}</section>",
    ])  # fmt: skip
