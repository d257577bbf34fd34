"""Yes/no answers: POPE and MME.

Official rules: AoiDragon/POPE `evaluate.py` (the same in LLaVA), MME's `calculation.py`. Others: lmms-eval,
VLMEvalKit.
"""

from collections.abc import Sequence

from vlm_jax.core.errors import UserError
from vlm_jax.evaluation.metrics import vqa

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def pope_label(text: str) -> str:
    """ "no" if a word of the first sentence is "No", "no" or "not", else "yes": also for "", "NO" and "no\\n"."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"}.intersection(words) else "yes"


def exact_label(text: str) -> str:
    """lmms-eval's POPE: the text in lower case, to be compared with the label as it is."""
    return text.lower().strip()


def word_label(text: str) -> str:
    """VLMEvalKit: "Yes" or "No" if exactly one of the words occurs, else "Unknown"."""
    words = vqa.without_marks(text.lower()).split()
    found = {word for word in ("yes", "no") if word in words}
    return found.pop().capitalize() if len(found) == 1 else "Unknown"


def pope_aggregate(predictions: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """Accuracy, precision, recall and F1 of "yes", and the share of predictions that are "yes".

    LLaVA's single number is the mean F1 of the three subsets.
    """
    _check_lengths(predictions, labels)
    return _statistics([pope_label(text) == "yes" for text in predictions], [label != "no" for label in labels])


def pope_aggregate_words(predictions: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """VLMEvalKit: "Unknown" is wrong, and counts as "no" in precision and recall."""
    _check_lengths(predictions, labels)
    parsed = [word_label(text).lower() for text in predictions]
    values = _statistics([label == "yes" for label in parsed], [label.lower() == "yes" for label in labels])
    hits = sum(one == other.lower() for one, other in zip(parsed, labels, strict=True))
    return values | {"accuracy": _ratio(hits, len(labels))}


def pope_aggregate_exact(predictions: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """lmms-eval: answers that are neither yes nor no are wrong, but leave the denominator of recall.

    `yes_ratio` is that of the labels.
    """
    _check_lengths(predictions, labels)
    pairs = [(exact_label(text), exact_label(label)) for text, label in zip(predictions, labels, strict=True)]
    hit = pairs.count(("yes", "yes"))
    precision = _ratio(hit, hit + pairs.count(("yes", "no")))
    recall = _ratio(hit, hit + pairs.count(("no", "yes")))
    return {
        "accuracy": _ratio(sum(text == label for text, label in pairs), len(pairs)),
        "precision": precision,
        "recall": recall,
        "f1_score": _ratio(2 * precision * recall, precision + recall),
        "yes_ratio": _ratio(sum(label == "yes" for _, label in pairs), len(pairs)),
    }


def _statistics(predicted: Sequence[bool], true: Sequence[bool]) -> dict[str, float]:
    hit = sum(a and b for a, b in zip(predicted, true, strict=True))
    right = sum(a == b for a, b in zip(predicted, true, strict=True))
    precision, recall = _ratio(hit, sum(predicted)), _ratio(hit, sum(true))
    return {
        "accuracy": _ratio(right, len(true)),
        "precision": precision,
        "recall": recall,
        "f1_score": _ratio(2 * precision * recall, precision + recall),
        "yes_ratio": _ratio(sum(predicted), len(predicted)),
    }


def _ratio(part: int | float, whole: int | float) -> float:
    return part / whole if whole else 0.0


def mme_label(text: str) -> str:
    """ "yes" or "no" if the first four characters contain it, else "other"."""
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def mme_label_lenient(text: str) -> str:
    """lmms-eval: as `mme_label` after stripping and deleting periods; a lone "y" or "n" counts."""
    text = text.lower().strip().replace(".", "")
    return {"y": "yes", "n": "no"}.get(text) or mme_label(text)


def mme_aggregate(labels: Sequence[str], answers: Sequence[str], images: Sequence[object]) -> dict[str, float]:
    """The score of a subtask, 100 acc + 100 acc_plus, at most 200, from parsed labels.

    `acc` is the share of questions answered rightly, `acc_plus` that of images with both questions answered rightly.
    Raises `UserError` unless each image has two questions.
    """
    _check_lengths(labels, answers)
    _check_lengths(images, answers)
    by_image: dict[object, list[bool]] = {}
    for image, label, answer in zip(images, labels, answers, strict=True):
        by_image.setdefault(image, []).append(label == answer.lower().strip().replace(".", ""))
    if wrong := [image for image, hits in by_image.items() if len(hits) != 2]:
        raise UserError(f"MME: expected 2 questions an image, got {len(by_image[wrong[0]])} for {wrong[0]}")
    hits = list(by_image.values())
    acc = _ratio(sum(map(sum, hits)), 2 * len(hits))
    acc_plus = _ratio(sum(map(all, hits)), len(hits))
    return {"acc": acc, "acc_plus": acc_plus, "score": 100 * acc + 100 * acc_plus}


def _check_lengths(predictions: Sequence[object], references: Sequence[object]) -> None:
    if len(predictions) != len(references):
        raise UserError(f"references: expected {len(predictions)}, as predictions, got {len(references)}")
