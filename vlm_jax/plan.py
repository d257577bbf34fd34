"""Plans a model for a budget: `python -m vlm_jax.plan --law law.json --question-tokens 50 --answer-tokens 20 --tflops
2`.

Ranks the models within a budget by predicted error, with cost and latency by part: the encoder and compressor that the
law was measured with, any V, any LLM of the measured family. --encoders, --llms and --compressors name others;
extrapolations are marked * and rank last. Where no form of the law fits, the measured cells are ranked. Touches no
accelerator.
"""

from vlm_jax.cli import ArgumentParser, run_main
from vlm_jax.core.errors import UserError


def parser() -> ArgumentParser:
    flags = ArgumentParser(prog="python -m vlm_jax.plan", description=__doc__)
    flags.add_argument("--law", required=True, help="law.json of vlm_jax.fit_law")
    flags.add_argument("--family", help="family of tasks; required if the law has several")
    flags.add_argument("--question-tokens", type=float, default=50)
    flags.add_argument("--answer-tokens", type=float, default=20)
    flags.add_argument("--cached-question", action="store_const", const="cached", default="fresh", dest="question")
    budget = flags.add_mutually_exclusive_group(required=True)
    budget.add_argument("--tflops", type=float, help="TFLOPs per request")
    budget.add_argument("--latency-ms", type=float, help="milliseconds per batch; needs --chip")
    budget.add_argument("--cache-mb", type=float, help="megabytes of keys and values per request")
    budget.add_argument("--usd-per-million-requests", type=float, help="needs --usd-per-chip-hour and --chip")
    flags.add_argument("--usd-per-chip-hour", type=float)
    flags.add_argument("--chip", help="v4, v5e, v5p, v6e, v7x, a100, h100, h200")
    flags.add_argument("--chips", type=int, default=1)
    flags.add_argument("--batch", type=int, default=1)
    flags.add_argument("--calibrate", help="CSV of measured parts (chip,chips,flops,bytes,secs) for the efficiency")
    for name in ("encoders", "llms", "compressors"):
        flags.add_argument(f"--{name}", nargs="+", default=[], metavar="NAME", help=f"{name}, measured or not")
    flags.add_argument("--tokens", nargs="+", type=int, default=[], metavar="V", help="numbers of visual tokens")
    flags.add_argument("--offsets", help="CSV of measured compressors, whose differences are added to the error")
    flags.add_argument("--mode", default="full", help="full, or paper: charge 2 N (Q + V) only")
    flags.add_argument("--top", type=int, default=12, help="how many choices to list")
    flags.add_argument("--json", action="store_true", help="print an object instead of tables")
    flags.add_argument("--html", help="write an interactive page with a slider for the budget")
    flags.add_argument("--figures", help="write PNG figures into this folder")
    return flags


def main(argv: list[str]) -> int:
    """Prints the plan; writes the page and figures."""
    flags = parser().parse_args(argv)

    from vlm_jax.compress import catalog
    from vlm_jax.core.located import located
    from vlm_jax.scaling import budgets, frontier, lawfile, offsets, report
    from vlm_jax.sizing import calibration, chips
    from vlm_jax.sizing.roofline import Request

    law = lawfile.read(located(flags.law))
    measured = dict.fromkeys(model.compressor.name for model in law.family(flags.family).models)
    for name in measured:
        if name in (flags.compressors or measured):
            catalog.check_installed(name, flags.law)
    (kind,) = (kind for kind in budgets.BUDGETS if getattr(flags, kind) is not None)
    budget = budgets.Budget(kind, getattr(flags, kind), flags.usd_per_chip_hour)
    if flags.top < 1:
        raise UserError(f"--top: expected 1 or more, got {flags.top}")
    request = Request(
        flags.question_tokens, flags.answer_tokens, flags.batch, flags.question,
        on=chips.chip(flags.chip) if flags.chip else None, chips=flags.chips,
        efficiency=calibration.calibrate(flags.calibrate) if flags.calibrate else chips.ASSUMED,
    )  # fmt: skip
    limits = {name: tuple(getattr(flags, name)) for name in ("encoders", "llms", "compressors", "tokens")}
    limits["offsets"] = offsets.read(located(flags.offsets)) if flags.offsets else {}
    plan = frontier.plan(law, budget, request, family=flags.family, mode=flags.mode, top=flags.top, **limits)
    if flags.json:
        print(report.plan_json(plan, budget, request, flags.mode), end="")
    else:
        report.print_plan(plan, budget, request, flags.mode, report.console())
    if flags.html:
        from vlm_jax.scaling import page

        page.write(flags.html, law, flags.family, budget, request, limits, flags.top)
    if flags.figures:
        from vlm_jax.scaling import planner_plots

        with report.progress(len(law.families) + 3) as progress:
            planner_plots.planner_figures(flags.figures, law, flags.family, request, limits, progress=progress)
    return 0


if __name__ == "__main__":
    run_main(main)
