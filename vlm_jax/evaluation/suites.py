"""Suites: named lists of benchmarks with the options that their papers use.

A suite's score is the unweighted mean of its benchmarks' scores. Which choices the source states and which are open:

* quecc: table 1 of arXiv 2411.03312, measured with LLaVA-1.5's scripts. Open: whether its POPE is the mean of three F1
  (LLaVA) or the accuracy on the random subset (the authors' script). MME is given in points of 2000.
* paper_reasoning: the nine benchmarks of the scaling law. Open: the harness, and how MME became a fraction.
* ocr: the members of the paper's OCR suite are open; these are the usual ones, TextVQA without OCR strings.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from vlm_jax.core.errors import UserError, unknown
from vlm_jax.evaluation import benchmarks, metrics
from vlm_jax.evaluation.benchmarks.items import PROMPTS, SuiteOptions

VALUES: Mapping[str, Sequence[str]] = {
    "prompt": PROMPTS,
    "flavour": metrics.FLAVOURS,
    "system": ("none", "vicuna_v1"),
    "mme": ("perception", "all"),
    "pope": ("f1", "accuracy", "random_accuracy"),
    "ocr_tokens": ("given", "none"),
    "scienceqa": ("image", "all"),
    "seed": ("image", "all"),
}
ASKING = ("prompt", "system", "ocr_tokens", "new_tokens")  # options that answers depend on
CUSTOM = "custom"  # the name of a list of benchmarks that is no suite


class Suite(NamedTuple):
    """Benchmarks and options; `is_part` where only some of the suite's benchmarks are chosen."""

    name: str
    benchmarks: tuple[str, ...]
    options: SuiteOptions
    is_part: bool = False


_LLAVA = SuiteOptions("llava", "llava", system="vicuna_v1", ocr_tokens="given")
_LMMS_EVAL = SuiteOptions("lmms-eval", "lmms-eval")
SUITES = {
    "quecc": Suite("quecc", ("gqa", "mmbench", "mme", "pope", "scienceqa", "textvqa", "vizwiz", "vqav2"), _LLAVA),
    "paper_reasoning": Suite(
        "paper_reasoning",
        ("mme", "gqa", "ai2d", "mmbench", "mmmu", "scienceqa", "mathvista", "pope", "chartqa"),
        _LMMS_EVAL,
    ),
    "ocr": Suite("ocr", ("docvqa", "infovqa", "textvqa", "ocrbench", "chartqa"), _LMMS_EVAL),
}


def find(name: str | None, chosen: Sequence[str], settings: Sequence[str]) -> Suite:
    """The suite `name`, or with None a custom list, restricted to `chosen` benchmarks, with "option=value" settings.

    Raises `UserError` for unknown names and values.
    """
    if name is None:
        if not chosen:
            raise UserError(f"expected --suite (one of {', '.join(SUITES)}) or --benchmarks, got neither")
        suite = Suite(CUSTOM, tuple(benchmarks.find(benchmark).name for benchmark in chosen), _LMMS_EVAL, is_part=True)
    elif name not in SUITES:
        raise unknown("suite", name, SUITES)
    else:
        suite = SUITES[name]
        if outside := [benchmark for benchmark in chosen if benchmark not in suite.benchmarks]:
            raise unknown(f"benchmark of suite {name}", outside[0], suite.benchmarks)
        if chosen and set(chosen) != set(suite.benchmarks):
            suite = suite._replace(benchmarks=tuple(b for b in suite.benchmarks if b in chosen), is_part=True)
    return suite._replace(options=with_settings(suite.options, settings))


def with_settings(options: SuiteOptions, settings: Sequence[str]) -> SuiteOptions:
    """Options changed by "name=value" settings. Raises `UserError`."""
    for setting in settings:
        name, _, value = setting.partition("=")
        if name not in (*VALUES, "new_tokens"):
            raise unknown("option", name, (*VALUES, "new_tokens"))
        if name == "new_tokens" and not (value.isascii() and value.isdigit()):
            raise UserError(f"option new_tokens: expected an integer of 0 (each benchmark's) or more, got {value!r}")
        if name != "new_tokens" and value not in VALUES[name]:
            raise unknown(f"value of option {name}", value, VALUES[name])
        options = dataclasses.replace(options, **{name: int(value) if name == "new_tokens" else value})
    return options


def described(options: SuiteOptions) -> str:
    """ "prompt=llava flavour=llava ...", for rows."""
    return " ".join(f"{name}={value}" for name, value in dataclasses.asdict(options).items())
