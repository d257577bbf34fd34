"""Multiple choice: the letter that a text names, as the scorers of ScienceQA, SEED, AI2D, MMBench and MMMU read it.

Each returns a letter, or None where the scorer fails to read one. Options are a dict from letters to texts.
"""

import re
import string
from collections.abc import Mapping, Sequence

from vlm_jax.core.errors import UserError

_ANSWER_IS = re.compile(r"The answer is ([A-Z]).")  # the period stands for any character in the scorer too
_LETTER_PERIOD = re.compile(r"\s*([A-Z])\.")
_API_FAILED = "Failed to obtain answer via API"
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


def as_options(options: object, where: str = "options") -> dict[str, str]:
    """A list of texts, or a dict from letters to texts, as a dict of texts without the missing ones (None, NaN)."""
    if isinstance(options, Sequence) and not isinstance(options, str):
        options = dict(zip(string.ascii_uppercase, options, strict=False))
    if not isinstance(options, Mapping):
        raise UserError(f"{where}: expected a list of texts or a dict from letters to texts, got {options!r}")
    return {letter: str(text) for letter, text in options.items() if text is not None and text == text}


def scienceqa(text: str, choices: int = 4) -> str | None:
    """LLaVA's `eval_science_qa.py`: "B", "B. ...", or one "The answer is B."; None for a letter beyond the choices."""
    letters = "ABCDE"
    if text and text in tuple(letters):
        letter = text
    elif len(text) >= 3 and text[0] in letters and text[1:3] == ". ":
        letter = text[0]
    else:
        found = _ANSWER_IS.findall(text)
        letter = found[0] if len(found) == 1 else ""
    return letter if letter and letter in letters[:choices] else None


def scienceqa_lenient(text: str) -> str | None:
    """lmms-eval's: a letter of any case alone, or a capital and a period at the start."""
    text = text.strip()
    if len(text) == 1:
        return text.upper()
    return text[0].upper() if len(text) >= 2 and text[0].isupper() and text[1] == "." else None


def first_letter(text: str) -> str | None:
    """lmms-eval's SEED: the first character, of any case."""
    return text.strip()[:1].upper() or None


def ai2d(text: str) -> str:
    """lmms-eval's filter: the capital before a period at the start, else the whole text."""
    found = _LETTER_PERIOD.match(text)
    return found[1] if found else text


def mmbench(text: str, options: Mapping[str, str]) -> str | None:
    """VLMEvalKit's `can_infer`, MMBench's own: the only option letter among the last four words, else the only option
    whose text occurs. "Z" for a refusal.
    """
    if _API_FAILED not in text:
        if any(refusal in text for refusal in _REFUSALS):
            return "Z"
        words = text.translate(dict.fromkeys(map(ord, ".()[],:;!*#{}"), " ")).split()
        found = [letter for letter in options if letter in words]
        if len(found) == 1 and words.index(found[0]) > len(words) - 5:
            return found[0]
        if not found and "Z" in words:
            return "Z"
    if len(text) > 2 * sum(map(len, options.values())):
        return None
    return _only_text(text, options)


# The forms in which lmms-eval looks for the only letter, in order.
_FORMS = ("{}", "{}.", "{},", "{}:", "{})", "{}).", "({})", "({}).", ":{}", ":{},", ":{}.", ":{})", ":{}).")


def mmbench_static(text: str, options: Mapping[str, str]) -> str | None:
    """lmms-eval's `can_infer`: the only letter of A to E among the words, in one of several forms, else the only option
    whose text occurs. A lone "A" in a text of more than three words may be an article and does not count.
    """
    if _API_FAILED not in text:
        words = text.split()
        for form in _FORMS:
            found = [letter for letter in "ABCDE" if form.format(letter) in words]
            is_article = form == "{}" and "A" in words and len(words) > 3
            if len(found) == 1 and not is_article:
                return found[0]
    return _only_text(text, options)


def _only_text(text: str, options: Mapping[str, str]) -> str | None:
    text = text.lower()
    found = [letter for letter, option in options.items() if option.lower() in text]
    return found[0] if len(found) == 1 else None


_PHRASES = (
    *(f"{the}{best}{noun} is" for the in ("", "the ") for best in ("", "correct ", "best ") for noun in ("answer",)),
    *(f"{the}{best}option is" for the in ("", "the ") for best in ("correct ", "best ")),
    *(f"{the}{best}choice is" for the in ("", "the ") for best in ("", "correct ")),
    "i choose", "i select", "i pick", "my answer is", "my choice is",
    "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは",
)  # fmt: skip


def mmbench_fallback(text: str, letters: Sequence[str]) -> str | None:
    """lmms-eval's `extract_mcq_answer`, which its static MMBench applies where `mmbench_static` fails: the letter in
    the form of highest rank, and among these the last.
    """
    text = text.strip()
    for mark in (",", ".", "!", "?", ";", ":", "'", '"'):
        text = text.strip(mark)
    bare, text = text.strip(), f" {text} "
    found = []  # (rank, position, order of the scorer's sort, letter)
    for rank, form in ((6, "({})"), (5, "{}."), (4, "{}:"), (3, "{})"), (2, "{} ")):
        found += [(rank, text.rfind(form.format(c)), c) for c in letters if form.format(c) in text]
    lower = text.lower()
    for phrase in _PHRASES:
        if phrase in lower:
            after = lower.index(phrase) + len(phrase)
            found += [(7, text.find(c, after), c) for c in letters if text.find(c, after) >= 0]
    found += [(10, 0, c) for c in letters if bare.startswith(c) and not bare[1:2].isalpha()]
    found += [(9, len(text) - 1, c) for c in letters if bare.endswith(c) and not bare[-2:-1].isalpha()]
    found = found or [(0, text.rfind(c), c) for c in letters if c in text]
    return max(found, key=lambda entry: entry[:2])[2] if found else None


def mmmu(text: str, options: Mapping[str, str]) -> str | None:
    """MMMU's `eval_utils.py`: the last of "(B)", else of "B" as a word, else, in more than five words, of the options'
    texts. None where the scorer draws a random letter.
    """
    return _mmmu(text, options, ("({})", " {} "))


def mmmu_lmms_eval(text: str, options: Mapping[str, str]) -> str | None:
    """lmms-eval's: as `mmmu`, but a letter need not begin a word, and "B." is tried too."""
    return _mmmu(text, options, ("({})", "{} ", "{}."))


def _mmmu(text: str, options: Mapping[str, str], forms: Sequence[str]) -> str | None:
    for mark in (",", ".", "!", "?", ";", ":", "'"):
        text = text.strip(mark)
    text = f" {text} "
    for form in forms:
        if found := [letter for letter in options if form.format(letter) in text]:
            # Several letters are ranked by "(B)" or " B ", whatever form they have.
            rank = form if form == "({})" else " {} "
            return max(found, key=lambda letter: text.rfind(rank.format(letter)))
    lower = text.lower()
    found = [letter for letter, option in options.items() if option.lower() in lower] if len(text.split()) > 5 else []
    return max(found, key=lambda letter: lower.rfind(options[letter].lower()), default=None)
