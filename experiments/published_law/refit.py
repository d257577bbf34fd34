"""Refits the published scores; writes the law, figures and README.md.

    python -m experiments.published_law.refit

Reads published_scores.csv and compressors_vicuna7b.csv in this folder, and benchmark.json of `python -m
experiments.published_law.benchmark`. Every number of README.md is filled into README.template.md.
"""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from experiments.flags import whole
from vlm_jax.cli import ArgumentParser, run_main
from vlm_jax.core.errors import UserError
from vlm_jax.core.files import write_text
from vlm_jax.scaling import (
    fit,
    frontier,
    intervals,
    lawfile,
    laws,
    offsets,
    planner_plots,
    plots,
    report,
    scores,
    solve,
)
from vlm_jax.scaling.fitted import BASIC, FamilyFit, FormFit, LawFit
from vlm_jax.scaling.scores import Scores
from vlm_jax.sizing import chips, cost, roofline, zoo
from vlm_jax.sizing.roofline import Request

HERE = Path(__file__).parent
PUBLISHED = {
    "reasoning": {"alpha": 0.077, "beta": 0.015},
    "ocr": {"beta": 0.048},
}  # of arXiv 2411.03312; OCR second hand
QUESTIONS = (0, 50, 100, 500)
QUESTION, TIMED = 50, (1, 144, 576)  # Q, and the V of the table of prefill times
HELD = (0.0, 0.1, 0.2, 0.3)  # values of D in the profile's table
SMALL, LARGE, CHIP = "qwen1.5-0.5b", "qwen1.5-7b", "v6e"


def main(argv: list[str]) -> int:
    parser = ArgumentParser(prog="python -m experiments.published_law.refit", description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE, help="folder for law.json, figures/ and README.md")
    parser.add_argument("--seed", type=whole(0, 2**32 - 1), default=0)
    args = parser.parse_args(argv)
    rows = scores.read(HERE / "published_scores.csv")
    with report.progress(fit.stages(rows) + 1) as progress:
        law = fit.fit(rows, seed=args.seed, source="published_scores.csv", progress=progress)
        progress("figures")
        lawfile.write(args.out / "law.json", law)
        figures(args.out / "figures", law, rows)
    text = (HERE / "README.template.md").read_text().format(**findings(law, rows))
    write_text(args.out / "README.md", text)
    print(f"wrote {args.out / 'README.md'}, {args.out / 'law.json'} and {args.out / 'figures'}")
    return 0


def figures(folder: Path, law: LawFit, rows: Scores) -> None:
    """Every picture of README.md."""
    planner_plots.planner_figures(folder, law, "reasoning", Request(QUESTION, 20), {}, rows)
    for name in law.families:
        plots.error_curves(rows, law, name, folder / f"error_curves-{name}.png")
        plots.error_by_params(rows, law, name, folder / f"error_by_params-{name}.png")


def findings(law: LawFit, rows: Scores) -> dict[str, Any]:
    """The names that README.template.md uses."""
    found: dict[str, Any] = {name: _family(name, one, law, rows.of(name)) for name, one in law.families.items()}
    found |= {
        "seed": law.seed,
        "bootstraps": law.bootstraps,
        "cells": len(rows.cells),
        "level": round(100 * intervals.LEVEL),
    }
    models, harness = law.family("reasoning").models, law.family("reasoning").rows["harness"]
    sides = sorted({f"{model.encoder.name} and {model.compressor.name}" for model in models})
    found["measured"] = (
        f"{', '.join(sides)} in front of {', '.join(model.decoder.name for model in models)} (harness: "
        f"{', '.join(harness)})"
    )
    found["flags"] = "\n".join(
        f"| {c.family} | {c.params:g} | {c.tokens} | {1 - c.error:.10g} | {c.extra['provenance_flag']} |"
        for c in rows.cells
        if c.extra["provenance_flag"]
    )
    found["optimal"] = "\n".join(_optimal(question, law) for question in QUESTIONS)
    return found | {"left_out": _left_out_cost(law), "compressors": _compressors(), "benchmark": _benchmark()}


def _family(name: str, one: FamilyFit, law: LawFit, rows: Scores) -> SimpleNamespace:
    forms = {key.replace("-", "_"): SimpleNamespace(**form._asdict()) for key, form in one.forms.items()}
    basic, chosen = one.forms[BASIC], one.forms[one.chosen]
    params, tokens, error = (
        np.array([getattr(c, f) for c in rows.cells], float) for f in ("params", "tokens", "error")
    )
    return SimpleNamespace(
        chosen=one.chosen,
        verdict=one.verdict,
        forms=SimpleNamespace(**forms),
        table="\n".join(_form_row(key, form, one.chosen) for key, form in one.forms.items()),
        ratio=SimpleNamespace(**one.ratio),
        params=SimpleNamespace(**basic.params),
        interval=SimpleNamespace(**{key: SimpleNamespace(low=v[0], high=v[1]) for key, v in basic.interval.items()}),
        published="\n".join(_published(name, one)),
        profile="\n".join(_held(value, params, tokens, error, law) for value in HELD if value < error.min()),
        largest=SimpleNamespace(**{key: _percent(chosen.largest_out, key) for key in chosen.largest_out}),
        largest_basic=SimpleNamespace(**{key: _percent(basic.largest_out, key) for key in basic.largest_out}),
        next_size="\n".join(_next_size(one, v) for v in (1, 16, 144, 576)),
        next_params=2 * one.rows["sizes"][-1],
        without_flags=_without_flags(rows, law),
        by_size="\n".join(_slope(size, params, tokens, error) for size in one.rows["sizes"]),
        inside=_question_inside(params, tokens, error) / basic.sse,
        additive_gain=one.forms[BASIC].aicc - one.forms["additive"].aicc,
        warnings="\n".join(f"* {warning}" for warning in one.warnings),
    )


def _form_row(key: str, form: FormFit, chosen: str) -> str:
    values = [f"{form.params[p]:.4g}" if p in form.params else "" for p in ("A", "B", "C", "alpha", "beta", "D")]
    scores = [
        f"{form.sse:.3e}",
        f"{form.aicc:.1f}",
        *(f"{each:.4f}" for each in (form.loo_error, form.tokens_error, form.cv_error)),
    ]
    name = f"**{key}**" if key == chosen else key
    return "| " + " | ".join([name, *values, *scores]) + " |"


def _published(name: str, one: FamilyFit) -> list[str]:
    """Table rows comparing published exponents with the fitted intervals."""
    basic, given, out = one.forms[BASIC], PUBLISHED[name], []
    for key, value in given.items():
        out.append(_verdict(key, value, basic.params[key], *basic.interval[key]))
    if len(given) == 2:
        value = given["alpha"] / given["beta"]
        out.append(_verdict("alpha / beta", value, one.ratio["value"], one.ratio["low"], one.ratio["high"]))
    return out


def _verdict(name: str, published: float, value: float, low: float, high: float) -> str:
    word = "inside" if low <= published <= high else "**outside**"
    return f"| {name} | {published:.3g} | {value:.4g} | [{low:.4g}, {high:.4g}] | {word} |"


def _solved(form: str, params: Any, tokens: Any, error: Any, fixed: float = 0.0) -> tuple[dict[str, float], float]:
    of = solve.problem(laws.form(form), params, tokens, error, np.ones_like(error), "squared", fixed)
    found = solve.solve(of, seed=0)
    return {key: float(value[0]) for key, value in solve.named(of, found).items()}, float(found.cost[0])


def _held(value: float, params: Any, tokens: Any, error: Any, law: LawFit) -> str:
    found, sse = _solved(f"{BASIC}-fixed", params, tokens, error, value)
    ratio = found["alpha"] / found["beta"]
    return f"| {value:g} | {found['A']:.3f} | {found['alpha']:.4f} | {found['beta']:.4f} | {ratio:.2f} | {sse:.2e} |"


def _percent(largest: dict[str, Any], key: str) -> Any:
    return 100 * largest[key] if key.endswith(("error", "mean")) else largest[key]


def _next_size(one: FamilyFit, tokens: int) -> str:
    cells = [str(tokens)]
    for key in dict.fromkeys((one.chosen, BASIC)):
        form = one.forms[key]
        size = 2 * one.rows["sizes"][-1]
        value = float(laws.predict(key, form.params, size, tokens))
        low, high = np.quantile(
            laws.predict(key, {k: np.array(v) for k, v in form.draws.items()}, size, tokens), (0.025, 0.975)
        )
        cells.append(f"{1 - value:.4f} [{1 - high:.4f}, {1 - low:.4f}]")
    return "| " + " | ".join(cells) + " |"


def _without_flags(rows: Scores, law: LawFit) -> SimpleNamespace:
    """The multiplicative law without the cells with a provenance flag."""
    kept = rows._replace(cells=tuple(c for c in rows.cells if not c.extra["provenance_flag"]))
    one = fit.fit(kept, BASIC, bootstraps=law.bootstraps, seed=law.seed).family(None)
    return SimpleNamespace(dropped=len(rows.cells) - len(kept.cells), **one.ratio)


def _slope(size: float, params: Any, tokens: Any, error: Any) -> str:
    """beta of one size alone, with D = 0: the slope of log error against log V."""
    rows = params == size
    slope = np.polyfit(np.log(tokens[rows]), np.log(error[rows]), 1)[0]
    return f"| {size:g} | {-slope:.4f} |"


def _question_inside(params: Any, tokens: Any, error: Any, question: int = 50) -> float:
    """SSE of the multiplicative law in Q + V instead of V."""
    return _solved(BASIC, params, tokens + question, error)[1]


def _optimal(question: float, law: LawFit) -> str:
    cells = [f"{question:g}"]
    for name in ("reasoning", "ocr"):
        one = law.families[name]
        first, last = one.rows["tokens"][0], one.rows["tokens"][-1]
        form = one.forms[BASIC]
        draws = zip(form.draws["alpha"], form.draws["beta"], strict=True)
        drawn = [min(frontier.optimal_tokens(question, a, b), last) for a, b in draws]
        low, high = np.clip(np.quantile(drawn, (0.025, 0.975)), first, last)
        value = min(max(frontier.optimal_tokens(question, form.params["alpha"], form.params["beta"]), first), last)
        cells.append(f"{value:.3g} [{low:.3g}, {high:.3g}]")
    return "| " + " | ".join(cells) + " |"


def _left_out_cost(law: LawFit) -> SimpleNamespace:
    """The encoder's share of the paper's prefill, and the time of a prefill at the chip's peaks."""
    models = {model.decoder.name: model for model in law.family("reasoning").models}
    encoder = cost.encoder_flops(models[LARGE].encoder)
    paper = {llm: 2 * zoo.nominal_params(llm) * (QUESTION + TIMED[0]) for llm in (SMALL, LARGE)}
    share = {llm: encoder / (encoder + flops) for llm, flops in paper.items()}
    at = [replace(models[LARGE], compressor=replace(models[LARGE].compressor, tokens=v)) for v in TIMED]
    lines = []
    for batch in (1, 32):
        request = Request(QUESTION, 20, batch, on=chips.chip(CHIP), efficiency=chips.IDEAL)
        times = [roofline.request_times(model, request) for model in at]
        parts = [*(each["prefill"] for each in times), times[0]["encoder"]]
        texts = [f"{part.secs * 1e3:.1f} ({part.binds})" for part in parts]
        lines.append("| " + " | ".join([str(batch), *texts]) + " |")
    return SimpleNamespace(
        encoder=models[LARGE].encoder.name, encoder_tflops=encoder / 1e12, small=SMALL, large=LARGE, chip=CHIP,
        small_share=100 * share[SMALL], large_share=100 * share[LARGE], prefill="\n".join(lines),
        question=QUESTION, least=TIMED[0], heads=" | ".join(f"V = {v}" for v in TIMED), mme=offsets.MME_POINTS,
    )  # fmt: skip


def _compressors() -> str:
    """Differences from TokenPacker at equal V, in points."""
    shifts = offsets.read(str(HERE / "compressors_vicuna7b.csv"))
    lines = [
        f"| {tokens} | {method} | {-100 * shift:+.2f} |"
        for (method, tokens), shift in sorted(shifts.items(), key=lambda item: (item[0][1], item[1]))
        if method != "tokenpacker"
    ]
    return "\n".join(lines)


def _benchmark() -> SimpleNamespace:
    path = HERE / "benchmark.json"
    if not path.exists():
        raise UserError(f"{path.name} is missing; run `python -m experiments.published_law.benchmark` first")
    return SimpleNamespace(**json.loads(path.read_text()))


if __name__ == "__main__":
    run_main(main)
