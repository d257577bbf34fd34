"""The test of lack of fit against regression by hand, its level and power, and what follows where no form fits."""

import json

import numpy as np
import pytest
import tables
from scipy import stats

from vlm_jax import fit_law, plan
from vlm_jax.core.errors import UserError
from vlm_jax.scaling import fit, frontier, lack_of_fit, lawfile, laws, page, plots, report, scores, solve
from vlm_jax.scaling.budgets import Budget
from vlm_jax.scaling.fitted import LackOfFit
from vlm_jax.sizing.roofline import Request

TRUE = {"A": 0.59, "alpha": 0.04, "beta": 0.01}
N, V = tables.grid()
SIGMA = 0.003
FEW = {"bootstraps": 60, "seed": 0}
LLMS = {0.5: "qwen1.5-0.5b", 1.8: "qwen1.5-1.8b", 4.0: "qwen1.5-4b", 7.0: "qwen1.5-7b"}
NAMED = ("--encoders", "clip-l14-336", "--compressors", "tokenpacker", "--llms", *LLMS.values())


def outcome(error, params, tokens, stderr, loss="squared", weight=None, form="semilog"):
    weight = np.ones_like(error) if weight is None else weight
    of = solve.problem(laws.form(form), params, tokens, error, weight, loss)
    _, cell = np.unique(np.stack([params, tokens]), axis=1, return_inverse=True)
    return lack_of_fit.test(of, solve.solve(of, seed=0), cell.astype(float), np.broadcast_to(stderr, error.shape), 0)


def test_replicates_give_the_textbook_f_test():
    """By ordinary least squares in ln N and ln V, and SciPy's F distribution."""
    n, v = np.repeat(N, 3), np.repeat(V, 3)
    noise = SIGMA * np.random.default_rng(0).standard_normal(len(n))
    error = laws.predict("semilog", TRUE, n, v) + 0.002 * np.sin(3 * np.log(n)) + noise
    design = np.stack([np.ones_like(n), np.log(n), np.log(v)], axis=1)
    total = np.linalg.lstsq(design, error, rcond=None)[1][0]
    pure = np.sum((error.reshape(28, 3) - error.reshape(28, 3).mean(1, keepdims=True)) ** 2)
    expected = stats.f.sf((total - pure) / (28 - 3) / (pure / 56), 28 - 3, 56)
    found = outcome(error, n, v, np.nan)
    assert found.noise == "seeds"
    assert found.p == pytest.approx(expected, rel=1e-6)


def test_standard_errors_give_the_chi_squared_test():
    """Of unequal ones: by least squares of standardized rows."""
    rng = np.random.default_rng(1)
    stderr = rng.uniform(0.5, 2, 28) * SIGMA
    error = laws.predict("semilog", TRUE, N, V) + 1.2 * stderr * rng.standard_normal(28)
    design = np.stack([np.ones_like(N), np.log(N), np.log(V)], axis=1) / stderr[:, None]
    expected = stats.chi2.sf(np.linalg.lstsq(design, error / stderr, rcond=None)[1][0], 25)
    found = outcome(error, N, V, stderr)
    assert found.noise == "images"
    assert found.p == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("noise", ["seeds", "images"])
@pytest.mark.parametrize(("form", "loss"), [("semilog", "squared"), ("multiplicative-fixed", "log")])
def test_a_true_law_is_rejected_as_often_as_its_level_says(noise, form, loss):
    values = TRUE if form == "semilog" else {"A": 0.5, "alpha": 0.4, "beta": 0.2, "D": 0.0}
    n, v = (np.repeat(x, 2) if noise == "seeds" else x for x in (N, V))
    rng, p = np.random.default_rng(2), []
    for _ in range(150):
        error = laws.predict(form, values, n, v)
        size = SIGMA if loss == "squared" else 0.01 * error
        error = error + size * rng.standard_normal(len(n))
        p.append(outcome(error, n, v, np.nan if noise == "seeds" else size, loss, form=form).p)
    assert stats.kstest(p, "uniform").pvalue > 0.01


@pytest.mark.parametrize("noise", ["seeds", "images"])
def test_a_law_of_another_shape_is_rejected(noise):
    n, v = (np.repeat(x, 2) if noise == "seeds" else x for x in (N, V))
    error = laws.predict("semilog", TRUE, n, v) + 0.01 * (n > 5)
    error += SIGMA * np.random.default_rng(3).standard_normal(len(n))
    found = outcome(error, n, v, np.nan if noise == "seeds" else SIGMA)
    assert found.rejects
    assert 0.002 < found.misfit < 0.01


def test_rows_without_noise_are_not_tested():
    error = laws.predict("semilog", TRUE, N, V) + 0.01 * np.sin(N)
    assert outcome(error, N, V, np.nan) == LackOfFit("nothing", None, None)
    copies = (np.append(each, each[0]) for each in (error, N, V))  # a second copy of a row is no replicate
    assert outcome(*copies, np.nan).noise == "nothing"
    few = error[:3], N[[0, 8, 16]], V[[0, 1, 2]]
    assert outcome(*few, 0.01) == LackOfFit("images", None, None)  # as many rows as parameters


def test_rows_without_a_seed_are_no_replicates():
    twice = [np.append(each, each) for each in (laws.predict("semilog", TRUE, N, V), N, V)]
    twice[0][28:] += 0.001 * np.sin(np.arange(28))
    seeds = [0] * 28 + [1] * 28
    with_seeds, without = (fit.fit(tables.of(*twice, seeds=of), "semilog", **FEW).family(None) for of in (seeds, None))
    assert (with_seeds.rows["noise"]["replicates"], with_seeds.lack_of_fit.noise) == (28, "seeds")
    assert (without.rows["noise"]["replicates"], without.lack_of_fit.noise) == (0, "nothing")
    assert "cannot be tested: rows have no replicates" in without.verdict


def test_one_replicate_does_not_stand_for_all_where_images_are_known():
    error = laws.predict("semilog", TRUE, N, V) + 0.02 * np.sin(3 * N)
    error, n, v = (np.append(each, each[0] + shift) for each, shift in ((error, 1e-3), (N, 0), (V, 0)))
    found = outcome(error, n, v, SIGMA)
    assert (found.noise, found.rejects) == ("images", True)


def test_the_largest_size_is_covered_as_often_as_the_interval_says():
    """The count of covered cells passes for nearly all tables of a law, and for none of a law that ends at 4B."""
    rng, passes = np.random.default_rng(4), []
    for shift in (0.0, 0.03):
        found = []
        for _ in range(60):
            error = laws.predict("semilog", TRUE, N, V) + shift * (N > 5) + SIGMA * rng.standard_normal(28)
            of = solve.problem(laws.form("semilog"), N, V, error, np.ones(28), "squared")
            found.append(lack_of_fit.covered(of, N, 0, 200)[2])
        passes.append(np.mean(found))
    assert passes[0] > 0.85
    assert passes[1] == 0


def bent(seeds=2):
    """Rows in which the 1.8B model is far worse than any law of N says."""
    n, v = np.tile(N, seeds), np.tile(V, seeds)
    noise = SIGMA * np.random.default_rng(5).standard_normal(len(n))
    error = laws.predict("semilog", TRUE, n, v) + 0.1 * (n == 1.8) + noise
    return tables.of(error, n, v, np.repeat(range(seeds), len(N)).tolist())


@pytest.fixture(scope="module")
def bent_law():
    return fit.fit(bent(), **FEW)


def test_where_no_form_fits_the_law_says_so(bent_law, tmp_path):
    one = bent_law.family(None)
    assert not one.fits
    assert one.verdict.startswith(f"no form fits: {one.chosen} misses cells by 0.0")
    assert "lack_of_fit" in {warning.partition(":")[0] for warning in one.warnings}
    lawfile.write(tmp_path / "law.json", bent_law)
    again = lawfile.read(tmp_path / "law.json").family(None)
    assert (again.verdict, again.predicts, again.measured.tokens) == (one.verdict, "cells", [int(v) for v in V])


def test_a_plan_without_a_law_ranks_measured_cells(bent_law):
    names = dict(encoders=("clip-l14-336",), compressors=("tokenpacker",))
    found = frontier.plan(bent_law, Budget("tflops", 5), Request(50, 20), llms=tuple(LLMS.values()), top=99, **names)
    cells = {(c.params, c.tokens): [] for c in bent().cells}
    for cell in bent().cells:
        cells[cell.params, cell.tokens].append(cell.error)
    assert found.candidates == len(cells)
    for choice in found.choices:
        assert choice.predicted_error == pytest.approx(np.mean(cells[choice.llm_params_billion, choice.visual_tokens]))
        assert choice.high - choice.low == pytest.approx(2 * 1.96 * SIGMA / np.sqrt(2), rel=0.4)
    assert [c.predicted_error for c in found.choices] == sorted(c.predicted_error for c in found.choices)
    assert found.closed_form is None
    assert any("nothing between the cells is known" in note for note in found.notes)
    with pytest.raises(UserError, match="expected an LLM and V of the law's rows, as no form fits them"):
        frontier.plan(bent_law, Budget("tflops", 5), Request(50, 20), llms=("llama2-13b",), **names)


def test_tables_pages_and_figures_say_that_no_form_fits(bent_law, tmp_path, capsys):
    report.print_law(bent_law, report.console())
    printed = capsys.readouterr().out
    assert "no form fits" in printed
    assert "frontier of measured cells" in printed
    assert "at twice the largest size" not in printed
    lawfile.write(tmp_path / "law.json", bent_law)
    flags = ["--law", str(tmp_path / "law.json"), "--tflops", "5", *NAMED]
    assert plan.main([*flags, "--html", str(tmp_path / "page.html")]) == 0
    assert "no form fits" in capsys.readouterr().out
    assert "no form fits" in (tmp_path / "page.html").read_text().partition("<script>")[0]
    assert plan.main([*flags, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["closed_form"] is None
    assert page.notes(bent_law.family(None))[0].startswith("no form fits")
    for path in (
        plots.error_curves(bent(), bent_law, "made", tmp_path / "a.png"),
        plots.cost_frontier(bent_law, None, "made", tmp_path / "b.png"),
    ):
        assert path.stat().st_size > 10_000


def test_a_form_that_fits_is_preferred_to_a_lower_criterion():
    one = fit.fit(bent(), "semilog", **FEW).family(None).forms["semilog"]
    good, bad = LackOfFit("seeds", 0.5, 0.0), LackOfFit("seeds", 1e-4, 0.01)
    forms = {"semilog": one._replace(aicc=-200.0, lack_of_fit=bad)}
    sane = {"A": 0.5, "alpha": 0.1, "beta": 0.1, "D": 0.0}
    forms["multiplicative"] = one._replace(params=sane, aicc=-100.0, lack_of_fit=good)
    data = fit._Data.of(bent().cells, "equal")
    assert fit._choose(forms, data) == "multiplicative"
    forms["multiplicative"] = forms["multiplicative"]._replace(lack_of_fit=bad)
    assert fit._choose(forms, data) == "semilog"


def test_intervals_of_all_forms_are_given_when_asked_for(tmp_path):
    flags = ["--rows", str(tables.PUBLISHED), "--family", "ocr", "--bootstraps", "20", "--out"]
    assert fit_law.main([*flags, str(tmp_path / "few.json")]) == 0
    assert fit_law.main([*flags, str(tmp_path / "all.json"), "--intervals", "all"]) == 0
    few, every = (lawfile.read(tmp_path / name).family(None) for name in ("few.json", "all.json"))
    assert {key for key, one in few.forms.items() if one.interval} == {"multiplicative", few.chosen}
    assert all(set(one.interval) == set(one.params) for one in every.forms.values())
    for key in few.forms:
        assert few.forms[key].params == every.forms[key].params
    assert few.forms[few.chosen] == every.forms[few.chosen]
    with pytest.raises(UserError, match="unknown interval 'most'"):
        fit_law.main([*flags, str(tmp_path / "x.json"), "--intervals", "most"])


def test_questions_of_a_table_give_binomial_noise(tmp_path):
    lines = ["family,llm_params_billion,visual_tokens,mean_score,questions"]
    lines += ["qa,1,1,0.75,300", "qa,1,4,1.0,300", "qa,2,4,0.75,"]
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    first, perfect, unknown = scores.read(tmp_path / "rows.csv").cells
    assert first.stderr == pytest.approx((0.25 * 0.75 / 300) ** 0.5, rel=0.01)
    assert 0 < perfect.stderr < 0.01
    assert unknown.stderr is None
