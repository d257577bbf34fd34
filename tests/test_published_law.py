"""The published study: all numbers of its page are computed from its law."""

import csv
import re
from pathlib import Path

from experiments.published_law import refit
from vlm_jax.scaling import lawfile

HERE = Path(refit.__file__).parent
# Names and formulas, not findings.
NAMES = ("2411.03312", "Vicuna-7B", "vicuna7b", "2 N (Q + V)", "D = 0")


def test_the_template_has_no_literal_numbers():
    text = (HERE / "README.template.md").read_text()
    for name in NAMES:
        text = text.replace(name, "")
    text = re.sub(r"\{[^}]*\}", "", text)  # what the command fills in
    assert [line for line in text.splitlines() if re.search(r"\d", line)] == []


def test_the_page_has_the_numbers_of_the_law():
    law, page = lawfile.read(HERE / "law.json"), (HERE / "README.md").read_text()
    ratio = law.family("reasoning").ratio
    assert f"alpha / beta = **{ratio['value']:.2f}**" in page
    assert f"[{ratio['low']:.2f}, {ratio['high']:.2f}]" in page
    assert "{" not in page
    for picture in re.findall(r"\]\((figures/[^)]+)\)", page):
        assert (HERE / picture).exists()


def test_published_exponents_are_compared_with_the_intervals():
    assert refit._verdict("x", 0.5, 0.4, 0.3, 0.6).endswith("| inside |")
    assert refit._verdict("x", 0.7, 0.4, 0.3, 0.6).endswith("| **outside** |")


def test_the_study_uses_the_data_as_released():
    rows = (HERE / "published_scores.csv").read_text().splitlines()
    released = "family,llm_params_billion,visual_tokens,mean_score,provenance_flag"
    assert rows[0] == f"{released},encoder,compressor,llm,harness"
    assert len(rows) == 57
    assert sum(1 for row in csv.DictReader(rows) if row["provenance_flag"]) == 4
