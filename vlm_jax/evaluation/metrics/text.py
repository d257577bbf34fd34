"""Free-form answers: GQA, ChartQA, ANLS (DocVQA, InfographicVQA), OCRBench, MathVista, and MMMU's open questions."""

import re
import string
from collections.abc import Sequence
from typing import Any

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: " "}
HANDWRITTEN_MATHS = "HME100k"


def gqa(prediction: str, answer: str) -> float:
    """LLaVA's conversion (strip, no trailing periods, lower case), then GQA's own `eval.py`: equality."""
    return float(prediction.strip().rstrip(".").lower() == answer)


def exact_match(prediction: str, answer: str) -> float:
    """lmms-eval's `exact_match`: equality without case and ASCII punctuation, after its tasks strip the prediction."""
    return float(_bare(prediction.strip()) == _bare(answer))


def _bare(text: str) -> str:
    return text.lower().translate(_NO_PUNCTUATION)


def relaxed(prediction: str, answer: str) -> float:
    """ChartQA's relaxed accuracy: numbers within 5%, "12%" is 0.12; otherwise equality without case."""
    return _relaxed(prediction, answer, prediction.lower() == answer.lower())


def relaxed_cased(prediction: str, answer: str) -> float:
    """big_vision's: texts are compared with case."""
    return _relaxed(prediction, answer, prediction == answer)


def _relaxed(prediction: str, answer: str, is_equal: bool) -> float:
    got, expected = _number(prediction), _number(answer)
    if got is None or not expected:  # a target of 0 must be matched as text
        return float(is_equal)
    return float(abs(got - expected) / abs(expected) <= 0.05)


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def anls(prediction: str, answers: Sequence[str]) -> float:
    """ANLS of the Robust Reading Competition (its script is in QwenLM/Qwen-VL): 1 - distance / length, below .5 is 0.

    The edit distance is between texts without case and with single spaces, the length that of the longer text as given.
    """
    got = _spaced(prediction)
    shares = []
    for answer in answers:
        length = max(len(answer.upper()), len(prediction.upper()))
        shares.append(edit_distance(_spaced(answer), got) / length if length else 0.0)
    score = 1 - min(shares)
    return score if score >= 0.5 else 0.0


def anls_cased(prediction: str, answers: Sequence[str]) -> float:
    """big_vision's: with case and spaces, and exactly .5 is 0 too."""
    return max(_anls_cased(prediction, answer) for answer in answers)


def _anls_cased(prediction: str, answer: str) -> float:
    if not answer:
        return float(prediction == "")
    share = edit_distance(answer, prediction) / max(len(answer), len(prediction))
    return 1 - share if share < 0.5 else 0.0


def _spaced(text: str) -> str:
    return " ".join(text.lower().split())


def edit_distance(one: str, other: str) -> int:
    """Levenshtein distance."""
    previous = list(range(len(other) + 1))
    for i, char in enumerate(one, start=1):
        current = [i]
        for j, other_char in enumerate(other, start=1):
            substituted = previous[j - 1] + (char != other_char)
            current.append(min(substituted, previous[j] + 1, current[-1] + 1))
        previous = current
    return previous[-1]


def ocrbench(prediction: str, answers: Sequence[str], dataset: str) -> float:
    """Whether an answer is contained in the prediction, without case; handwritten formulas (HME100k) are compared with
    case and without spaces.
    """
    if dataset == HANDWRITTEN_MATHS:
        return float(any(_unspaced(answer) in _unspaced(prediction) for answer in answers))
    return float(any(_one_line(answer) in _one_line(prediction) for answer in answers))


def ocrbench_folded(prediction: str, answers: Sequence[str], dataset: str) -> float:
    """lmms-eval's: full-width characters count as their ASCII forms, except in formulas."""
    if dataset != HANDWRITTEN_MATHS:
        prediction, *answers = (text.translate(_FULL_WIDTH) for text in (prediction.strip(), *answers))
    return ocrbench(prediction, answers, dataset)


def _one_line(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


def _unspaced(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")


def mathvista_answer(
    extraction: str, choices: Sequence[str] | None, question_type: str | None, answer_type: str | None, precision: Any
) -> str | None:
    """An extracted answer in the form of MathVista's answers; None: not a number where one is expected.

    A choice is named by its letter, or is the closest in edit distance. The official pipeline has a GPT model extract
    the answer first; no model is called here, so the prediction itself is the extraction.
    """
    if question_type == "multi_choice":
        choices, text = list(choices or ()), extraction.strip()
        if letters := re.findall(r"\(([a-zA-Z])\)", text):
            text = letters[0].upper()
        letters = string.ascii_uppercase[: len(choices)]
        if len(text) == 1 and text in letters:
            return choices[letters.index(text)]
        return min(choices, key=lambda choice: edit_distance(text, choice), default=None)
    try:
        if answer_type == "integer":
            return str(int(float(extraction)))
        if answer_type == "float":
            return str(round(float(extraction), int(precision)))
    except (ValueError, OverflowError, TypeError):
        return None
    return extraction


# MMMU's open questions. A response gives candidates: the ends of sentences after words such as "is", and their numbers.
_CUES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = tuple(":,.!?;'")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def mmmu_open(response: str, answers: Sequence[str]) -> float:
    """Whether a candidate number equals an answer, or a candidate text contains one (MMMU `eval_utils.py`)."""
    parts = _mmmu_parts(response)
    texts = parts + [number for part in parts for pattern in _NUMBERS for number in pattern.findall(part)]
    candidates = [value for text in texts for value in _mmmu_values(text)]
    expected = [value for answer in answers for value in _mmmu_values(answer)]
    return float(any(_mmmu_match(candidate, value) for candidate in candidates for value in expected))


def _mmmu_match(candidate: str | float, value: str | float) -> bool:
    if isinstance(candidate, str):
        return isinstance(value, str) and value in candidate
    return candidate == value


def _mmmu_values(text: str) -> list[str | float]:
    """A number rounded to two decimals, or a text in lower case; one letter must have a space beside it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _mmmu_parts(response: str) -> list[str]:
    lines = response.strip().strip(".").lower().split("\n")
    parts = []
    for index, line in enumerate(lines):
        shortest = ""
        for cue in (*_CUES, "=") if index == len(lines) - 1 else _CUES:
            end = line.split(cue)[-1].strip()
            if cue in line and (not shortest or len(end) < len(shortest)):
                shortest = end
        if shortest and shortest not in _TRIVIAL:
            parts.append(shortest)
    return parts or ["\n".join(lines)]
