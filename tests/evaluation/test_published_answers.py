"""Published models' answers, scored as their authors scored them, from files in the benchmarks' layouts.

POPE: LLaVA-1.5-13B, F1 .8446 (adversarial), .8714 (random), .8625 (popular), 85.9 in its paper. MME: LLaVA-1.5-7B,
1508.67 points of perception and 355.71 of cognition by MME's own tool.
"""

import gzip
import json
import random
from pathlib import Path

import pytest
from benchmark_files import SHORT, write_jsonl

from vlm_jax import evaluate

PUBLISHED = json.loads(
    gzip.decompress((Path(__file__).parents[1] / "golden/metrics/published_answers.json.gz").read_bytes())
)
SUBSETS = {"a": "adversarial", "p": "popular", "r": "random"}


def rescored(home: Path, name: str) -> dict:
    flags = ["--rescore", "--suite", "quecc", "--benchmarks", name, "--data", str(home), "--out", str(home / "out")]
    evaluate.main(flags)
    return json.loads((home / "out" / "scores.json").read_text())["answers"]["benchmarks"][name]


def test_pope_of_llava_13b(tmp_path: Path) -> None:
    """The labels are in another order than the questions, and spelt as in the current release."""
    labels: dict[str, list[dict]] = {subset: [] for subset in SUBSETS.values()}
    asked, answers = [], []
    for number, (letter, image, rest, text, label) in enumerate(PUBLISHED["pope_llava_13b"]["rows"], start=1):
        subset, file, question = SUBSETS[letter], f"COCO_val2014_{image:012d}.jpg", f"Is there a{rest}?"
        spelt = question.replace("imange", "image")
        row = {"question_id": number, "image": file, "text": spelt, "label": {"y": "yes", "n": "no"}[label]}
        labels[subset].append(row)
        asked.append({"question_id": number, "image": file, "text": question + SHORT, "category": subset})
        answers.append({"question_id": number, "prompt": question + SHORT, "text": text, "model_id": "llava-v1.5-13b"})
        (tmp_path / "pope/val2014").mkdir(parents=True, exist_ok=True)
        (tmp_path / "pope/val2014" / file).touch()
    for subset, rows in labels.items():
        random.Random(0).shuffle(rows)
        write_jsonl(tmp_path / f"pope/coco/coco_pope_{subset}.json", rows)
    write_jsonl(tmp_path / "pope/llava_pope_test.jsonl", asked)
    write_jsonl(tmp_path / "out/answers/pope.jsonl", answers)
    found = rescored(tmp_path, "pope")
    assert found["questions"] == 8910
    assert 100 * found["score"] == pytest.approx(85.95, abs=0.005)
    for subset, f1 in (("adversarial", 0.8446), ("random", 0.8714), ("popular", 0.8625)):
        assert found["sub_scores"][f"{subset}/f1_score"] == pytest.approx(f1, abs=5e-5)


def test_mme_of_llava_7b(tmp_path: Path) -> None:
    """Its run lacks 12 of the 1,187 images; the questions' texts do not matter."""
    tree, answers, count = tmp_path / "MME/MME_Benchmark_release_version", [], {}
    for task, image, truth, text in PUBLISHED["mme_llava_7b"]["rows"]:
        number = count[task, image] = count.get((task, image), 0) + 1
        (tree / task).mkdir(parents=True, exist_ok=True)
        (tree / task / f"{image}.jpg").touch()
        with open(tree / task / f"{image}.txt", "a") as file:
            file.write(f"Question {number}? Please answer yes or no.\t{truth}\n")
        prompt = f"Question {number}?{SHORT}"
        answers.append({"question_id": f"{task}/{image}.jpg", "prompt": prompt, "text": text})
    write_jsonl(tmp_path / "out/answers/mme.jsonl", answers)
    found = rescored(tmp_path, "mme")
    for name in ("perception", "cognition"):
        assert found["sub_scores"][name] == pytest.approx(PUBLISHED["mme_llava_7b"][name])
    assert 2000 * found["score"] == pytest.approx(found["sub_scores"]["perception"])
