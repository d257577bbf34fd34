"""The commands `plan` and `fit_law`: outputs, one-line errors, and no import of JAX."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vlm_jax import fit_law, plan
from vlm_jax.cli import run_main
from vlm_jax.core.errors import UserError

ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / "experiments" / "published_law" / "published_scores.csv"


@pytest.fixture(scope="module")
def law(tmp_path_factory):
    path = tmp_path_factory.mktemp("law") / "law.json"
    flags = ["--rows", str(PUBLISHED), "--out", str(path), "--form", "semilog", "--bootstraps", "40"]
    assert fit_law.main(flags) == 0
    return path


def test_the_law_file_has_the_documented_shape(law):
    values = json.loads(law.read_text())
    assert set(values) == {"version", "unit", "loss", "seed", "bootstraps", "floor", "source", "families", "weights"}
    one = values["families"]["reasoning"]
    assert {"rows", "forms", "chosen", "ratio", "difference", "warnings"} <= set(one)
    assert {"value", "low", "high"} <= set(one["ratio"])
    form = one["forms"]["multiplicative"]
    assert {"params", "sse", "interval", "aicc", "loo_error"} <= set(form)
    assert set(form["params"]) == set(form["interval"]) == {"A", "alpha", "beta", "D"}


def test_a_plan_as_json(law, capsys):
    flags = "--family reasoning --question-tokens 50 --answer-tokens 20 --tflops 2 --json --top 3"
    assert plan.main(["--law", str(law), *flags.split()]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["closed_form"]["visual_tokens"] == pytest.approx(13.5, abs=0.1)
    assert len(values["choices"]) == 3
    first = values["choices"][0]
    fields = (
        "encoder llm llm_params_billion compressor visual_tokens predicted_error low high flops latency_ms cache_bytes"
    )
    assert {*fields.split(), "binds", "warnings"} <= set(first)
    assert first["flops"] <= 2e12
    assert first["latency_ms"] is None


def test_a_plan_as_tables(law, capsys):
    flags = "--family reasoning --latency-ms 300 --chip v6e --batch 32 --cached-question --mode paper"
    assert plan.main(["--law", str(law), *flags.split()]) == 0
    out = capsys.readouterr().out
    for text in (
        "paper cost chooses:",
        "full cost chooses:",
        "milliseconds a batch",
        "GFLOPs a request",
        "extrapolates_params",
    ):
        assert text in out


def test_a_plan_as_a_page_and_as_figures(law, tmp_path, capsys):
    narrow = ["--encoders", "clip-l14-336", "--compressors", "tokenpacker", "none"]
    narrow += ["--llms", "qwen1.5-0.5b", "qwen1.5-7b"]
    flags = ["--family", "reasoning", "--tflops", "5", *narrow]
    flags += ["--html", str(tmp_path / "plan.html"), "--figures", str(tmp_path / "figures")]
    assert plan.main(["--law", str(law), *flags]) == 0
    page = (tmp_path / "plan.html").read_text()
    head, data = page.split("const data = ")
    assert "<script src" not in head
    assert "<link" not in head.split("<script>")[0]
    data = json.loads(data.split(";\n")[0])
    assert {"0", "50", "1000"} <= set(data["at"])
    assert {"1", "8", "32"} <= set(data["at"]["50"])
    assert set(data["candidates"]["llm"]) == {"qwen1.5-0.5b", "qwen1.5-7b"}
    pictures = {path.name for path in (tmp_path / "figures").iterdir()}
    names = {"cost_frontier-ocr", "cost_frontier-reasoning", "cost_shares", "flops_or_latency", "optimal_tokens"}
    assert pictures == {f"{name}.png" for name in names}
    assert not list(tmp_path.glob("**/*.new*"))
    capsys.readouterr()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tflops", "2"], "--family: expected one of ocr, reasoning"),
        (["--family", "reasoning"], "one of the arguments --tflops .* is required"),
        (["--family", "reasoning", "--tflops", "1", "--cache-mb", "1"], "not allowed with"),
        (["--family", "reasoning", "--tflops", "0.001"], "the least is"),
        (["--family", "reasoning", "--tflops", "1", "--top", "0"], "--top: expected 1 or more, got 0"),
        (["--family", "reasoning", "--tflops", "1", "--offsets", "none.csv"], r"none\.csv: cannot be read"),
        (["--family", "reasoning", "--tflops", "1", "--chip", "tpu"], "unknown chip"),
    ],
)
def test_invalid_plans_raise(law, flags, message):
    with pytest.raises(UserError, match=message):
        plan.main(["--law", str(law), *flags])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("family,llm_params_billion,visual_tokens\n", "missing mean_score"),
        ("family,llm_params_billion,visual_tokens,mean_score\nocr,1,4,53\nocr,2,1,50\n", "divide by 100"),
        (
            "family,llm_params_billion,visual_tokens,mean_score\nocr,1,4,0.5\nocr,1,1,0.4\n",
            "expected two or more LLM sizes",
        ),
    ],
)
def test_bad_rows_exit_2_with_one_line_and_write_nothing(tmp_path, capsys, monkeypatch, text, message):
    (tmp_path / "rows.csv").write_text(text)
    out = tmp_path / "law.json"
    monkeypatch.setattr(sys, "argv", ["fit_law", "--rows", str(tmp_path / "rows.csv"), "--out", str(out)])
    with pytest.raises(SystemExit) as stopped:
        run_main(fit_law.main)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2
    assert len(lines) == 1
    assert message in lines[0]
    assert "rows.csv" in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bootstraps", "5"], "--bootstraps: expected 20 or more, up to 100,000, got 5"),
        (["--seed", "-1"], "--seed: expected 0 or more, got -1"),
        (["--fixed-d", "nan"], "expected a finite number, got nan"),
        (["--out", "."], "expected a file, got the folder"),
        (["--form", "cubic"], "unknown form 'cubic'"),
        (["--family", "video"], "unknown family 'video'"),
    ],
)
def test_invalid_fits_raise(tmp_path, flags, message):
    out = tmp_path / "law.json"
    with pytest.raises(UserError, match=message):
        fit_law.main(["--rows", str(PUBLISHED), "--out", str(out), *flags])
    assert not out.exists()


def test_figures_that_cannot_be_written_are_one_line(law, tmp_path):
    (tmp_path / "taken").write_text("")
    flags = ["--law", str(law), "--family", "ocr", "--tflops", "2", "--figures", str(tmp_path / "taken")]
    with pytest.raises(UserError, match=r"taken.*cannot be written"):
        plan.main(flags)


def test_planning_and_fitting_import_no_jax(law, tmp_path):
    """From start to end, with all they can write: of a table that names its models, and of result rows."""
    rows = ROOT / "experiments" / "size_by_tokens" / "rows.jsonl"
    out = ["--html", str(tmp_path / "page.html"), "--figures", str(tmp_path / "figures")]
    fits = [
        ["--rows", str(one), "--out", str(tmp_path / "law.json"), "--bootstraps", "20"] for one in (PUBLISHED, rows)
    ]
    program = (
        "import sys; from vlm_jax import plan, fit_law\n"
        f"for flags in {fits!r}: assert fit_law.main(flags) == 0\n"
        f"flags = ['--law', {str(law)!r}, '--family', 'ocr', '--tflops', '2', '--chip', 'v6e', *{out!r}]\n"
        "assert plan.main(flags) == 0\n"
        "assert not {'jax', 'jaxlib', 'flax'} & set(sys.modules), 'imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_figures_are_not_blank(law, tmp_path):
    from PIL import Image

    from vlm_jax.scaling import lawfile, plots, scores

    fitted, rows = lawfile.read(law), scores.read(PUBLISHED)
    for draw in (plots.error_curves, plots.error_by_params):
        picture = np.asarray(Image.open(draw(rows, fitted, "reasoning", tmp_path / "one.png")).convert("L"))
        assert picture.std() > 10
