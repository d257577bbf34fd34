# ruff: noqa: E501, SIM905  (a scorer stands in one line, as do words)
"""Makes `metrics/compared.json.gz`: drawn answers, with what the scorers of the benchmarks return for them.

    python tests/golden/make_metrics.py REFERENCES

REFERENCES holds checkouts of GT-Vision-Lab/VQA (a013f00) as VQA, haotian-liu/LLaVA (c121f04) as LLaVA,
MMMU-Benchmark/MMMU (bb0b95a) as MMMU, lupantech/MathVista (53d5258) as MathVista and google-research/big_vision
(0127fb6) as big_vision, and the unpacked wheels of lmms-eval 0.7.3 as lmms_eval and ms-vlmeval 0.0.20 as vlmeval. Their
scoring functions are run; what else they import is replaced by empty modules. Needs pandas.
"""

import ast
import contextlib
import gzip
import importlib.util
import io
import json
import random
import re
import string
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

EACH = 40  # items of each scorer
OUT = Path(__file__).parent / "metrics" / "compared.json.gz"
ABSENT = (
    "loguru requests datasets Levenshtein rich rich.logging utilities editdistance tqdm big_vision"
    " big_vision.evaluators big_vision.evaluators.common big_vision.pp big_vision.pp.tokenizer big_vision.utils vlmeval"
    " vlmeval.smp vlmeval.smp.log lmms_eval lmms_eval.tasks lmms_eval.tasks._task_utils"
    " lmms_eval.tasks._task_utils.file_utils"
).split()
WORDS = [
    *(
        "yes no Yes No NO not a an the A B C D E Z (A) (B) B. (C). D) A: :B C, two none ten One 1 2 3.5 5. .5 1,000 1,,000 12%"
        " $5.99 -3 1e3 cat dog rabbit Dont dont Ive cat's 's somebodyd red blue-green a/b t-shirt x.y ... ? ! , ; . answer is"
        ' so = therefore result 0.33 ß É Ａ ２ ² **B** [C] nan inf 1_000 eyes know y n unanswerable \\frac{a}{b} _ " ` @ + <'
    ).split(),
    "The answer is B.",
    "the correct option is",
    "\n",
    "\t",
    "  ",
    "Failed to obtain answer via API",
]
OPTIONS = ["cat", "dog", "rabbit", "teddy bear", "date", "cherry", "A", "1", "red", "no"]


class Absent(types.ModuleType):
    """A module whose every attribute is a function that returns None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return sys.modules.get(f"{self.__name__}.{name}", lambda *args, **kwargs: None)


def module(path: Path, name: str) -> Any:
    """The file as a module; Python 2's print statements become calls."""
    source = re.sub(r'^(\s*)print "(.*)"$', r'\1print("\2")', path.read_text(), flags=re.MULTILINE)
    loaded = types.ModuleType(name)
    loaded.__file__, sys.modules[name] = str(path), loaded
    exec(compile(source, str(path), "exec"), loaded.__dict__)
    return loaded


def functions(path: Path, *names: str, **given: Any) -> Any:
    """Some functions of a file whose imports are many."""
    scope = dict(given)
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name in names:
            node.decorator_list = []
            exec(compile(ast.Module([node], []), str(path), "exec"), scope)
    return types.SimpleNamespace(**{name: scope[name] for name in names})


def text(rng: random.Random, most: int = 3) -> str:
    words = [rng.choice(WORDS) + rng.choice(["", " ", " ", " ", ".", ", ", "\n"]) for _ in range(rng.randint(0, most))]
    return "".join(words)


def near(rng: random.Random, one: str) -> str:
    """The text, or one like it."""
    index = rng.randrange(len(one)) if one else 0
    changes = [
        one,
        one,
        one.upper(),
        one.lower(),
        f"{one}.",
        f"{one} ",
        f"{one}!",
        one[:index] + one[index + 1 :],
        text(rng),
    ]
    return rng.choice(changes)


def annotated(rng: random.Random) -> tuple[str, list[str]]:
    """An answer and those of ten annotators."""
    base = text(rng)
    answers = [base] * 10 if rng.random() < 0.3 else [near(rng, base) for _ in range(10)]
    return near(rng, base), answers


def cases(root: Path, rng: random.Random) -> Iterator[tuple[str, str, str, Callable[[], tuple[Any, Any, dict, Any]]]]:
    """(benchmark, flavour, source, draw an item and run the scorer on it)."""
    tasks, kit = root / "lmms_eval/lmms_eval/tasks", root / "vlmeval/vlmeval"
    shared = tasks / "_task_utils"
    module(shared / "vqa_eval_metric.py", "lmms_eval.tasks._task_utils.vqa_eval_metric")
    mcq = module(shared / "mcq_extract.py", "lmms_eval.tasks._task_utils.mcq_extract")
    lmms = {name: module(tasks / name / "utils.py", name) for name in ("vqav2", "vizwiz_vqa", "pope", "mme", "scienceqa", "seedbench", "ocrbench", "chartqa")}  # fmt: skip
    mmbench = module(tasks / "mmbench/mmbench_evals.py", "mmbench").MMBench_Evaluator()
    api = functions(root / "lmms_eval/lmms_eval/api/metrics.py", "anls", "levenshtein_distance", "exact_match_hf_evaluate", np=np, string=string, re=re)  # fmt: skip
    for name in ("editdistance", "Levenshtein"):
        sys.modules[name].eval = sys.modules[name].distance = api.levenshtein_distance  # type: ignore[attr-defined]
    smp = functions(kit / "smp/misc.py", "process_punctuation", "istype")
    sys.modules["vlmeval.smp"].__dict__.update(vars(smp))
    kit_vqa = module(kit / "dataset/utils/vqa_eval.py", "kit_vqa")
    kit_match = module(kit / "utils/matching_util.py", "kit_match")
    kit_yes = functions(kit / "dataset/utils/yorn.py", "YOrN_Extraction", process_punctuation=smp.process_punctuation)
    vqa = module(root / "VQA/PythonEvaluationTools/vqaEvaluation/vqaEval.py", "vqa_eval")
    m4c = module(root / "LLaVA/llava/eval/m4c_evaluator.py", "m4c")
    m4c.tqdm = lambda values: values
    mmmu = module(root / "MMMU/mmmu/utils/eval_utils.py", "mmmu")
    mmmu_lmms = module(shared / "mmmu_mcq_utils.py", "mmmu_lmms")
    mathvista = module(root / "MathVista/evaluation/calculate_score.py", "mathvista")
    transfers = root / "big_vision/big_vision/evaluators/proj/paligemma/transfers"
    bv_vqa, bv_chart = module(transfers / "vqa.py", "bv_vqa"), module(transfers / "chartqa.py", "bv_chart")
    evalai = m4c.EvalAIAnswerProcessor()

    def official(prediction: str, answers: list[str]) -> float:
        annotations = [{"answer": answer, "answer_id": i} for i, answer in enumerate(answers)]
        truth = types.SimpleNamespace(qa={0: {"answers": annotations, "question_type": "", "answer_type": ""}})
        truth.getQuesIds = lambda: [0]
        scorer = vqa.VQAEval(truth, types.SimpleNamespace(qa={0: {"answer": prediction}}), n=12)
        with contextlib.redirect_stdout(io.StringIO()):
            scorer.evaluate()
        return scorer.accuracy["overall"] / 100

    def of_answers(run: Callable[[str, list[str]], Any]) -> Callable[[], tuple[Any, Any, dict, Any]]:
        def draw() -> tuple[Any, Any, dict, Any]:
            prediction, answers = annotated(rng)
            return prediction, answers, {}, run(prediction, list(answers))

        return draw

    def of_text(run: Callable[[str], Any], *starts: str) -> Callable[[], tuple[Any, Any, dict, Any]]:
        def draw() -> tuple[Any, Any, dict, Any]:
            prediction = rng.choice(
                [*(near(rng, start) + rng.choice(["", " ", ", ", text(rng)]) for start in starts), text(rng)]
            )
            return prediction, [], {}, run(prediction)

        return draw

    def of_pair(run: Callable[[str, str], Any]) -> Callable[[], tuple[Any, Any, dict, Any]]:
        def draw() -> tuple[Any, Any, dict, Any]:
            answer = text(rng, 2) or "x"
            prediction = near(rng, answer)
            return prediction, [answer], {}, run(prediction, answer)

        return draw

    def of_letter(run: Callable[[str, str], Any]) -> Callable[[], tuple[Any, Any, dict, Any]]:
        def draw() -> tuple[Any, Any, dict, Any]:
            letter = rng.choice("ABCD")
            prediction = rng.choice([text(rng), near(rng, letter), near(rng, f"{letter}. {text(rng)}")])
            return prediction, [letter], {}, run(prediction, letter)

        return draw

    def of_options(run: Callable[[str, dict], Any], longest: int = 3) -> Callable[[], tuple[Any, Any, dict, Any]]:
        def draw() -> tuple[Any, Any, dict, Any]:
            options = dict(zip("ABCD", rng.sample(OPTIONS, rng.randint(2, 4)), strict=False))
            prediction = rng.choice([text(rng, longest), f"it is {rng.choice(list(options.values()))} {text(rng)}"])
            random.seed(0)  # the MMMU parsers draw a letter where they read none
            return prediction, options, {}, run(prediction, dict(options))

        return draw

    def formula() -> tuple[Any, Any, dict, Any]:
        prediction, answers = annotated(rng)
        dataset = rng.choice(["HME100k", "IIIT5K"])
        doc = {"answer": answers[:2], "dataset": dataset, "question_type": ""}
        score = lmms["ocrbench"].ocrbench_process_results(doc, [prediction])["ocrbench_accuracy"]["score"]
        return prediction, answers[:2], {"dataset": dataset}, score

    def mathematics() -> tuple[Any, Any, dict, Any]:
        kind = rng.choice(["text", "integer", "float", "list"])
        choices = rng.sample(OPTIONS, 3) if kind == "text" else None
        extra = {"choices": choices, "question_type": "multi_choice" if choices else "free_form", "answer_type": kind, "precision": rng.randint(0, 2)}  # fmt: skip
        prediction = rng.choice([text(rng), str(rng.random() * 10), str(rng.randint(-5, 50))])
        value = mathvista.normalize_extracted_answer(
            prediction, choices, extra["question_type"], kind, extra["precision"]
        )
        answer = rng.choice([str(value), text(rng)])
        return prediction, [answer], extra, float(mathvista.safe_equal(value, answer))

    def exact(prediction: str, answer: str) -> float:
        return float(api.exact_match_hf_evaluate([prediction.strip()], [answer], ignore_case=True, ignore_punctuation=True)["exact_match"])  # fmt: skip

    def lmms_vqav2(prediction: str, answers: list[str]) -> float:
        doc = {"answers": [{"answer": answer, "answer_id": i} for i, answer in enumerate(answers)], "question_id": 0}
        return lmms["vqav2"].vqav2_process_results(doc, [prediction])["exact_match"]

    def plain(prediction: str) -> str:
        return prediction.replace("\n", " ").replace("\t", " ").strip()

    empty = types.SimpleNamespace(getQuesIds=list)
    norm = vqa.VQAEval(empty, empty)
    text_vqa = m4c.TextVQAAccuracyEvaluator()
    yield "vqav2", "official", "VQA", of_answers(official)
    yield "vqav2", "llava", "LLaVA", of_answers(lambda p, a: official(evalai(p), a))
    yield "vqav2", "lmms-eval", "lmms-eval", of_answers(lmms_vqav2)
    yield (
        "textvqa",
        "llava",
        "LLaVA",
        of_answers(lambda p, a: text_vqa.eval_pred_list([{"pred_answer": p, "gt_answers": a}])),
    )
    yield (
        "textvqa",
        "vlmevalkit",
        "vlmeval",
        of_answers(lambda p, a: float(np.mean(kit_vqa.process_line({"answer": repr(a), "prediction": p})["match"]))),
    )
    yield (
        "vizwiz",
        "lmms-eval",
        "lmms-eval",
        of_answers(
            lambda p, a: lmms["vizwiz_vqa"].vizwiz_vqa_process_results({"answers": a, "question_id": 0}, [p])[
                "exact_match"
            ]
        ),
    )
    yield (
        "vqa_normalise",
        "official",
        "VQA",
        of_text(lambda p: norm.processDigitArticle(norm.processPunctuation(plain(p)))),
    )
    yield "vqa_normalise", "llava", "LLaVA", of_text(evalai)
    yield "vqa_normalise", "vlmevalkit", "vlmeval", of_text(kit_vqa.process_answer)
    yield "gqa", "lmms-eval", "lmms-eval", of_pair(exact)
    yield "pope_parse", "vlmevalkit", "vlmeval", of_text(kit_yes.YOrN_Extraction, "yes", "no")
    yield "mme_parse", "lmms-eval", "lmms-eval", of_text(lmms["mme"].parse_pred_ans, "yes", "no")
    yield (
        "scienceqa",
        "lmms-eval",
        "lmms-eval",
        of_letter(
            lambda p, letter: lmms["scienceqa"].sqa_process_results(
                {"choices": "abcd", "answer": "ABCD".index(letter)}, [p]
            )["exact_match"]
        ),
    )
    yield (
        "seed",
        "lmms-eval",
        "lmms-eval",
        of_letter(
            lambda p, letter: lmms["seedbench"].seed_aggregation_result(
                [
                    lmms["seedbench"].seed_process_result(
                        {"answer": letter, "data_type": "image", "question_id": 0}, [p]
                    )["seed_all"]
                ]
            )
        ),
    )
    yield "mmbench_extract", "lmms-eval", "lmms-eval", of_options(mmbench.can_infer)
    yield "mmbench_extract", "vlmevalkit", "vlmeval", of_options(kit_match.can_infer)
    yield (
        "mcq_fallback",
        "lmms-eval",
        "lmms-eval",
        of_options(lambda p, options: mcq.extract_mcq_answer(p, list(options)) or False),
    )
    yield (
        "mmmu_mc",
        "official",
        "MMMU",
        of_options(lambda p, options: mmmu.parse_multi_choice_response(p, list(options), options), 8),
    )
    yield (
        "mmmu_mc",
        "lmms-eval",
        "lmms-eval",
        of_options(lambda p, options: mmmu_lmms.parse_mmmu_multi_choice_response(p, list(options), options), 8),
    )
    yield "mmmu_open", "official", "MMMU", of_pair(lambda p, a: float(mmmu.eval_open(a, mmmu.parse_open_response(p))))
    yield "mathvista", "official", "MathVista", mathematics
    yield "chartqa", "lmms-eval", "lmms-eval", of_pair(lambda p, a: float(lmms["chartqa"].relaxed_correctness(p, a)))
    yield "chartqa", "big_vision", "big_vision", of_pair(lambda p, a: float(bv_chart._relaxed_match(a, p)))
    yield "docvqa_anls", "lmms-eval", "lmms-eval", of_answers(lambda p, a: float(api.anls(a, [p])["anls"]))
    yield (
        "docvqa_anls",
        "big_vision",
        "big_vision",
        of_answers(lambda p, a: float(max(bv_vqa.anls_metric(one, p) for one in a))),
    )
    yield "ocrbench", "lmms-eval", "lmms-eval", formula


def main(root: Path) -> None:
    warnings.simplefilter("ignore")
    sys.modules.update(
        {name: Absent(name) for name in ABSENT if importlib.util.find_spec(name.split(".")[0]) is None or "." in name}
    )
    sys.modules["loguru"].logger = types.SimpleNamespace(info=str, error=str)  # type: ignore[attr-defined]
    sys.modules["vlmeval.smp.log"].get_logger = lambda name: None  # type: ignore[attr-defined]
    rng, rows = random.Random(0), []
    for benchmark, flavour, source, draw in cases(root, rng):
        for _ in range(EACH):
            prediction, references, extra, score = draw()
            score = score if isinstance(score, str | bool) else round(float(score), 9)
            rows.append([benchmark, flavour, source, prediction, references, extra, score])
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    OUT.write_bytes(gzip.compress(lines.encode(), mtime=0))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
