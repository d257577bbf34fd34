"""The planner against brute force over model specs, against numerical minimisation, and against the paper's cost."""

import math

import numpy as np
import pytest
import tables
from scipy.optimize import minimize_scalar
from tables import PUBLISHED

from vlm_jax.compress import catalog
from vlm_jax.core.errors import UserError
from vlm_jax.scaling import budgets, catalogue, frontier, latency, laws, offsets
from vlm_jax.scaling.budgets import Budget
from vlm_jax.scaling.latency import Request
from vlm_jax.sizing import chips, cost, zoo

pytestmark = pytest.mark.xdist_group("law")  # of one fit
LLMS = ("qwen1.5-0.5b", "qwen1.5-1.8b", "qwen1.5-7b", "llama2-13b")
ENCODERS = ("clip-l14-336", "siglip-b16-224")
COMPRESSORS = ("pool", "quecc", "tokenpacker")


def combinations():
    """Every (encoder, compressor, V, LLM), by hand."""
    for encoder in ENCODERS:
        for compressor in COMPRESSORS:
            for tokens in catalog.row(compressor).tokens_out(zoo.encoder(encoder).grid):
                if tokens in (*catalogue.TOKENS, *tables.TOKENS):
                    for llm in LLMS:
                        yield catalogue.Side(encoder, compressor, tokens), llm


@pytest.mark.parametrize("q", [0.5, 50, 500])
@pytest.mark.parametrize("form", ["multiplicative", "semilog"])
def test_the_closed_form_is_the_numerical_minimum(form, q):
    values = {"A": 0.6, "alpha": 0.07, "beta": 0.02} | ({"D": 0.1} if form == "multiplicative" else {})

    def along_the_budget(log_tokens):
        tokens = math.exp(log_tokens)
        return float(laws.predict(form, values, 100.0 / (q + tokens), tokens))

    found = minimize_scalar(along_the_budget, bounds=(-6, 9), method="bounded", options={"xatol": 1e-10})
    assert frontier.optimal_tokens(q, 0.07, 0.02) == pytest.approx(math.exp(found.x), rel=1e-3)


def test_the_closed_form_at_its_edges():
    assert frontier.optimal_tokens(50, 0.07, 0.07) == math.inf
    assert frontier.optimal_tokens(50, 0.03, 0.04) == math.inf
    assert frontier.optimal_tokens(50, 0.4, -0.1) == 0
    assert frontier.optimal_tokens(0, 0.4, 0.1) == 0


@pytest.mark.parametrize(("q", "tokens", "nearest"), [(0, 1.0, 1), (50, 13.5, 16), (100, 27.0, 25)])
def test_the_paper_mode_gives_the_known_numbers(law, q, tokens, nearest):
    plan = frontier.plan(law, Budget("tflops", 1.0), Request(q, 20), family="reasoning", mode="paper")
    assert plan.closed_form.visual_tokens == pytest.approx(tokens, abs=0.1)
    assert plan.closed_form.nearest_tokens == nearest
    assert plan.closed_form.llm_params_billion == pytest.approx(1e3 / (2 * (q + plan.closed_form.visual_tokens)))


def test_where_tokens_always_pay_the_closed_form_takes_the_most(law):
    plan = frontier.plan(law, Budget("tflops", 1.0), Request(50, 20), family="ocr", tokens=(1, 16, 144))
    assert (plan.closed_form.visual_tokens, plan.closed_form.unclipped_tokens) == (144, None)


@pytest.mark.parametrize("mode", ["paper", "full"])
def test_the_ranking_is_that_of_brute_force(law, mode):
    one, budget, request = law.family("reasoning"), Budget("tflops", 0.9), Request(50, 20)
    within = []
    for side, llm in combinations():
        params = zoo.nominal_params(llm) / 1e9
        real = cost.flops(catalogue.model_spec(side, llm), 50, 20).total
        charged = real if mode == "full" else 2e9 * params * (50 + side.tokens)
        if charged <= 0.9e12:
            within.append((float(one.predict(params, side.tokens)), real, side, llm))
    best = min(within)
    plan = frontier.plan(
        law,
        budget,
        request,
        family="reasoning",
        mode=mode,
        encoders=ENCODERS,
        llms=LLMS,
        compressors=COMPRESSORS,
        top=1000,
    )
    assert plan.feasible == len(within)
    assert plan.combinations == len(list(combinations()))
    first = plan.choices[0]
    assert (first.predicted_error, first.flops) == pytest.approx(best[:2])
    errors = [choice.predicted_error for choice in plan.choices]
    assert errors == sorted(errors)
    assert len(errors) == len({(llm, side.tokens) for _, _, side, llm in within})


def test_arrays_cost_what_model_specs_cost():
    sides = catalogue.sides(ENCODERS, COMPRESSORS, None, tables.TOKENS)
    grid = catalogue.build(sides, LLMS, Request(37, 9), "nominal")
    for m in range(0, len(sides), 3):
        for n, llm in enumerate(LLMS):
            parts = cost.row_fields(cost.flops(catalogue.model_spec(sides[m], llm), 37, 9))
            for part in latency.PARTS:
                assert grid.flops[part][m, n] == pytest.approx(parts[f"{part}_flops"], rel=1e-12)


def test_latency_arrays_are_the_roofline_of_each_part():
    request = Request(50, 20, 8, on=chips.chip("h100"), chips=2)
    sides = catalogue.sides(("clip-l14-336",), ("quecc",), (4, 16), ())
    grid = catalogue.build(sides, LLMS, request, "nominal")
    for m, side in enumerate(sides):
        for n, llm in enumerate(LLMS):
            spec = zoo.decoder(llm)
            for part, work in (
                ("prefill", latency.prefill_work(spec, side.tokens, request)),
                ("question", latency.question_work(spec, request)),
                ("decode", latency.decode_work(spec, side.tokens, request)),
            ):
                time = latency.time(work, request)
                assert grid.secs[part][m, n] == pytest.approx(time.secs)
                assert grid.by_compute[part][m, n] == (time.binds == "compute")


def test_pareto_is_what_nothing_beats():
    rng = np.random.default_rng(0)
    error, price = rng.uniform(size=200), rng.uniform(size=200)
    want = {
        i for i in range(200) if not any((error[j] <= error[i]) & (price[j] <= price[i]) for j in range(200) if j != i)
    }
    assert set(frontier.pareto(error, price)) == want


def test_a_question_is_paid_twice_by_what_reads_it_and_cannot_be_cached():
    sides = catalogue.sides(("clip-l14-336",), ("quecc", "tokenpacker"), (16,), ())
    fresh, cached = (
        catalogue.build(sides, ("qwen1.5-7b",), Request(100, 20, question=kind), "nominal")
        for kind in ("fresh", "cached")
    )
    reads = [side.compressor for side in sides].index("quecc")
    other = 1 - reads
    assert fresh.flops["question"][other, 0] == 0
    assert fresh.flops["question"][reads, 0] == pytest.approx(
        cost.pass_flops(zoo.decoder("qwen1.5-7b"), 100, 100, 0).total
    )
    assert cached.flops["prefill"][reads, 0] == fresh.flops["prefill"][reads, 0]
    assert cached.flops["prefill"][other, 0] < fresh.flops["prefill"][other, 0] / 5
    assert cached.cache_bytes[other, 0] == fresh.cache_bytes[other, 0]


def test_a_7b_prefill_is_bound_by_its_weights_at_batch_1_and_by_compute_at_32():
    spec, times = zoo.decoder("llama2-7b"), {}
    for batch in (1, 32):
        request = Request(50, 20, batch, on=chips.chip("v6e"), efficiency=chips.IDEAL)
        times[batch] = [latency.time(latency.prefill_work(spec, v, request), request) for v in (1, 144, 576)]
    assert [t.binds for t in times[1]][:2] == ["memory", "memory"]
    assert times[1][0].secs * 1e3 == pytest.approx(8.8, rel=0.07)
    assert times[1][1].secs < 1.1 * times[1][0].secs
    assert [t.binds for t in times[32]] == ["compute"] * 3
    assert [t.secs * 1e3 for t in times[32]] == pytest.approx([24.8, 94.5, 304.8], rel=0.08)


def test_budgets_follow_from_each_other(law):
    request = Request(50, 20, 16, on=chips.chip("h100"), chips=2)
    money = Budget("usd_per_million_requests", 20.0, 2.5)
    secs = budgets.secs(money, request)
    assert secs * 2 / 16 * 1e6 / 3600 * 2.5 == pytest.approx(20.0)  # chip-hours of a million requests, times the price
    plan = frontier.plan(law, money, request, family="reasoning", llms=LLMS)
    assert plan.choices[0].latency_ms <= secs * 1e3
    small = frontier.plan(law, Budget("cache_mb", 20.0), Request(50, 20), family="reasoning", llms=LLMS)
    assert max(choice.cache_bytes for choice in small.choices) <= 20e6
    assert small.choices[0].binds == "memory"


def test_what_does_not_fit_the_chip_is_left_out(law):
    plan = frontier.plan(
        law, Budget("latency_ms", 1e6), Request(50, 20, on=chips.chip("v5e")), family="reasoning", top=1000
    )
    assert max(choice.memory_bytes for choice in plan.choices) <= 16e9
    assert {choice.llm for choice in plan.choices} >= {"qwen1.5-4b"}


def test_a_law_that_knows_its_models_plans_with_them():
    measured = {"encoders": ["glyph-64"], "llms": ["d24", "d48", "gone"], "compressors": ["blind", "resampler"]}
    assert catalogue.names(measured, (), (), ()) == (("glyph-64",), ("d24", "d48"), ("resampler",))
    assert catalogue.names(measured, (), ("qwen1.5-7b",), ())[1] == ("qwen1.5-7b",)
    nothing = {"encoders": [], "llms": [], "compressors": []}
    encoders, llms, compressors = catalogue.names(nothing, (), (), ())
    assert "clip-l14-336" in encoders
    assert not {"glyph-64", "d24"} & {*encoders, *llms}
    assert "blind" not in compressors


def test_extrapolation_is_marked(law):
    plan = frontier.plan(
        law, Budget("tflops", 50), Request(50, 20), family="reasoning", llms=("qwen1.5-7b", "qwen1.5-14b"), top=100,
        encoders=("siglip-so400m14-384",), compressors=("none",), tokens=(729,),
    )  # fmt: skip
    for choice in plan.choices:
        found = {warning.partition(":")[0] for warning in choice.warnings}
        assert found == {"extrapolates_tokens"} | ({"extrapolates_params"} if choice.llm == "qwen1.5-14b" else set())


def test_choices_know_how_sure_they_are(law):
    plan = frontier.plan(law, Budget("tflops", 2), Request(50, 20), family="reasoning", llms=LLMS)
    for choice in plan.choices:
        assert choice.low <= choice.predicted_error <= choice.high
        assert choice.beats_next is None or 0 <= choice.beats_next <= 1
    assert plan.choices[0].beats_next >= 0.5
    assert plan.by_mode["full"] == plan.choices[0]._replace(beats_next=plan.by_mode["full"].beats_next)


def test_offsets_are_added_at_equal_tokens_and_told(law):
    shifts = offsets.read(PUBLISHED.with_name("compressors_vicuna7b.csv"))
    assert shifts["tokenpacker", 1] == 0
    points = {
        "gqa": 0.1,
        "mmbench": 0.7,
        "mme": 6.7 / 20,
        "pope": 0.6,
        "scienceqa": 0.5,
        "textvqa": 0.6,
        "vizwiz": 3.0,
        "vqav2": 0.4,
    }
    assert shifts["quecc", 1] == pytest.approx(-sum(points.values()) / len(points) / 100)
    how = {"family": "reasoning", "llms": ("qwen1.5-7b",), "encoders": ("clip-l14-336",), "tokens": (1,)}
    plain, moved = (
        frontier.plan(law, Budget("tflops", 9), Request(50, 20), compressors=("quecc",), offsets=o, **how).choices[0]
        for o in ({}, shifts)
    )
    assert moved.predicted_error - plain.predicted_error == pytest.approx(shifts["quecc", 1])


@pytest.mark.parametrize(
    ("budget", "request_", "how", "message"),
    [
        (Budget("tflops", 1e-9), Request(), {}, "nothing meets tflops=1e-09; the least is"),
        (Budget("tflops", 0), Request(), {}, "must be above 0"),
        (Budget("watts", 1), Request(), {}, "unknown budget"),
        (Budget("latency_ms", 5), Request(), {}, "needs a chip"),
        (Budget("usd_per_million_requests", 5), Request(on=chips.chip("v4")), {}, "needs a price"),
        (Budget("latency_ms", 5), Request(on=chips.chip("v5e")), {"llms": ("qwen1.5-72b",)}, "nothing fits into 1 v5e"),
        (Budget("latency_ms", 1e-6), Request(on=chips.chip("v4")), {}, "the least is"),
        (Budget("cache_mb", 1e-6), Request(), {}, "the least is"),
        (Budget("tflops", 1), Request(batch=0), {}, "--batch 0 must be 1 or more"),
        (Budget("tflops", 1), Request(math.nan), {}, "--question-tokens nan must be 0 or more"),
        (Budget("tflops", 1), Request(), {"mode": "fast"}, "unknown mode"),
        (Budget("tflops", 1), Request(), {"llms": ("gpt",)}, "unknown llm"),
        (Budget("tflops", 1), Request(), {"encoders": ("dino",)}, "unknown encoder"),
        (Budget("tflops", 1), Request(), {"compressors": ("zip",)}, "unknown compressor"),
        (Budget("tflops", 1), Request(), {"tokens": (10_000,)}, "no compressor here gives it"),
        (Budget("tflops", 1), Request(), {"family": "video"}, "unknown family"),
        (Budget("tflops", 1), Request(), {"family": None}, "several families"),
    ],
)
def test_a_plan_that_cannot_be_is_told(law, budget, request_, how, message):
    with pytest.raises(UserError, match=message):
        frontier.plan(law, budget, request_, **{"family": "reasoning", **how})


def test_calibration_recovers_planted_efficiencies(tmp_path):
    rows = ["chip,chips,flops,bytes,secs"]
    v6e = chips.chip("v6e")
    for flops, moved in ((1e14, 1e9), (3e14, 1e10), (1e12, 1e11), (1e11, 3e11)):
        rows.append(f"v6e,1,{flops},{moved},{chips.part_time(flops, moved, v6e, 1, chips.Efficiency(0.45, 0.7)).secs}")
    path = tmp_path / "measured.csv"
    path.write_text("\n".join(rows) + "\n")
    found = latency.calibrate(path)
    assert (found.compute, found.bandwidth) == pytest.approx((0.45, 0.7))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("chip,flops\nv6e,1\n", "needs a header"),
        ("chip,chips,flops,bytes,secs\nv6e,1,x,1,1\n", r"measured\.csv:2: .* must be numbers"),
        ("chip,chips,flops,bytes,secs\nv6e,1,1e15,1,0.1\n", "faster than the peak of v6e"),
        ("chip,chips,flops,bytes,secs\nv6e,1,1,1,0\n", "must be above 0"),
        ("chip,chips,flops,bytes,secs\nv9,1,1,1,1\n", "unknown chip"),
    ],
)
def test_a_bad_calibration_is_told(tmp_path, text, message):
    (tmp_path / "measured.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        latency.calibrate(tmp_path / "measured.csv")


def test_the_paper_cost_warns_of_a_model_that_does_not_fit(law) -> None:
    """2 N (Q + V) knows no memory: 72B in bfloat16 is more than the 32 GB of one v6e. The full cost leaves it out."""
    request = Request(50, 20, batch=32, on=chips.chip("v6e"))
    budget, only = Budget("tflops", 100.0), ("qwen1.5-72b", "qwen1.5-7b")
    told = {
        mode: {choice.llm: any(w.startswith("does_not_fit: ") for w in choice.warnings) for choice in found}
        for mode in ("paper", "full")
        for found in [frontier.plan(law, budget, request, family="reasoning", mode=mode, llms=only, top=999).choices]
    }
    assert told == {"paper": {"qwen1.5-72b": True, "qwen1.5-7b": False}, "full": {"qwen1.5-7b": False}}
