"""VQA accuracy and its answer normalisation, as three scorers define them.

* official: GT-Vision-Lab/VQA `vqaEval.py`. Nothing is normalised where all annotators agree.
* EvalAI: the answer processor of the EvalAI servers, which LLaVA and lmms-eval use for TextVQA and VizWiz. Always
  normalises.
* vlmevalkit: VLMEvalKit's copy of the official one, which keeps a period after a digit. Always normalises.

The tables (`vqa_tables.json`) are those of GT-Vision-Lab/VQA. Their oddities are kept: contractions with a capital I
never match a lower-cased word.
"""

import functools
import json
import re
from collections.abc import Callable, Sequence
from importlib import resources

_TABLES = json.loads(resources.files(__package__).joinpath("vqa_tables.json").read_text(encoding="utf-8"))
_PUNCTUATION = frozenset(_TABLES["punctuation"])
_ARTICLES = frozenset(_TABLES["articles"])
_NUMBERS, _CONTRACTIONS = _TABLES["number_words"], _TABLES["contractions"]
_CACHED = 2**18  # strings; VQAv2 validation has about 150,000 distinct answers

_DIGIT_COMMA = re.compile(r"\d,\d")
_DIGIT_COMMAS = re.compile(r"\d,+\d")  # of the EvalAI processor
_PERIOD = re.compile(r"\.(?!\d)")  # the scorer's look-behind for a digit is mistyped and never matches
_LONE_PERIOD = re.compile(r"(?<!\d)\.(?!\d)")  # VLMEvalKit writes it correctly
_MOST_PERIODS = 32  # the scorers pass re.UNICODE, 32, as `count`


@functools.lru_cache(_CACHED)
def official(text: str) -> str:
    """The answer as `vqaEval.py` compares it."""
    return _words(_marks(strip(text), _DIGIT_COMMA, _PERIOD))


@functools.lru_cache(_CACHED)
def lmms_eval(text: str) -> str:
    """As lmms-eval compares VQAv2 answers: `official`, but several commas between digits count as one."""
    return _words(_marks(strip(text), _DIGIT_COMMAS, _PERIOD))


@functools.lru_cache(_CACHED)
def evalai(text: str) -> str:
    """The answer as the EvalAI processor gives it."""
    text = strip(text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip())
    return _words(_marks(text, _DIGIT_COMMAS, _PERIOD))


@functools.lru_cache(_CACHED)
def vlmevalkit(text: str) -> str:
    """The answer as VLMEvalKit compares it."""
    return _words(_marks(strip(text), _DIGIT_COMMA, _LONE_PERIOD))


def strip(text: str) -> str:
    """The only preparation of answers that all annotators agree on."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def without_marks(text: str) -> str:
    """VLMEvalKit's `process_punctuation`."""
    return _marks(text, _DIGIT_COMMA, _LONE_PERIOD)


def _marks(text: str, digit_comma: re.Pattern[str], period: re.Pattern[str]) -> str:
    """Each mark becomes a space, or nothing if it touches a space anywhere or a comma stands between digits."""
    if found := _PUNCTUATION.intersection(text):
        remove_all = digit_comma.search(text) is not None
        touches = {mark for mark in found if f"{mark} " in text or f" {mark}" in text}
        text = text.translate({ord(mark): "" if remove_all or mark in touches else " " for mark in found})
    return period.sub("", text, count=_MOST_PERIODS) if "." in text else text


def _words(text: str) -> str:
    """Lower case, number words as digits, no articles, apostrophes restored, single spaces."""
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def official_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQAv2's accuracy in [0, 1]: the mean over annotators of min(1, matches among the others / 3)."""
    answers = [strip(answer) for answer in answers]
    if len(set(answers)) == 1:
        return leave_one_out(answers.count(strip(prediction)), len(answers))
    return accuracy(prediction, answers, official)


def submitted_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """LLaVA's VQAv2: the EvalAI processor prepares the submission, the server scores it with `official_accuracy`."""
    return official_accuracy(evalai(prediction), answers)


def accuracy(prediction: str, answers: Sequence[str], normalise: Callable[[str], str]) -> float:
    """As `official_accuracy`, with both sides normalised always."""
    return leave_one_out([normalise(answer) for answer in answers].count(normalise(prediction)), len(answers))


def leave_one_out(matches: int, annotators: int) -> float:
    """Of 10 annotators, 0, 1, 2, 3 and more matches give 0, .3, .6, .9 and 1."""
    if not annotators:
        return 0.0
    matched, others = min(1.0, (matches - 1) / 3), min(1.0, matches / 3)
    return (matches * matched + (annotators - matches) * others) / annotators
