"""The planner against brute force over model specs, against numerical minimisation, and against the paper's cost."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from tables import PUBLISHED

from vlm_jax.compress import catalog
from vlm_jax.core.errors import UserError
from vlm_jax.scaling import budgets, frontier, laws, offsets
from vlm_jax.scaling.budgets import Budget
from vlm_jax.sizing import chips, cost, zoo
from vlm_jax.sizing.roofline import Request

pytestmark = pytest.mark.xdist_group("law")  # of one fit
LLMS = ("qwen1.5-0.5b", "qwen1.5-1.8b", "qwen1.5-7b", "llama2-13b")
ENCODERS = ("clip-l14-336", "siglip-b16-224")
COMPRESSORS = ("pool", "quecc", "tokenpacker")
TOKENS = (1, 4, 14, 16, 49, 144, 576)


def models():
    """Every model of these names, by hand."""
    for encoder in map(zoo.encoder, ENCODERS):
        for compressor in COMPRESSORS:
            for tokens in set(catalog.row(compressor).tokens_out(encoder.grid)) & {*TOKENS}:
                for llm in LLMS:
                    yield catalog.model_spec(encoder, compressor, tokens, zoo.decoder(llm))


def measured(model):
    return (model.encoder.name, model.compressor.name, model.decoder.name[:7]) == (
        "clip-l14-336", "tokenpacker", "qwen1.5",
    )  # fmt: skip


@pytest.mark.parametrize("q", [0.5, 50, 500])
@pytest.mark.parametrize("form", ["multiplicative", "semilog"])
def test_the_closed_form_is_the_numerical_minimum(form, q):
    values = {"A": 0.6, "alpha": 0.07, "beta": 0.02} | ({"D": 0.1} if form == "multiplicative" else {})

    def along_the_budget(log_tokens):
        tokens = math.exp(log_tokens)
        return float(laws.predict(form, values, 100.0 / (q + tokens), tokens))

    found = minimize_scalar(along_the_budget, bounds=(-6, 9), method="bounded", options={"xatol": 1e-10})
    assert frontier.optimal_tokens(q, 0.07, 0.02) == pytest.approx(math.exp(found.x), rel=1e-3)


def test_the_closed_form_at_its_limits():
    assert frontier.optimal_tokens(50, 0.07, 0.07) == math.inf
    assert frontier.optimal_tokens(50, 0.03, 0.04) == math.inf
    assert frontier.optimal_tokens(50, 0.4, -0.1) == 0
    assert frontier.optimal_tokens(0, 0.4, 0.1) == 0


@pytest.mark.parametrize(("q", "tokens", "nearest"), [(0, 1.0, 1), (50, 13.5, 12), (100, 27.0, 24)])
def test_the_paper_mode_gives_the_known_numbers(law, q, tokens, nearest):
    plan = frontier.plan(law, Budget("tflops", 1.0), Request(q, 20), family="reasoning", mode="paper")
    assert plan.closed_form.visual_tokens == pytest.approx(tokens, abs=0.1)
    assert plan.closed_form.nearest_tokens == nearest
    assert plan.closed_form.llm_params_billion == pytest.approx(1e3 / (2 * (q + plan.closed_form.visual_tokens)))


def test_the_closed_form_is_clipped_where_tokens_always_pay(law):
    plan = frontier.plan(law, Budget("tflops", 1.0), Request(50, 20), family="ocr", tokens=(1, 16, 144))
    assert (plan.closed_form.visual_tokens, plan.closed_form.unclipped_tokens) == (144, None)


@pytest.mark.parametrize("mode", ["paper", "full"])
def test_the_ranking_equals_brute_force(law, mode):
    one, budget, request = law.family("reasoning"), Budget("tflops", 0.9), Request(50, 20)
    within = []
    for model in models():
        params, tokens = zoo.nominal_params(model.decoder.name) / 1e9, model.compressor.tokens
        real = cost.flops(model, 50, 20).total
        if (real if mode == "full" else 2e9 * params * (50 + tokens)) <= 0.9e12:
            within.append((not measured(model), float(one.predict(params, tokens)), real, model))
    plan = frontier.plan(
        law, budget, request, family="reasoning", mode=mode,
        encoders=ENCODERS, llms=LLMS, compressors=COMPRESSORS, tokens=TOKENS, top=10_000,
    )  # fmt: skip
    assert plan.feasible == len(within)
    assert plan.candidates == len(list(models()))
    first, best = plan.choices[0], min(within, key=lambda each: each[:3])
    assert first.model == best[3]
    assert (first.predicted_error, first.flops) == pytest.approx(best[1:3])
    order = [(not measured(choice.model), choice.predicted_error) for choice in plan.choices]
    assert order == sorted(order)
    assert len(order) == len({(far, m.decoder.name, m.compressor.tokens) for far, _, _, m in within})


def test_pareto_points_are_not_dominated():
    rng = np.random.default_rng(0)
    error, price = rng.uniform(size=200), rng.uniform(size=200)
    expected = {
        i for i in range(200) if not any((error[j] <= error[i]) & (price[j] <= price[i]) for j in range(200) if j != i)
    }
    assert set(frontier.pareto(error, price)) == expected


def test_budgets_convert_into_each_other(law):
    request = Request(50, 20, 16, on=chips.chip("h100"), chips=2)
    money = Budget("usd_per_million_requests", 20.0, 2.5)
    secs = budgets.secs(money, request)
    assert secs * 2 / 16 * 1e6 / 3600 * 2.5 == pytest.approx(20.0)  # chip-hours of a million requests, times the price
    plan = frontier.plan(law, money, request, family="reasoning", llms=LLMS)
    assert plan.choices[0].latency_ms <= secs * 1e3
    small = frontier.plan(law, Budget("cache_mb", 20.0), Request(50, 20), family="reasoning", llms=LLMS)
    assert max(choice.cache_bytes for choice in small.choices) <= 20e6
    assert small.choices[0].binds == "memory"


def test_models_that_do_not_fit_the_chip_are_excluded(law):
    plan = frontier.plan(
        law, Budget("latency_ms", 1e6), Request(50, 20, on=chips.chip("v5e")), family="reasoning", top=1000
    )
    assert max(choice.memory_bytes for choice in plan.choices) <= 16e9
    assert {choice.llm for choice in plan.choices} >= {"qwen1.5-4b"}


def test_extrapolation_is_marked(law):
    plan = frontier.plan(
        law, Budget("tflops", 50), Request(50, 20), family="reasoning", llms=("qwen1.5-7b", "qwen1.5-14b"), top=100,
        tokens=(288, 576),
    )  # fmt: skip
    assert {c.llm: c.extrapolates for c in plan.choices} == {"qwen1.5-7b": (), "qwen1.5-14b": ("params",)}
    far = frontier.plan(
        law, Budget("tflops", 50), Request(50, 20), family="reasoning", llms=("llama2-7b",), top=100,
        encoders=("siglip-so400m14-384",), compressors=("none",),
    )  # fmt: skip
    (choice,) = far.choices
    assert choice.extrapolates == ("encoder", "compressor", "family", "tokens")
    assert [warning.partition(":")[0] for warning in choice.warnings] == [
        f"extrapolates_{kind}" for kind in choice.extrapolates
    ]
    assert "siglip-so400m14-384, measured with clip-l14-336" in choice.warnings[0]


def test_extrapolated_choices_rank_behind_measured_ones(law):
    """Although pool is cheaper than TokenPacker at every V, and a small encoder than a large one."""
    plan = frontier.plan(
        law, Budget("tflops", 2), Request(50, 20), family="reasoning", top=10_000,
        encoders=ENCODERS, compressors=("pool", "tokenpacker"), llms=("qwen1.5-1.8b", "llama3.2-1b", "qwen1.5-7b"),
        tokens=TOKENS,
    )  # fmt: skip
    beyond = [bool(set(choice.extrapolates) & {"encoder", "compressor", "family"}) for choice in plan.choices]
    assert beyond == sorted(beyond)
    assert {False, True} == set(beyond)
    assert plan.extrapolated._replace(beats_next=None) == plan.choices[beyond.index(True)]._replace(beats_next=None)
    for choice, far in zip(plan.choices, beyond, strict=True):
        measured = (choice.encoder, choice.compressor) == ("clip-l14-336", "tokenpacker") and "qwen1.5" in choice.llm
        assert measured == (not far)


def test_choices_have_intervals_and_win_rates(law):
    plan = frontier.plan(law, Budget("tflops", 2), Request(50, 20), family="reasoning", llms=LLMS)
    for choice in plan.choices:
        assert choice.low <= choice.predicted_error <= choice.high
        assert choice.beats_next is None or 0 <= choice.beats_next <= 1
    assert plan.choices[0].beats_next >= 0.5
    assert plan.by_mode["full"] == plan.choices[0]._replace(beats_next=plan.by_mode["full"].beats_next)


def test_offsets_are_added_at_equal_tokens(law):
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
        (Budget("tflops", 0), Request(), {}, "expected tflops above 0, got 0"),
        (Budget("watts", 1), Request(), {}, "unknown budget"),
        (Budget("latency_ms", 5), Request(), {}, "expected a chip, got none"),
        (Budget("usd_per_million_requests", 5), Request(on=chips.chip("v4")), {}, "expected a price above 0, got none"),
        (Budget("latency_ms", 5), Request(on=chips.chip("v5e")), {"llms": ("qwen1.5-72b",)}, "nothing fits into 1 v5e"),
        (Budget("latency_ms", 1e-6), Request(on=chips.chip("v4")), {}, "the least is"),
        (Budget("cache_mb", 1e-6), Request(), {}, "the least is"),
        (Budget("tflops", 1), Request(batch=0), {}, "--batch: expected 1 or more, got 0"),
        (Budget("tflops", 1), Request(math.nan), {}, "--question-tokens: expected 0 or more, got nan"),
        (Budget("tflops", 1), Request(), {"mode": "fast"}, "unknown mode"),
        (Budget("tflops", 1), Request(), {"llms": ("gpt",)}, "unknown llm"),
        (Budget("tflops", 1), Request(), {"encoders": ("dino",)}, "unknown encoder"),
        (Budget("tflops", 1), Request(), {"compressors": ("zip",)}, "unknown compressor"),
        (Budget("tflops", 1), Request(), {"tokens": (10_000,)}, "expected numbers that a compressor gives, got 10000"),
        (Budget("tflops", 1), Request(), {"family": "video"}, "unknown family"),
        (Budget("tflops", 1), Request(), {"family": None}, "--family: expected one of ocr, reasoning"),
    ],
)
def test_invalid_plans_raise(law, budget, request_, how, message):
    with pytest.raises(UserError, match=message):
        frontier.plan(law, budget, request_, **{"family": "reasoning", **how})


def test_the_paper_cost_warns_of_a_model_that_does_not_fit(law) -> None:
    """2 N (Q + V) ignores memory: 72B in bfloat16 exceeds the 32 GB of one v6e. The full cost excludes it."""
    request = Request(50, 20, batch=32, on=chips.chip("v6e"))
    budget, only = Budget("tflops", 100.0), ("qwen1.5-72b", "qwen1.5-7b")
    warned = {
        mode: {choice.llm: any(w.startswith("does_not_fit: ") for w in choice.warnings) for choice in found}
        for mode in ("paper", "full")
        for found in [frontier.plan(law, budget, request, family="reasoning", mode=mode, llms=only, top=999).choices]
    }
    assert warned == {"paper": {"qwen1.5-72b": True, "qwen1.5-7b": False}, "full": {"qwen1.5-7b": False}}
