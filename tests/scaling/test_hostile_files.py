"""law.json, tables and rows with values of other types and ranges: one line that names file and field."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import report_page
from tests.result_rows import row
from tests.scaling.tables import PUBLISHED
from vlm_jax import plan
from vlm_jax.core.errors import UserError
from vlm_jax.core.text import slug
from vlm_jax.evaluation import results
from vlm_jax.scaling import lawfile, offsets, planner_plots, report, scores
from vlm_jax.sizing import calibration
from vlm_jax.sizing.roofline import Request

LAW = json.loads((PUBLISHED.parent / "law.json").read_text())
HOSTILE = (
    '"><img src=x onerror=alert(1)>',
    "../../escaped",
    "[/bold]",
    "$\\frac$",
    "$DATA",
    "x" * 300,
    "日本語 😀",
    "_x",
)


def law_with(path: Path, field: str, value: Any) -> Path:
    values = copy.deepcopy(LAW)
    *groups, name = field.split("/")
    group = values
    for key in groups:
        group = group[int(key) if isinstance(group, list) else key]
    group[name] = value
    (path / "law.json").write_text(json.dumps(values))
    return path / "law.json"


FAMILY = "families/ocr/"
BASIC = f"{FAMILY}forms/multiplicative/"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("families", [], "families: expected dict"),
        ("families", {}, "no families"),
        ("unit", {"llm_params": 1e9}, "unit.params_are is missing"),
        ("unit/params_are", "all", "unknown unit.params_are 'all'"),
        ("seed", "0", "seed: expected int, got '0'"),
        ("version", "2", "expected version 2, got '2'"),
        (f"{FAMILY}rows", None, "families.ocr.rows: expected a group of fields"),
        (f"{FAMILY}rows/sizes", [], "rows.sizes: expected ascending numbers"),
        (f"{FAMILY}rows/sizes", ["1"], "rows.sizes.0: expected float"),
        (f"{FAMILY}rows/sizes", [2, 1], "rows.sizes: expected ascending numbers"),
        (f"{FAMILY}rows/tokens", [0, 4], "rows.tokens: expected ascending numbers above 0"),
        (f"{FAMILY}rows/tokens", [1.5], "rows.tokens.0: expected int"),
        (f"{FAMILY}chosen", "cubic", "unknown families.ocr.form 'cubic'"),
        (f"{FAMILY}forms", {}, "unknown families.ocr.form"),
        (f"{FAMILY}ratio/low", "x", "ratio.low: expected float, got 'x'"),
        (f"{FAMILY}difference", {}, "difference.high is missing"),
        (f"{FAMILY}warnings", [1], "warnings.0: expected str"),
        (f"{BASIC}params", {"A": 1.0}, "forms.multiplicative.params: expected A, alpha, beta, D"),
        (f"{BASIC}params/alpha", 10**30, "alpha: expected numbers from -10 to 10"),
        (f"{BASIC}params/alpha", True, "params.alpha: expected float, got True"),
        (f"{BASIC}draws", {}, "forms.multiplicative.draws is empty"),
        (f"{BASIC}draws/alpha", [0.5], "and as many draws of each"),
        (f"{BASIC}interval/D", [0.0], "interval.D: expected"),
        (f"{FAMILY}models/0/encoder", None, "models.0.encoder: expected a group of fields, got None"),
        (f"{FAMILY}models/0/encoder/patch_size", 0, "encoder.patch_size: expected 1 to"),
        (f"{FAMILY}models/0/encoder/image_size", 10**9, "encoder.image_size: expected 1 to"),
        (f"{FAMILY}models/0/decoder/heads", -4, "decoder.heads: expected 1 to"),
        (f"{FAMILY}models/0/decoder/depth", 10**12, "decoder.depth: expected 1 to"),
        (
            f"{FAMILY}models/0/compressor",
            {**LAW["families"]["ocr"]["models"][0]["compressor"], "name": "victor", "depth": 99},
            "models.0.compressor 'victor': expected a decoder with layers before and behind each of its stages",
        ),
        (f"{FAMILY}models/0/compressor/grid", [4, 4], "models.0.compressor.grid: expected the encoder's, ("),
        (f"{FAMILY}models/0/decoder/name", "a\x1b[31m", "expected printable text"),
        (f"{FAMILY}selection", "a\x07", "expected printable text"),
        (f"{FAMILY}measured/error", [0.5], "measured.params: expected 1 numbers, one for each error, got 28"),
        (f"{FAMILY}measured/tokens", [0] * 28, "measured.tokens: expected numbers of 1 or more"),
        (f"{FAMILY}measured/stderr", [None] * 28, "measured.stderr.0: expected float"),
        (f"{FAMILY}measured", [], "measured: expected a group of fields"),
        (f"{BASIC}lack_of_fit/noise", "\x1b[31m", "unknown families.ocr.forms.multiplicative.lack_of_fit.noise"),
        (f"{BASIC}lack_of_fit/p", "0.1", "lack_of_fit.p: expected float"),
        (f"{BASIC}largest_out", {"covered": 3}, "largest_out.llm_params_billion is missing"),
        (f"{BASIC}largest_out/covered", "3", "largest_out.covered: expected int"),
    ],
)
def test_a_value_that_no_fit_writes(tmp_path: Path, field: str, value: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        lawfile.read(law_with(tmp_path, field, value))
    assert f"{tmp_path}/law.json: expected" in str(error.value)
    assert message in str(error.value)
    assert "python -m vlm_jax.fit_law" in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"ocr{'x' * 300},1,4,0.5", "printable text of at most 200 characters"),
        ("o\x1b[31mcr,1,4,0.5", "expected printable text"),
        ("ocr,1e300,4,0.5", "llm_params_billion from 1e-09 to 1e"),
        ("ocr,1,1e300,0.5", "expected an integer visual_tokens"),
        ("ocr,1,²,0.5", "expected a finite number as visual_tokens"),
        ("ocr,1,4,1e400", "expected a finite number as mean_score"),
        (f"ocr,{'9' * 140_000},4,0.5", "not a CSV file"),
        ("ocr,1,4", "expected as many fields"),
    ],
)
def test_a_field_of_a_table(tmp_path: Path, line: str, message: str) -> None:
    header = "family,llm_params_billion,visual_tokens,mean_score"
    (tmp_path / "rows.csv").write_text(f"{header}\n{line}\n")
    with pytest.raises(UserError, match=rf"rows\.csv:2: .*{message}"):
        scores.read(tmp_path / "rows.csv")


def test_fields_of_other_tables(tmp_path: Path) -> None:
    for read, content, message in (
        (calibration.calibrate, "chip,chips,flops,bytes,secs\nv9,1,1,1,1\n", r"a\.csv:2: unknown chip"),
        (calibration.calibrate, "chip,chips,flops,bytes,secs\nv6e,1,1e300,1,1\n", r"a\.csv:2: expected"),
        (calibration.calibrate, "chip,chips,flops,bytes,secs\nv6e,1,nan,1,1\n", r"a\.csv:2: expected"),
        (offsets.read, "method,visual_tokens,gqa\npool,²,50\n", r"a\.csv:2: expected numbers"),
        (offsets.read, "method,visual_tokens,gqa\npool,4,1e300\n", r"a\.csv:2: expected scores of at most"),
        (offsets.read, "method,visual_tokens,gqa\npool,4,nan\n", r"a\.csv:2: expected scores of at most"),
        (offsets.read, "", "expected columns method,visual_tokens"),
    ):
        (tmp_path / "a.csv").write_text(content)
        with pytest.raises(UserError, match=message):
            read(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("family", "a\x1b[2J", "family: expected printable text"),
        ("family", "y" * 3000, "family: expected printable text of at most 2000 characters"),
        ("error", 1e200, "error: expected a finite float"),
        ("seed", 10**299, "seed: expected a finite int"),
    ],
)
def test_a_field_of_a_result_row(tmp_path: Path, field: str, value: Any, message: str) -> None:
    results.append(tmp_path / "rows.jsonl", row())
    values = json.loads((tmp_path / "rows.jsonl").read_text()) | {field: value}
    (tmp_path / "rows.jsonl").write_text(json.dumps(values))
    with pytest.raises(UserError, match=rf"rows\.jsonl:1: {message}"):
        scores.read(tmp_path / "rows.jsonl")


def test_a_row_of_an_odd_workdir_can_be_read_again(tmp_path: Path) -> None:
    """The name of a folder may hold any bytes."""
    results.append(tmp_path / "rows.jsonl", row(cell="a\x1b\udcff"))
    assert results.read(tmp_path / "rows.jsonl")[0].cell == "a\\x1b\\udcff"


@pytest.mark.parametrize("name", HOSTILE)
def test_a_familys_name_is_text_in_tables_and_pages(tmp_path: Path, capsys: pytest.CaptureFixture, name: str) -> None:
    values = {**LAW, "families": {name: LAW["families"]["ocr"]}}
    (tmp_path / "law.json").write_text(json.dumps(values))
    law = lawfile.read(tmp_path / "law.json")
    report.print_law(law, report.console())
    assert name[:20] in capsys.readouterr().out
    page = ["--tflops", "2", "--llms", "qwen1.5-0.5b", "--html", str(tmp_path / "page.html")]
    plan.main(["--law", str(tmp_path / "law.json"), *page])
    text = (tmp_path / "page.html").read_text()
    assert "<img src" not in text
    assert text.count("<h1>") == 1
    assert "<img" not in report_page.html_table([[name], [name]])


@pytest.mark.parametrize("name", HOSTILE)
def test_a_familys_name_is_no_path_and_no_mathematics(tmp_path: Path, name: str) -> None:
    """matplotlib raises for broken mathematics when it draws, and warns of labels with a leading "_"."""
    folder = tmp_path / "deep" / "figures"
    values = {**LAW, "families": {name: LAW["families"]["ocr"]}}
    (tmp_path / "law.json").write_text(json.dumps(values))
    law = lawfile.read(tmp_path / "law.json")
    limits = {"llms": ("qwen1.5-0.5b",), "tokens": (16, 36)}
    planner_plots.plots.cost_frontier(law, None, name, folder / f"cost_frontier-{slug(name)}.png", (50,))
    planner_plots.plots.optimal_tokens(law, folder / "optimal_tokens.png")
    planner_plots.cost_shares(law, None, Request(50, 20), folder / "cost_shares.png", limits)
    assert {path.parent for path in tmp_path.rglob("*.png")} == {folder}
    assert len(list(folder.iterdir())) == 3
    assert np.isfinite(law.family(name).predict(1.0, 4))
