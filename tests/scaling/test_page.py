"""The page of a plan: its data, and the script's ranking, which a browser runs where one is installed."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from vlm_jax import plan
from vlm_jax.core.errors import UserError
from vlm_jax.scaling import budgets, fit, frontier, lawfile, page, scores
from vlm_jax.scaling.budgets import Budget
from vlm_jax.sizing import chips
from vlm_jax.sizing.roofline import Request

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "experiments" / "size_by_tokens" / "rows.jsonl"
BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
VIEWS = [  # kind, amount, question tokens, batch, chip
    ("tflops", 2.0, 50, 1, ""), ("tflops", 0.6, 0, 8, "v6e"), ("tflops", 30.0, 1000, 32, "v5e"),
    ("latency_ms", 400.0, 50, 32, "v6e"), ("latency_ms", 60.0, 200, 1, "h100"), ("latency_ms", 5000.0, 50, 8, "v4"),
    ("usd_per_million_requests", 30.0, 50, 8, "v6e"), ("usd_per_million_requests", 200.0, 0, 1, "a100"),
    ("cache_mb", 40.0, 50, 1, ""), ("cache_mb", 300.0, 200, 32, "v5p"),
]  # fmt: skip
FEW = (1, 16, 36, 64, 144, 576)
COMPRESSORS = ("tokenpacker", "resampler")
PRICE = 2.7


@pytest.fixture(scope="module")
def bent(tmp_path_factory):
    """The law of a family that no form fits."""
    rows = [one for one in scores.read(STUDY).cells if one.family == "ocr"]
    return fit.fit(scores.read(STUDY)._replace(cells=tuple(rows)), bootstraps=20, seed=0)


def data_of(text):
    return json.loads(re.search(r"^const data = (.*);$", text, re.MULTILINE)[1])


def dump(path):
    """The page's document after its scripts ran."""
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    flags.append(f"--user-data-dir={path.parent / 'browser'}")
    done = subprocess.run([BROWSER, *flags, path.as_uri()], capture_output=True, text=True, timeout=110)
    return done.stdout


def in_browser(path, script):
    """What a script at the end of the page writes into `out`."""
    add = f'<pre id="out"></pre><script>const out = []; {script}; document.getElementById("out").textContent = '
    path.write_text(path.read_text().replace("</body>", add + "JSON.stringify(out);</script></body>"))
    text = re.search(r'<pre id="out">(.*?)</pre>', dump(path), re.DOTALL)[1]
    return json.loads(text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


def planned(law, family, view, mode, **names):
    """The ranking of `frontier.plan` for a view, as (LLM, compressor, V)."""
    kind, amount, question, batch, chip = view
    request = Request(question, 20, batch, on=chips.chip(chip) if chip else None)
    budget = Budget(kind, amount, PRICE if kind.startswith("usd") else None)
    try:
        found = frontier.plan(law, budget, request, family=family, mode=mode, top=10_000, **names)
    except UserError:  # nothing is within the budget
        return []
    return [[c.llm, c.compressor, c.visual_tokens] for c in found.choices]


def test_the_data_hold_the_errors_and_costs_of_the_plan(law):
    request = Request(50, 20, 8, on=chips.chip("v6e"))
    data = page.page_data(law, "reasoning", Budget("tflops", 2), request, {"tokens": FEW})
    unlimited = Budget("tflops", 1e6)
    found = frontier.plan(law, unlimited, request, family="reasoning", top=1000, mode="paper", tokens=FEW)
    columns, at = data["candidates"], data["at"]["50"]
    where = {key: i for i, key in enumerate(zip(columns["llm"], columns["v"], strict=True))}
    assert len(where) == len(columns["v"]) == len(found.choices)
    measured = {(cell.params, cell.tokens): cell.error for cell in scores.read(law_table()).of("reasoning").cells}
    for choice in found.choices:
        i = where[choice.llm, choice.visual_tokens]
        assert columns["error"][i] == choice.predicted_error
        assert (columns["low"][i], columns["high"][i]) == pytest.approx((choice.low, choice.high), rel=1e-3)
        assert at["flops"][i] == choice.flops
        assert at["flops_by_part"][i] == pytest.approx(list(choice.flops_by_part.values()), rel=1e-3)
        assert at["8"]["v6e"]["secs"][i] == pytest.approx(choice.latency_ms / 1e3, rel=1e-12)
        parts = np.array(list(choice.latency_ms_by_part.values())) / 1e3
        assert at["8"]["v6e"]["secs_by_part"][i] == pytest.approx(list(parts), rel=1e-3)
        assert at["cache"][i] == choice.cache_bytes
        assert at["paper_flops"][i] == pytest.approx(2e9 * choice.llm_params_billion * (50 + choice.visual_tokens))
        assert choice.binds.startswith(at["8"]["v6e"]["binds"][i])
        cell = measured.get((choice.llm_params_billion, choice.visual_tokens))
        assert columns["measured"][i] == (None if cell is None else pytest.approx(cell, abs=1e-4))
        expected = "outside" if choice.extrapolates else "between" if cell is None else "cell"
        assert columns["basis"][i] == expected
        assert bool(columns["outside"][i]) == bool(choice.extrapolates)


def law_table():
    return ROOT / "experiments" / "published_law" / "published_scores.csv"


def test_where_no_form_fits_the_page_has_measured_cells_only(bent, tmp_path):
    page.write(tmp_path / "page.html", bent, None, Budget("tflops", 1.2e-4), Request(8, 6), {})
    text = (tmp_path / "page.html").read_text()
    data = data_of(text)
    assert data["law"] is False
    assert set(data["candidates"]["basis"]) == {"cell"}
    cells = bent.family(None).measured
    assert sorted(data["candidates"]["error"]) == pytest.approx(sorted(cells.error))
    before = text.partition("<script>")[0]
    assert "no form fits" in before
    assert '<ul class="doubt">' in before


def test_the_page_is_one_file_with_labels(law, tmp_path):
    page.write(tmp_path / "page.html", law, "ocr", Budget("tflops", 2), Request(), {"tokens": (16, 36)})
    text = (tmp_path / "page.html").read_text()
    assert not re.search(r"<script[^>]*src|<link|@import|url\(", text.replace(plotly(), ""))
    body = text.partition("<script>")[0]
    for tag in re.findall(r"<(?:select|input)[^>]*>", body):
        labelled = "aria-label" in tag or re.search(rf"<label[^>]*>(?:(?!</label>).)*{re.escape(tag)}", body, re.DOTALL)
        assert labelled, tag
    assert 'name="viewport"' in body
    assert data_of(text)["start"] == {
        "kind": "tflops", "amount": 2, "question": "50", "batch": "1", "chip": "", "price": None,
    }  # fmt: skip


def plotly():
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def test_many_candidates_keep_the_page_small(law):
    limits = {"compressors": ("resampler",), "llms": ("qwen1.5-0.5b",)}
    data = page.page_data(law, "ocr", Budget("tflops", 2), Request(), limits)
    assert len(data["candidates"]["v"]) > 500
    assert (data["questions"], data["batches"]) == (["50"], ["1"])
    assert len(json.dumps(data)) < 4e6


def test_a_page_opens_with_the_budget_of_the_command(law, tmp_path, capsys):
    lawfile.write(tmp_path / "law.json", law)
    flags = ["--law", str(tmp_path / "law.json"), "--family", "ocr", "--chip", "h100", "--usd-per-chip-hour", "3"]
    flags += ["--usd-per-million-requests", "40", "--question-tokens", "75", "--batch", "4", "--top", "5"]
    assert plan.main([*flags, "--tokens", "36", "144", "--html", str(tmp_path / "page.html")]) == 0
    data = data_of((tmp_path / "page.html").read_text())
    assert data["start"] == {
        "kind": "usd_per_million_requests", "amount": 40, "question": "75", "batch": "4", "chip": "h100", "price": 3,
    }  # fmt: skip
    assert data["top"] == 5
    assert set(data["at"]["75"]) > {"4", "flops"}
    capsys.readouterr()


@pytest.mark.skipif(not BROWSER, reason="no chromium")
@pytest.mark.parametrize("names", [{"tokens": FEW}, {"compressors": COMPRESSORS, "tokens": FEW}], ids=["own", "named"])
def test_the_script_ranks_as_the_plan_does(law, tmp_path, names):
    path = tmp_path / "page.html"
    page.write(path, law, "reasoning", Budget("tflops", 2), Request(), names)
    assert set(budgets.BUDGETS) == {view[0] for view in VIEWS}
    keys = ("kind", "amount", "question", "batch", "chip")
    views = [dict(zip(keys, (k, a, str(q), str(b), chip), strict=True)) for k, a, q, b, chip in VIEWS]
    script = (
        f"for (const one of {json.dumps(views)}) {{ Object.assign(view, one, {{price: {PRICE}}});"
        "out.push(['full', 'paper'].map(mode => ranked(costs(), mode).map(i => [c.llm[i], c.compressor[i], c.v[i]]))) }"
    )
    found = in_browser(path, script)
    assert sum(bool(full) for full, _ in found) >= len(VIEWS) - 1
    for view, (full, paper) in zip(VIEWS, found, strict=True):
        assert full == planned(law, "reasoning", view, "full", **names), view
        assert paper == planned(law, "reasoning", view, "paper", **names), view


@pytest.mark.skipif(not BROWSER, reason="no chromium")
def test_names_from_files_are_text_on_the_page(law, tmp_path):
    """In cards, table and figure; and a control changes the answer."""
    path = tmp_path / "page.html"
    page.write(path, law, "reasoning", Budget("tflops", 2), Request(), {"tokens": FEW})
    name = "<img src=x onerror='document.title=1'>"
    script = (
        f"c.llm.fill({json.dumps(name)}); show(); const before = $('answer').textContent;"
        "$('slider').value = 0; $('slider').oninput(); out.push(before, $('answer').textContent);"
        "$('amount').value = 1e-9; $('amount').oninput(); out.push($('answer').textContent);"
        "$('chip').value = 'v6e'; $('chip').onchange(); $('kind').value = 'latency_ms'; $('kind').onchange();"
        "out.push($('answer').textContent, document.images.length, document.title)"
    )
    before, least, nothing, timed, images, title = in_browser(path, script)
    assert name in before
    assert least.startswith("Within 431 GFLOPs")
    assert nothing.startswith("Nothing is within this budget; the least is 431 GFLOPs")
    assert " ms per batch" in timed
    assert images == 0
    assert title == "reasoning: the best model within a budget"
