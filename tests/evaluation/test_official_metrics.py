"""Metrics against the official scorers: each line of vectors.jsonl is what the scorer named in `source` returned."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import vlm_jax
from vlm_jax.core.errors import UserError
from vlm_jax.evaluation.metrics import choices

GOLDEN = Path(__file__).parents[1] / "golden" / "metrics"
VECTORS = [json.loads(line) for line in (GOLDEN / "vectors.jsonl").read_text().splitlines()]
COMPARED = [json.loads(line) for line in gzip.decompress((GOLDEN / "compared.json.gz").read_bytes()).splitlines()]
SCIENCEQA = json.loads((GOLDEN / "golden_sqa_llava15_13b.json").read_text())


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: f"{v['benchmark']}-{v['flavour']}-{v['prediction']!r:.30}")
def test_every_scorer_vector(vector: dict[str, Any]) -> None:
    got = vlm_jax.score(
        vector["benchmark"], vector["prediction"], vector["references"], flavour=vector["flavour"], **vector["extra"]
    )
    expected = vector["score"]
    assert got == (expected if isinstance(expected, str | bool) else pytest.approx(expected, abs=1e-6))


def scored(benchmark: str, flavour: str, prediction: Any, references: Any, extra: dict[str, Any]) -> Any:
    if benchmark == "mcq_fallback":  # lmms-eval's second rule for MMBench
        return choices.mmbench_fallback(prediction, list(references)) or False
    return vlm_jax.score(benchmark, prediction, references, flavour, **extra)


@pytest.mark.parametrize("kind", sorted({(row[0], row[1]) for row in COMPARED}), ids="-".join)
def test_drawn_answers_score_as_the_scorers_say(kind: tuple[str, str]) -> None:
    """Some 40 answers for each scorer, most of them nasty; `golden/make_metrics.py` ran the scorers on them."""
    rows = [row for row in COMPARED if (row[0], row[1]) == kind]
    found = [scored(benchmark, flavour, *item) for benchmark, flavour, _, *item, _ in rows]
    expected = [value if isinstance(value, str | bool) else pytest.approx(value, abs=1e-6) for *_, value in rows]
    assert found == expected


def test_published_scienceqa_answers_of_llava_13b() -> None:
    """LLaVA's repository publishes the answers and their score: 74.39, and 71.64 of the questions with an image."""
    hits = [vlm_jax.score("scienceqa", text, [truth], choices=5) for _, text, _, truth, _ in SCIENCEQA["rows"]]
    on_image = [hit for hit, row in zip(hits, SCIENCEQA["rows"], strict=True) if row[4]]
    assert round(100 * sum(hits) / len(hits), 2) == 74.39
    assert round(100 * sum(on_image) / len(on_image), 2) == 71.64


@pytest.mark.parametrize(("matches", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_leaves_one_annotator_out(matches: int, expected: float) -> None:
    """The mean over subsets of nine annotators of min(1, matches / 3)."""
    answers = ["blue"] * matches + ["red"] * (10 - matches)
    assert vlm_jax.score("vqav2", "blue", answers) == pytest.approx(expected)


def test_unanimous_answers_are_compared_as_they_are() -> None:
    assert vlm_jax.score("vqav2", "Yes.", ["yes"] * 10) == 0
    assert vlm_jax.score("vqav2", "Yes.", ["yes"] * 9 + ["no"]) == 1


def test_a_random_letter_is_scored_by_its_expectation() -> None:
    options = ["apple", "banana", "cherry", "date"]
    assert vlm_jax.score("mmmu", "unreadable", ["B"], options=options) == 1 / 4
    assert vlm_jax.score("mmmu_mc", "unreadable", dict(zip("ABCD", options, strict=True)), answer="B") == 1 / 4
    assert vlm_jax.score("mmmu", "(B)", ["B"], options=options) == 1
    assert vlm_jax.score("mmmu", "it is 0.5", ["0.5"]) == 1  # without options: an open question


def test_circular_evaluation_needs_all_rotations() -> None:
    answers, texts, groups = ["A", "B", "C", "A"], ["A", "B", "C", "B"], [1, 2, 1, 2]
    assert vlm_jax.score("mmbench_circular", texts, answers, groups=groups) == 1 / 2


def test_mme_scores_images_and_questions() -> None:
    """acc = 3/4, acc+ = 1/2, and their sum in percent."""
    got = vlm_jax.score("mme_agg", ["yes", "no", "Yes.", "yes"], ["yes", "no", "yes", "no"])
    assert got == {"acc": 0.75, "acc_plus": 0.5, "score": 125.0}
    with pytest.raises(UserError, match="expected 2 questions an image, got 1"):
        vlm_jax.score("mme_agg", ["yes"], ["yes"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("vqav", "a", ["a"]), "unknown benchmark 'vqav': did you mean 'vqav2'"),
        (("vqav2", "a", ["a"], "lmms"), "unknown flavour 'lmms': did you mean 'lmms-eval'"),
        (("vqav2", 3, ["a"]), "prediction: expected a text, got 3"),
        (("vqav2", "a", "a"), "references: expected a list of texts"),
        (("vqav2", "a", []), "references: expected at least one"),
        (("pope_agg", "yes", ["yes"]), "expected a list of texts, got 'yes'"),
        (("pope_agg", ["yes"], ["yes", "no"]), "expected 1, as predictions, got 2"),
        (("mmmu_mc", "A", {}), "expected a dict from letters to options"),
    ],
)
def test_bad_items_are_one_line(args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        vlm_jax.score(*args)


def test_scoring_imports_no_jax() -> None:
    code = "import sys, vlm_jax; vlm_jax.score('gqa', 'yes', ['yes']); sys.exit('jax' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(vlm_jax.__file__).parents[1], check=False).returncode == 0
    )


@pytest.mark.parametrize(
    ("benchmark", "answers", "references", "extra"),
    [
        ("mmbench_circular", ["A", "B"], ["A", "B"], {"groups": [[1], [1]]}),
        ("mme_agg", ["yes", "no"], ["yes", "no"], {"images": 3}),
        ("scienceqa", "A", ["A"], {"choices": None}),
        ("seed_agg", ["A"], ["A"], {"types": 3}),
    ],
)
def test_a_field_of_another_form_is_one_line(benchmark: str, answers: Any, references: Any, extra: Any) -> None:
    with pytest.raises(UserError, match=rf"{benchmark}: expected the fields .* got {next(iter(extra))}"):
        vlm_jax.score(benchmark, answers, references, **extra)
