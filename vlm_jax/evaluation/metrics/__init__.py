"""Official metrics: `score(benchmark, prediction, references, flavour)` for one item.

    score("vqav2", "2", ["two", "two", "3", ...])                        -> 0.6
    score("pope_parse", "No, there is not", [])                          -> "no"
    score("mmbench_extract", "(B)", {"A": "cat", "B": "dog"}, "lmms-eval") -> "B"
    score("pope_agg", ["Yes", "no"], ["yes", "no"])                      -> {"accuracy": 1.0, ...}

A flavour names the scorer: `official`, that of the benchmark's authors or, where they have none, the one that the field
uses; `llava`, `lmms-eval` (0.7.3), `vlmevalkit` and `big_vision`. A flavour without a rule of its own for a benchmark
uses the official one (`RULES` lists which have their own).

Scores are fractions in [0, 1]. Nothing is random: where a scorer draws a random letter (MMMU), `mmmu` scores the
expectation, 1 / options. `mmmu_mc`, which returns the letter, gives the draw of the scorer with Python's seed 0.

Pure Python: no JAX, no model. MathVista's official pipeline extracts answers with a GPT model and MMBench's resolves
unreadable answers with one; here the first takes the prediction itself and the second counts as wrong.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vlm_jax.core.errors import UserError, unknown
from vlm_jax.evaluation.metrics import choices, text, vqa, yes_no

FLAVOURS = ("official", "llava", "lmms-eval", "vlmevalkit", "big_vision")

_LETTERS = dict.fromkeys("ABCD", "\0")  # options of which only the letters are known: this text occurs nowhere

Rule = Callable[[Any, Any, Mapping[str, Any]], Any]  # (prediction, references, extra) -> score


def score(benchmark: str, prediction: Any, references: Any, flavour: str = "official", **extra: Any) -> Any:
    """The score of one item, as the scorer `flavour` of `benchmark` gives it.

    Args:
        benchmark: a name of `RULES`. `*_parse` and `*_extract` return the label that is read (False where none is),
            `vqa_normalise` the normalised answer, `*_agg` a dict of statistics over lists, `mmbench_circular` the share
            of groups with all rotations right; others a number in [0, 1].
        prediction: the model's answer; for `*_agg` and `mmbench_circular` a list of answers.
        references: all reference answers; for `mmbench_extract` and `mmmu_mc` a dict from letters to options.
        flavour: one of `FLAVOURS`.
        extra: fields of the item that its rule reads. `options`: the texts of a multiple-choice question (`mmbench`,
            `mmmu`, `mmbench_circular`: one for each row). `choices`: MathVista's, or the number of ScienceQA's.
            `answer`: the letter, which makes `mmmu_mc` a number. `question_type`, `answer_type`, `precision`:
            MathVista's. `dataset`: OCRBench's. `groups`: the question of each row of `mmbench_circular`.
            `images`: the image of each row of `mme_agg`. `types`: the question type of each row of `seed_agg`. Others
            are ignored.

    Raises `UserError` for an unknown benchmark or flavour, or an item of another form.
    """
    if benchmark not in RULES:
        raise unknown("benchmark", benchmark, RULES)
    if flavour not in FLAVOURS:
        raise unknown("flavour", flavour, FLAVOURS)
    rules = RULES[benchmark]
    _check(benchmark, prediction, references)
    try:
        return rules.get(flavour, rules["official"])(prediction, references, extra)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:  # of a field in `extra`
        fields = ", ".join(extra) or "no fields"
        raise UserError(
            f"{benchmark}: expected the fields that `score` describes, got {fields} ({type(error).__name__}: {error})"
        ) from error


def _check(benchmark: str, prediction: Any, references: Any) -> None:
    expected: type | tuple[type, ...] = str
    if benchmark in _OF_LISTS:
        expected = list, tuple
    if not isinstance(prediction, expected):
        kind = "a text" if expected is str else "a list of texts"
        raise UserError(f"{benchmark}: prediction: expected {kind}, got {prediction!r}")
    if benchmark in _OF_OPTIONS:
        return
    if not isinstance(references, list | tuple) or not all(isinstance(answer, str) for answer in references):
        raise UserError(f"{benchmark}: references: expected a list of texts, got {references!r}")
    if not references and benchmark not in _WITHOUT_REFERENCES:
        raise UserError(f"{benchmark}: references: expected at least one, got none")


def _letter(value: str | None) -> str | bool:
    return value or False


def _any(rule: Callable[[str, str], float]) -> Rule:
    """The best score over the references."""
    return lambda prediction, references, extra: max(rule(prediction, answer) for answer in references)


def _label(read: Callable[[str], str | None]) -> Rule:
    """Whether the label that is read equals a reference without case."""

    def rule(prediction: str, references: Sequence[str], extra: Mapping[str, Any]) -> float:
        label = read(prediction)
        return float(label is not None and label.lower() in [answer.strip().lower() for answer in references])

    return rule


def _vqa(normalise: Callable[[str], str]) -> Rule:
    return lambda prediction, references, extra: vqa.accuracy(prediction, references, normalise)


def _normalise(normalise: Callable[[str], str]) -> Rule:
    return lambda prediction, references, extra: normalise(prediction)


def _of_answers(rule: Callable[[str, Sequence[str]], float]) -> Rule:
    return lambda prediction, references, extra: rule(prediction, references)


def _ocrbench(rule: Callable[[str, Sequence[str], str], float]) -> Rule:
    return lambda prediction, references, extra: rule(prediction, references, extra.get("dataset", ""))


def _pope_exact(prediction: str, references: Sequence[str], extra: Mapping[str, Any]) -> float | str:
    """lmms-eval has no parser of its own: with a label, whether the text equals it."""
    label = yes_no.exact_label(prediction)
    return float(label == yes_no.exact_label(references[0])) if references else label


def _scienceqa(prediction: str, references: Sequence[str], extra: Mapping[str, Any]) -> float:
    given = extra.get("choices", 4)
    return float(choices.scienceqa(prediction, given if isinstance(given, int) else len(given)) in references)


def _mmbench_letter(read: Callable[[str, Mapping[str, str]], str | None]) -> Rule:
    return lambda prediction, references, extra: _letter(read(prediction, choices.as_options(references)))


def _mmbench(read: Callable[[str, Mapping[str, str]], str | None]) -> Rule:
    return lambda prediction, references, extra: float(
        read(prediction, choices.as_options(extra.get("options") or _LETTERS)) in references
    )


def _circular(read: Callable[[str, Mapping[str, str]], str | None]) -> Rule:
    """Rows without `groups` are pairs, a question and its rotation, counted from the last; a first one may be alone."""

    def rule(prediction: Sequence[str], references: Sequence[str], extra: Mapping[str, Any]) -> float:
        count = len(references)
        groups = extra.get("groups", [(i + count % 2) // 2 for i in range(count)])
        options = extra.get("options") or [_LETTERS] * count
        right: dict[Any, bool] = {}
        for text_, answer, given, group in _zip(prediction, references, options, groups):
            right[group] = right.get(group, True) and read(text_, choices.as_options(given)) == answer
        return sum(right.values()) / len(right)

    return rule


def _mmbench_lmms_eval(prediction: str, options: Mapping[str, str]) -> str | None:
    """Reads the letter as lmms-eval's `mmbench_en_dev_static` does."""
    letter = choices.mmbench_static(prediction, options)
    return letter or choices.mmbench_fallback(prediction, sorted(options))


def _mmmu_letter(read: Callable[[str, Mapping[str, str]], str | None]) -> Rule:
    def rule(prediction: str, references: Any, extra: Mapping[str, Any]) -> str | float:
        options = choices.as_options(references)
        if not options:
            raise UserError("mmmu_mc: references: expected a dict from letters to options, got none")
        if "answer" in extra:
            return _expected(read(prediction, options), extra["answer"], options)
        return read(prediction, options) or random.Random(0).choice(list(options))

    return rule


def _mmmu(read: Callable[[str, Mapping[str, str]], str | None]) -> Rule:
    def rule(prediction: str, references: Sequence[str], extra: Mapping[str, Any]) -> float:
        options = choices.as_options(extra.get("options") or {})
        if not options:
            return text.mmmu_open(prediction, references)
        return _expected(read(prediction, options), references[0], options)

    return rule


def _expected(letter: str | None, answer: str, options: Mapping[str, str]) -> float:
    """The scorer draws a letter where it reads none; this is the mean over the draws."""
    return float(letter == answer) if letter else float(answer in options) / len(options)


def _mathvista(prediction: str, references: Sequence[str], extra: Mapping[str, Any]) -> float:
    names = ("choices", "question_type", "answer_type", "precision")
    value = text.mathvista_answer(prediction, *(extra.get(name) for name in names))
    return float(value == references[0])


def _mme(read: Callable[[str], str]) -> Rule:
    def rule(prediction: Sequence[str], references: Sequence[str], extra: Mapping[str, Any]) -> dict[str, float]:
        """Rows without `images` are consecutive pairs, as in the files of the official tool."""
        images = extra.get("images") or extra.get("groups") or [i // 2 for i in range(len(references))]
        return yes_no.mme_aggregate([read(answer) for answer in prediction], references, images)

    return rule


def _seed(read: Callable[[str], str | None]) -> Rule:
    def rule(prediction: Sequence[str], references: Sequence[str], extra: Mapping[str, Any]) -> dict[str, float]:
        """Accuracy in all and by question type (1 to 9: images, 10 to 12: videos)."""
        types = extra.get("types", [""] * len(references))
        hits: dict[str, list[bool]] = {"total": []}
        for answer, reference, kind in _zip(prediction, references, types):
            for name in ("total", str(kind)) if kind != "" else ("total",):
                hits.setdefault(name, []).append(read(answer) == reference)
        return {name: sum(values) / len(values) for name, values in hits.items()}

    return rule


def _zip(*columns: Sequence[Any]) -> Any:
    if len({len(column) for column in columns}) > 1:
        raise UserError(f"expected lists of one length, got {', '.join(str(len(column)) for column in columns)}")
    return zip(*columns, strict=True)


_TEXTVQA: dict[str, Rule] = {
    "official": _vqa(vqa.evalai),
    "vlmevalkit": _vqa(vqa.vlmevalkit),
    "big_vision": _of_answers(lambda prediction, answers: min(1.0, answers.count(prediction) / 3)),
}
_ANLS: dict[str, Rule] = {"official": _of_answers(text.anls), "big_vision": _of_answers(text.anls_cased)}
_MMBENCH = {"official": choices.mmbench, "lmms-eval": _mmbench_lmms_eval}
_MMMU = {"official": choices.mmmu, "lmms-eval": choices.mmmu_lmms_eval}

RULES: dict[str, dict[str, Rule]] = {
    "vqav2": {
        "official": _of_answers(vqa.official_accuracy),
        "llava": _of_answers(vqa.submitted_accuracy),
        "lmms-eval": _vqa(vqa.lmms_eval),
        "vlmevalkit": _vqa(vqa.vlmevalkit),
    },
    "vqav2_llava_pipeline": {"official": _of_answers(vqa.submitted_accuracy)},
    "vqa_normalise": {
        "official": _normalise(vqa.official),
        "llava": _normalise(vqa.evalai),
        "lmms-eval": _normalise(vqa.evalai),
        "vlmevalkit": _normalise(vqa.vlmevalkit),
    },
    "textvqa": _TEXTVQA,
    "vizwiz": _TEXTVQA,
    "gqa": {"official": _any(text.gqa), "lmms-eval": _any(text.exact_match)},
    "pope": {
        "official": _label(yes_no.pope_label),
        "lmms-eval": _label(yes_no.exact_label),
        "vlmevalkit": _label(yes_no.word_label),
        "big_vision": _of_answers(lambda prediction, answers: float(prediction.lower() in answers)),
    },
    "pope_parse": {
        "official": _normalise(yes_no.pope_label),
        "lmms-eval": _pope_exact,
        "vlmevalkit": _normalise(yes_no.word_label),
    },
    "pope_agg": {
        "official": _of_answers(yes_no.pope_aggregate),
        "lmms-eval": _of_answers(yes_no.pope_aggregate_exact),
        "vlmevalkit": _of_answers(yes_no.pope_aggregate_words),
    },
    "mme": {
        "official": _label(yes_no.mme_label),
        "lmms-eval": _label(yes_no.mme_label_lenient),
        "vlmevalkit": _label(yes_no.word_label),
    },
    "mme_parse": {
        "official": _normalise(yes_no.mme_label),
        "lmms-eval": _normalise(yes_no.mme_label_lenient),
        "vlmevalkit": _normalise(yes_no.word_label),
    },
    "mme_agg": {"official": _mme(yes_no.mme_label), "lmms-eval": _mme(yes_no.mme_label_lenient)},
    "mmbench": {flavour: _mmbench(read) for flavour, read in _MMBENCH.items()},
    "mmbench_extract": {
        "official": _mmbench_letter(choices.mmbench),
        "lmms-eval": _mmbench_letter(choices.mmbench_static),
    },
    "mmbench_circular": {flavour: _circular(read) for flavour, read in _MMBENCH.items()},
    "scienceqa": {"official": _scienceqa, "lmms-eval": _label(choices.scienceqa_lenient)},
    "seed": {"official": _any(lambda text_, answer: float(text_ == answer)), "lmms-eval": _label(choices.first_letter)},
    "seed_agg": {"official": _seed(str), "lmms-eval": _seed(choices.first_letter)},
    "ai2d": {"official": _any(lambda text_, answer: text.exact_match(choices.ai2d(text_), answer))},
    "mmmu": {flavour: _mmmu(read) for flavour, read in _MMMU.items()},
    "mmmu_mc": {flavour: _mmmu_letter(read) for flavour, read in _MMMU.items()},
    "mmmu_open": {"official": _of_answers(text.mmmu_open)},
    "mathvista": {"official": _mathvista},
    "chartqa": {"official": _any(text.relaxed), "big_vision": _any(text.relaxed_cased)},
    **dict.fromkeys(("docvqa", "docvqa_anls", "infovqa", "infovqa_anls", "anls"), _ANLS),
    "ocrbench": {"official": _ocrbench(text.ocrbench), "lmms-eval": _ocrbench(text.ocrbench_folded)},
}
_OF_LISTS = frozenset(("pope_agg", "mme_agg", "seed_agg", "mmbench_circular"))
_OF_OPTIONS = frozenset(("mmbench_extract", "mmmu_mc"))
_WITHOUT_REFERENCES = frozenset(("vqa_normalise", "pope_parse", "mme_parse"))
