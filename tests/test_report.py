"""The report of a workdir: its page, its sentences and the commands it suggests; and the first line of the demo."""

import re
import shlex
import subprocess
import sys
from html import unescape
from pathlib import Path

import numpy as np
import pytest

from experiments import report, report_page
from tests.result_rows import on_a_law
from vlm_jax import plan
from vlm_jax.evaluation import results
from vlm_jax.scaling import lawfile

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """The report of two families, in a folder whose name needs quotes: no form fits ocr, one fits facts."""
    folder = tmp_path_factory.mktemp("a study") / "one's <own>"
    folder.mkdir()
    rows = results.read(ROOT / "experiments" / "size_by_tokens" / "rows.jsonl")
    kept = [row for row in rows if row.family == "ocr"] + on_a_law(row for row in rows if row.family == "facts")
    path = folder / "rows.jsonl"
    path.write_text("".join(results.to_line(row, path) for row in kept))
    report.report(folder)
    return folder


def test_the_page_is_one_file_with_a_sentence_for_each_family(workdir):
    text = (workdir / "report.html").read_text()
    assert not re.search(r"<script|<link|https?://(?!www\.w3)", text)
    assert text.count("<h1>") == 1
    assert 'name="viewport"' in text
    assert text.count('src="data:image/png;base64,') == 4
    assert re.findall(r'<img alt="([^"]+)"', text)[0].startswith("facts")
    answers = dict(re.findall(r'<li><a href="#family-\d">(.*?)</a>: (.*?)</li>', text))
    assert answers["facts"] == "Spend on the LLM: error falls faster with parameters than with visual tokens."
    assert answers["ocr"].startswith("Spend on visual tokens")
    assert "a law that misses these rows" in answers["ocr"]
    for heading in ("What to doubt", "What to do next"):
        assert text.count(heading) == 2
    assert "No form fits: " in text


def test_the_plan_of_the_page_is_the_least_error_of_the_measured_cells(workdir):
    """No form fits ocr: no cheaper cell errs less than the choice, and the last budget buys the best of all."""
    rows, law = results.read(workdir / "rows.jsonl"), lawfile.read(workdir / "law.json")
    cells = {}
    for row in rows:
        if row.family == "ocr" and row.visual_tokens:
            cells.setdefault((row.llm, row.visual_tokens), []).append(row)
    found = report.plans(law, rows, "ocr")
    for flops, choice in found:
        spent = {key: of[0].encoder_flops + of[0].prefill_flops for key, of in cells.items()}
        error = {key: np.mean([row.error for row in of]) for key, of in cells.items()}
        assert error[choice.llm, choice.visual_tokens] == pytest.approx(choice.predicted_error)
        assert all(choice.predicted_error <= error[key] + 1e-9 for key in cells if spent[key] * 1.1 < flops)
    assert found[-1].choice.predicted_error == pytest.approx(min(np.mean([r.error for r in c]) for c in cells.values()))
    assert [one.flops for one in found] == sorted(one.flops for one in found)


def test_the_commands_of_the_page_run(workdir, capsys):
    text = (workdir / "report.html").read_text()
    commands = [shlex.split(unescape(one)) for one in re.findall(r"<pre>(.*?)</pre>", text, re.DOTALL)]
    plans = [argv for argv in commands if argv[2] == "vlm_jax.plan"]
    assert len(plans) == 2
    assert {argv[2] for argv in commands} == {"vlm_jax.plan", "vlm_jax.fit_law"}
    assert plan.main([*plans[0][3:], "--llms", "d24", "d48"]) == 0
    assert (workdir / "plan-facts.html").stat().st_size > 1e6
    capsys.readouterr()


def test_errors_are_shaded_and_names_are_text():
    table = report_page.html_table([["N", "<b>"], ["<i>", "0.500 ± 0.013 (2)"]])
    assert "&lt;b&gt;" in table
    assert "<i>" not in table
    assert ">0.500<small>" in table
    assert "rgba(36, 104, 162, 0.23)" in table or "rgba(36, 104, 162, 0.22)" in table


def test_the_demo_prints_its_first_line_before_it_imports_jax(tmp_path):
    program = (
        "import builtins, sys\n"
        "shown, real = [], builtins.print\n"
        "builtins.print = lambda *a, **k: (shown.append('jax' in sys.modules), real(*a, **k))\n"
        "from experiments import demo\n"
        "from vlm_jax.core.errors import UserError\n"
        f"try: demo.main(['--workdir', {str(tmp_path / 'demo')!r}, '--workers', '0'])\n"
        "except UserError as error: real(error)\n"
        "assert shown and not shown[0], shown\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    first, *_, last = done.stdout.splitlines()
    assert first.startswith("step 1 of 2: ")
    assert "--workers: expected at least 1, got 0" in last
