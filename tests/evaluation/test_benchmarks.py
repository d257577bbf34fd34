# ruff: noqa: E501  (a row of a table of cases stands in one line)
"""Benchmarks in the layouts that people hold: the published prompts, one content in all layouts, official aggregates."""

import dataclasses
import json
import shutil
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Callable
from pathlib import Path

import benchmark_files
import numpy as np
import pytest
from benchmark_files import LETTER, SHORT, UNANSWERABLE

from vlm_jax.core.errors import UserError
from vlm_jax.data.images import read_image
from vlm_jax.evaluation import benchmarks, submissions, suite_scores, suites
from vlm_jax.evaluation.answers import Answer
from vlm_jax.evaluation.benchmarks import files
from vlm_jax.evaluation.benchmarks.items import Answered, Item, Loaded, SuiteOptions
from vlm_jax.evaluation.suite_scores import BenchmarkScore

LLAVA, LMMS = suites.SUITES["quecc"].options, suites.SUITES["ocr"].options
# The second item of each benchmark of `benchmark_files`, as LLaVA and as lmms-eval 0.7.3 ask it (the latter is the
# output of its doc_to_text on these rows).
PROMPTS = {
    "ai2d": ("Which is 1?\nA. leaf\nB. root\nC. stem\nD. bud" + LETTER,) * 2,
    "chartqa": ("How many?" + SHORT, "How many?\nAnswer the question with a single word."),
    "docvqa": ("What is the date?" + SHORT,) * 2,
    "easy_vqa": ("is there a red shape?" + SHORT,) * 2,
    "gqa": ("What is it?" + SHORT,) * 2,
    "infovqa": ("Which country?" + SHORT,) * 2,
    "mathvista": (
        "How long? (Unit: m)\nAnswer the question using a single floating-point number with one decimal place.",
    )
    * 2,
    "mmbench": (
        "Look.\nWhat is it?\nA. a dog\nB. a cat" + LETTER,
        "Look. What is it? There are several options:\nA. a dog\nB. a cat\n" + LETTER,
    ),
    "mme": ("Is it ten?" + SHORT,) * 2,
    "mmmu": ("How far? <image 1>\n" + SHORT,) * 2,
    "ocrbench": ("Write the formula.",) * 2,
    "own": ("who?",) * 2,
    "pope": ("Is there a dog in the imange?" + SHORT, "Is there a dog in the image?" + SHORT),
    "scienceqa": ("Which is 2?\nA. one\nB. two" + LETTER,) * 2,
    "seed": ("Which is 1?\nA. one\nB. two\nC. three\nD. four" + LETTER,) * 2,
    "textvqa": ("What is the brand 1?\nReference OCR token: " + SHORT, "What is the brand 1?" + SHORT),
    "vizwiz": ("What is this?" + UNANSWERABLE + SHORT,) * 2,
    "vqav2": ("How many in 1?" + SHORT,) * 2,
}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return benchmark_files.write(tmp_path_factory.mktemp("benchmarks"))


def load(name: str, folder: Path, options: SuiteOptions = LLAVA) -> Loaded:
    return benchmarks.load(benchmarks.find(name), folder, options)


def scored(name: str, loaded: Loaded, text: Callable[[Item], str], options: SuiteOptions = LLAVA) -> BenchmarkScore:
    answers = {item.id: Answer(item.question_id, item.prompt, text(item)) for item in loaded.items}
    return suite_scores.score(benchmarks.find(name), loaded, answers, options)


def hub(name: str, data: Path) -> Path:
    """Some are not lmms-lab's."""
    return data if name in ("mathvista", "easy_vqa", "own") else data / "lmms-lab"


@pytest.mark.parametrize("name", benchmarks.BENCHMARKS)
def test_prompts_are_the_published_ones(data: Path, name: str) -> None:
    assert load(name, data, LLAVA).items[1].prompt == PROMPTS[name][0]
    assert load(name, hub(name, data), LMMS).items[1].prompt == PROMPTS[name][1]


@pytest.mark.parametrize(
    "name", sorted({*benchmarks.BENCHMARKS} - {"ai2d", "mmmu", "mathvista", "vizwiz", "easy_vqa", "own"})
)
def test_layouts_have_one_content(data: Path, name: str) -> None:
    """The parquet repository and the folder of LLaVA or the publisher, asked in one style."""
    options = dataclasses.replace(LMMS, scienceqa="all", seed="all")
    one, other = load(name, data, options), load(name, data / "lmms-lab", options)
    assert one.layout != other.layout

    def content(loaded: Loaded) -> set[tuple[str, ...]]:
        spelt = (item._replace(prompt=item.prompt.replace("imange", "image")) for item in loaded.items)
        return {(item.prompt.replace("? \n", "?\n"), *item.references) for item in spelt}

    assert content(one) == content(other)


@pytest.mark.parametrize("name", benchmarks.BENCHMARKS)
@pytest.mark.parametrize("options", [LLAVA, LMMS], ids=["llava", "lmms-eval"])
def test_true_answers_have_the_full_score_and_none_has_little(data: Path, name: str, options: SuiteOptions) -> None:
    loaded = load(name, hub(name, data) if options is LMMS else data, options)
    full = scored(name, loaded, lambda item: item.references[0], options)
    assert full.score == pytest.approx(
        0.6 if name in ("vqav2", "textvqa", "vizwiz") and full.score < 1 else 1, abs=0.41
    )
    assert full.score > 0.59
    assert full.parse_failures == 0
    nothing = scored(name, loaded, lambda item: "", options)
    assert nothing.score <= 0.51  # POPE reads "" as yes
    assert nothing.parse_failures == 1


@pytest.mark.parametrize("name", benchmarks.BENCHMARKS)
def test_every_image_can_be_read(data: Path, name: str) -> None:
    for folder in (data, hub(name, data)):
        for item in load(name, folder, LMMS).items:
            for image in item.images:
                assert read_image(files.read_image(image)).shape == (24, 32, 3)


def test_a_parquet_image_is_that_of_its_row(data: Path) -> None:
    """Rows are in several row groups, and lists hold several images."""
    for item in load("ai2d", data / "lmms-lab", LMMS).items:
        assert files.read_image(item.images[0]) == benchmark_files.png(int(item.id))
    video = load("seed", data / "lmms-lab", dataclasses.replace(LMMS, seed="all")).items[-1]
    assert [files.read_image(image) for image in video.images] == [benchmark_files.png(4), benchmark_files.png(5)]


def test_pope_matches_labels_by_image_and_question(data: Path, tmp_path: Path) -> None:
    """The labels' order does not matter, nor "imange"; the true answers of the other order would be wrong."""
    loaded = load("pope", data)
    assert [item.references[0] for item in loaded.items[:3]] == ["no", "no", "yes"]
    assert loaded.items[2].prompt == "Is there a cat in the imange?" + SHORT


def test_pope_is_the_mean_f1_of_its_subsets(data: Path) -> None:
    """One true positive and one false positive in each subset: precision 1/2, recall 1, F1 2/3."""
    loaded = load("pope", data)
    answer_of = lambda item: "no" if "cup" in item.prompt else "yes"  # noqa: E731
    one = scored("pope", loaded, answer_of)
    assert one.score == pytest.approx(2 / 3)
    assert one.sub_scores["random/precision"] == 0.5
    assert scored("pope", loaded, answer_of, dataclasses.replace(LLAVA, pope="accuracy")).score == pytest.approx(2 / 3)
    yes = scored("pope", loaded, lambda item: "yes")
    assert yes.score == pytest.approx(1 / 2)
    assert yes.baselines == {"chance": 0.5, "always_yes": 2 / 3}


def test_mme_is_points_of_two_thousand(data: Path) -> None:
    """Always yes: acc 1/2 and acc+ 0 in each subtask, 50 of 200 points."""
    one = scored("mme", load("mme", data), lambda item: "Yes")
    assert one.score == pytest.approx(50 / 200)
    assert one.sub_scores == {"perception": 100.0, "cognition": 0.0, "artwork": 50.0, "count": 50.0}


def test_mmbench_needs_all_rotations(data: Path) -> None:
    """Always A: the first question is right in one of its two orders, the second is wrong."""
    loaded = load("mmbench", data)
    one = scored("mmbench", loaded, lambda item: "A")
    assert (one.score, one.sub_scores["vanilla"]) == (0.0, 0.5)
    assert one.baselines["chance"] == pytest.approx((1 / 4 + 1 / 2) / 2)
    right = scored("mmbench", loaded, lambda item: item.references[0] if item.id != "252" else "A")
    assert right.score == 0.5


def test_gqa_and_mmmu_sub_scores_are_group_means(data: Path) -> None:
    one = scored("gqa", load("gqa", data), lambda item: "yes")
    assert one.sub_scores["structural/verify"] == 1
    assert one.sub_scores["form/open"] == 0
    unreadable = scored("mmmu", load("mmmu", data), lambda item: "unreadable" if item.images[1:] else "24")
    assert unreadable.sub_scores["discipline/Art and Design"] == 1 / 2  # the expectation of a random letter
    assert unreadable.score == 3 / 4


def test_a_question_that_is_listed_twice_counts_twice(data: Path) -> None:
    """As in LLaVA's list of SEED-Bench."""
    assert [item.id for item in load("seed", data).items] == ["49914", "101670", "49914 (2)"]


def test_hidden_answers_give_a_submission(data: Path, tmp_path: Path) -> None:
    loaded = load("vqav2", data / "testdev")
    one = scored("vqav2", loaded, lambda item: "Two Dogs.")
    assert (one.score, one.split) == (None, "testdev")
    answers = {item.id: Answer(item.question_id, item.prompt, "Two Dogs.") for item in loaded.items}
    path = submissions.write("vqav2", loaded, answers, data / "testdev", tmp_path)
    expected = [(7, "2 dogs"), (8, "2 dogs"), (99, "")]  # question 99 is in test2015 only
    assert json.loads(path.read_text()) == [{"question_id": key, "answer": text} for key, text in expected]
    loaded = load("vizwiz", data / "test")
    answers = {item.id: Answer(item.question_id, item.prompt, "a cat") for item in loaded.items}
    path = submissions.write("vizwiz", loaded, answers, data / "test", tmp_path)
    assert json.loads(path.read_text())[1] == {"image": "VizWiz_test_00000001.jpg", "answer": "cat"}


def test_mmbench_submits_a_spreadsheet(data: Path, tmp_path: Path) -> None:
    loaded = load("mmbench", data)
    answers = {item.id: Answer(item.question_id, item.prompt, "B & <C>") for item in loaded.items}
    path = submissions.write("mmbench", loaded, answers, data, tmp_path)
    with zipfile.ZipFile(path) as archive:
        assert "[Content_Types].xml" in archive.namelist()
        sheet = ET.fromstring(archive.read("xl/worksheets/sheet1.xml"))
    space = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
    rows = [["".join(cell.itertext()) for cell in row] for row in sheet.iter(f"{space}row")]
    assert rows[0] == ["index", "question", "A", "B", "C", "D", "prediction", "answer"]
    assert rows[2] == ["1000241", "What is it?", "a dog", "a cat", "", "", "B & <C>", "B"]


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gqa", lambda p: (p / "gqa/data/testdev_balanced_questions.json").unlink(), "gqa: expected the files of one layout in .*gqa, looked for GQA: data/testdev_balanced_questions.json or .*lmms-lab: testdev_balanced_instructions"),
        ("gqa", lambda p: (p / "gqa/data/testdev_balanced_questions.json").write_text('{"0": '), r"testdev_balanced_questions.json: not valid JSON"),
        ("gqa", lambda p: (p / "gqa/data/testdev_balanced_questions.json").write_text("{}"), "3 of 3 questions have no answer in .*, the first is '0'"),
        ("gqa", lambda p: (p / "gqa/data/testdev_balanced_questions.json").write_text('{"0":{},"1":{},"2":{}}'), "not of the form of their layout .KeyError: 'imageId'.: download"),
        ("gqa", lambda p: (p / "gqa/data/images/n1.jpg").unlink(), "1 of 2 images are missing, the first is .*n1.jpg"),
        ("gqa", lambda p: append(p / "gqa/llava_gqa_testdev_balanced.jsonl", '{"question_id": "0", "text": ""}\n'), "expected unique ids, got '0' twice"),
        ("gqa", lambda p: append(p / "gqa/llava_gqa_testdev_balanced.jsonl", "{\n"), "llava_gqa_testdev_balanced.jsonl:4: not valid JSON"),
        ("textvqa", lambda p: (p / "textvqa/TextVQA_0.5.1_val.json").write_text('{"data": []}'), "3 of 3 questions have no answer"),
        ("vqav2", lambda p: (p / "vqav2/v2_mscoco_val2014_annotations.json").write_text('{"annotations": []}'), "3 of 3 questions have no answer"),
        ("pope", lambda p: (p / "pope/coco/coco_pope_random.json").write_text('{"question_id": 1, "image": "a"}\n'), "missing text, label"),
        ("mme", lambda p: (p / "MME/MME_Benchmark_release_version/count/0000.txt").write_text("Is it?\n"), "0000.txt:1: expected a question, a tab and Yes or No"),
        ("mmbench", lambda p: (p / "mmbench/mmbench_dev_20230712.tsv").write_text("index\tquestion\tA\tB\timage\n1\tq\ta\tb\t?\n"), "index 1: expected an image in base64"),
        ("scienceqa", lambda p: (p / "scienceqa/llava_test_CQM-A.json").write_text("[]"), "3 of 3 questions have no answer in .*llava_test_CQM-A.json"),
    ],
)  # fmt: skip
def test_bad_files_are_one_line(tmp_path: Path, name: str, change: Callable[[Path], object], message: str) -> None:
    next(writer for writer in benchmark_files.WRITERS if writer.__name__ == name)(tmp_path)
    shutil.rmtree(tmp_path / "lmms-lab")  # which would be read instead
    change(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        load(name, tmp_path)
    assert "\n" not in str(error.value)


def test_a_broken_parquet_is_one_line(tmp_path: Path) -> None:
    benchmark_files.ai2d(tmp_path)
    path = next(tmp_path.rglob("*.parquet"))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match="not a readable parquet file"):
        load("ai2d", tmp_path)
    benchmark_files.write_parquet(path, [{"question": "?", "answer": "0"}], {})
    files._open.cache_clear()
    with pytest.raises(UserError, match="missing options, image"):
        load("ai2d", tmp_path)


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown benchmark 'gpa': did you mean 'gqa'"):
        suites.find(None, ["gpa"], [])
    with pytest.raises(UserError, match="unknown suite 'quec': did you mean 'quecc'"):
        suites.find("quec", [], [])
    with pytest.raises(UserError, match="unknown benchmark of suite ocr 'gqa'"):
        suites.find("ocr", ["gqa"], [])
    with pytest.raises(UserError, match="unknown value of option mme '2800': valid: all, perception"):
        suites.find("quecc", [], ["mme=2800"])


def test_scores_do_not_depend_on_the_order_of_items(data: Path) -> None:
    for name in benchmarks.BENCHMARKS:
        loaded = load(name, data)
        answer_of = lambda item: item.references[0] if len(item.prompt) % 2 else "no"  # noqa: E731
        one, other = (
            scored(name, loaded._replace(items=items), answer_of) for items in (loaded.items, loaded.items[::-1])
        )
        assert one.score == pytest.approx(other.score)
        assert one.stderr == pytest.approx(other.stderr)


def test_the_standard_error_of_a_mean_f1_is_that_of_a_bootstrap_over_images() -> None:
    """400 images with three questions each, one in each subset."""
    rng = np.random.default_rng(0)
    options, answers = dataclasses.replace(LLAVA, pope="f1"), []
    for image in range(400):
        skill = rng.random()  # answers about one image are right together
        for subset in ("adversarial", "popular", "random"):
            truth = rng.choice(["yes", "no"])
            text = truth if rng.random() < skill else rng.choice(["yes", "no"])
            answers.append(
                Answered(Item("", "", "", (str(truth),), (), str(image), (), {"subset": subset}), str(text), 0.0)
            )
    _, stderr = suite_scores.mean_of_ratios(benchmarks.find("pope").parts(answers, options))
    parts = benchmarks.find("pope").parts(answers, options)
    by_image = [parts[i : i + 3] for i in range(0, len(parts), 3)]

    def f1(chosen: np.ndarray) -> float:
        return suite_scores.mean_of_ratios([part for i in chosen for part in by_image[i]])[0]

    bootstrap = np.std([f1(rng.integers(0, 400, 400)) for _ in range(300)])
    assert stderr == pytest.approx(bootstrap, rel=0.15)


def test_a_layout_with_answers_comes_before_one_without(data: Path, tmp_path: Path) -> None:
    """LLaVA's list of test-dev and the parquet files of validation in one folder, those in Hugging Face's cache."""
    shutil.copytree(data / "testdev/vqav2", tmp_path / "vqav2")
    assert load("vqav2", tmp_path).split == "testdev"
    shutil.copytree(data / "lmms-lab/VQAv2", tmp_path / "datasets--lmms-lab--VQAv2/snapshots/0f1e")
    assert load("vqav2", tmp_path).split == "validation"
