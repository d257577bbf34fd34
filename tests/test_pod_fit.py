"""The pod study: all numbers of its page are computed, and its claims hold for its rows."""

import re
from pathlib import Path

from experiments.pod_fit import sweep, table

HERE = Path(sweep.__file__).parent
# Names, not findings.
NAMES = (
    "SigLIP-So400m at 384 pixels", "float32", "bfloat16", "exit code 1",
    "compressor=resampler,pack=none,batch=256,encoder=siglip-so400m14-384,llm=qwen1.5-7b,tokens=16",
    "--topology v5e:16x16",
)  # fmt: skip


def test_the_template_has_no_literal_numbers() -> None:
    text = (HERE / "README.template.md").read_text()
    for name in NAMES:
        assert name in text
        text = text.replace(name, "")
    text = re.sub(r"\{[^}]*\}", "", text)  # what the command fills in
    assert [line for line in text.splitlines() if re.search(r"\d", line)] == []


def test_rows_are_cells_of_the_study_and_its_claims_hold() -> None:
    names = [name for cell in sweep.cells() for name in sweep.row_names(cell)]
    rows = {row["cell"]: row for row in sweep.read()}
    assert len(set(names)) == len(names)
    assert set(rows) <= set(names)
    judged = table.checks(rows, {})
    assert all(holds for _, holds in judged), judged
    page = (HERE / "README.md").read_text()
    assert "{" not in page
    for name in rows:
        assert table.figures_of(rows[name]).split(" · ")[0] in page, name


def test_state_falls_as_one_over_chips() -> None:
    """For the smallest model, where replicated vectors matter most."""
    few, many = (chips * table.state_bytes("qwen1.5-0.5b", chips) for chips in (16, 256))
    assert few <= many < (1 + table.TOLERANCE) * few
