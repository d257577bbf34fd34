"""Fits: reproduced results, intervals, warnings, and the law file."""

import json

import numpy as np
import pytest
import result_rows
import tables
from tables import PUBLISHED

from vlm_jax.core.errors import UserError
from vlm_jax.scaling import fit, lawfile, laws, scores

pytestmark = pytest.mark.xdist_group("law")  # of one fit
FEW = {"bootstraps": 60, "seed": 0}


def codes(family):
    return {warning.partition(":")[0] for warning in family.warnings}


def test_the_published_scores_give_the_known_law(law):
    one = law.family("reasoning")
    basic = one.forms["multiplicative"]
    assert basic.params["alpha"] == pytest.approx(0.0709, abs=5e-5)
    assert basic.params["beta"] == pytest.approx(0.0151, abs=5e-5)
    assert basic.sse <= 3.794e-4
    assert one.ratio["value"] == pytest.approx(4.70, abs=0.01)
    assert one.forms["semilog"].sse == pytest.approx(2.805e-4, rel=1e-3)
    assert law.family("ocr").ratio["value"] == pytest.approx(0.72, abs=0.005)
    assert law.family("ocr").forms["multiplicative"].sse == pytest.approx(5.1e-3, rel=0.01)


def test_small_models_predict_the_large_one(law):
    for form in ("multiplicative", "semilog"):
        largest = law.family("reasoning").forms[form].largest_out
        assert largest["llm_params_billion"] == 7
        assert largest["max_relative_error"] < 0.01


def test_leaving_one_size_out_equals_a_fit_of_the_others(law):
    rows = scores.read(PUBLISHED).of("reasoning")
    small = rows._replace(cells=tuple(c for c in rows.cells if c.params < 7))
    expected = fit.fit(small, "semilog", **FEW).family(None).forms["semilog"].params
    actual = law.family("reasoning").forms["semilog"].largest_out["params"]
    assert actual == pytest.approx(expected, rel=1e-6)


def test_known_problems_of_the_published_rows_give_warnings(law):
    assert {"d_not_identified", "blind_missing", "optimum_on_edge"} <= codes(law.family("reasoning"))
    assert {"repeated_values", "non_monotone"} <= codes(law.family("ocr"))
    assert "repeated_values" not in codes(law.family("reasoning"))


def test_same_rows_and_seed_give_the_same_bytes(tmp_path):
    rows = scores.read(PUBLISHED).of("ocr")
    for name in ("a", "b"):
        lawfile.write(tmp_path / name, fit.fit(rows, "additive", **FEW))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    other = fit.fit(rows, "additive", bootstraps=60, seed=1)
    assert lawfile.dumps(other) != (tmp_path / "a").read_text()


def test_a_law_file_round_trips(tmp_path, law):
    lawfile.write(tmp_path / "law.json", law)
    again = lawfile.read(tmp_path / "law.json")
    assert lawfile.dumps(again) == (tmp_path / "law.json").read_text()
    chosen = json.loads((tmp_path / "law.json").read_text())["families"]["ocr"]["chosen"]
    assert again.family("ocr").predict(2.0, 16) == pytest.approx(law.family("ocr").predict(2.0, 16))
    assert len(again.family("ocr").forms[chosen].draws["alpha"]) == 60


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected an object, got list"),
        ('{"version": 99}', "expected version 2, got 99"),
        ('{"version": 2}', "expected a complete law"),
    ],
)
def test_a_broken_law_file_raises(tmp_path, text, message):
    (tmp_path / "law.json").write_text(text)
    with pytest.raises(UserError, match=message):
        lawfile.read(tmp_path / "law.json")


def made(values, noise=0.003, seeds=3, seed=0, form="multiplicative", **how):
    """A table of replicates of a planted law."""
    n, v = (np.tile(x, seeds) for x in tables.grid())
    rng = np.random.default_rng(seed)
    error = laws.predict(form, values, n, v) * np.exp(noise * rng.standard_normal(len(n)))
    return tables.of(error, n, v, np.repeat(range(seeds), len(n) // seeds).tolist(), **how)


def test_beta_0_leaves_the_ratio_unbounded_and_the_difference_bounded():
    rows = made({"A": 0.3, "alpha": 0.4, "beta": 0.0, "D": 0.0}, 0.05)
    one = fit.fit(rows, "multiplicative", **FEW).family(None)
    assert one.ratio["low"] is None
    assert one.ratio["high"] is None
    assert "ratio_unbounded" in codes(one)
    assert one.difference["low"] <= 0.4 <= one.difference["high"]
    assert one.difference["high"] - one.difference["low"] < 0.3


def test_replicates_separate_noise_from_lack_of_fit():
    values = {"A": 0.5, "alpha": 0.1, "beta": 0.05, "D": 0.0}
    right = fit.fit(made(values), "multiplicative-fixed", **FEW).family(None)
    assert right.rows["noise"]["replicates"] == 56
    assert right.rows["noise"]["stdev"] == pytest.approx(0.003 * 0.45, rel=0.25)
    assert right.rows["noise"]["lack_of_fit_p"] > 0.01
    wrong = fit.fit(made(values), "semilog", **FEW).family(None)
    assert "lack_of_fit" in codes(wrong)
    assert "duplicated_cells" not in codes(right)


def test_a_second_row_without_a_seed_is_a_duplicate():
    n, v = tables.grid()
    error = laws.predict("multiplicative", {"A": 0.5, "alpha": 0.1, "beta": 0.05, "D": 0.0}, n, v)
    rows = tables.of(np.append(error, error[0]), np.append(n, n[0]), np.append(v, v[0]))
    assert "duplicated_cells" in codes(fit.fit(rows, "multiplicative", **FEW).family(None))


def test_few_cells_give_a_warning():
    rows = tables.of([0.5, 0.4, 0.3, 0.25, 0.2], np.array([1, 1, 2, 2, 4.0]), np.array([1, 4, 1, 4, 4.0]))
    one = fit.fit(rows, "interaction", **FEW).family(None)
    assert "few_cells" in codes(one)
    assert one.forms["interaction"].aicc is None


def study_rows(blind):
    """Project rows, with a blind baseline of that error where it is not None."""
    law_ = {"A": 0.002, "alpha": 0.5, "beta": 0.5, "D": 0.0}
    for params in (14_000, 56_000, 222_000):
        for tokens in (0, 1, 4, 16) if blind is not None else (1, 4, 16):
            error = float(laws.predict("multiplicative", law_, params / 1e9, tokens)) if tokens else blind
            yield result_rows.row(family="ocr", llm_params=params, visual_tokens=tokens, error=error)


def test_result_rows_count_parameters_in_billions():
    law = fit.fit(study_rows(blind=0.9), "multiplicative-fixed", **FEW)
    params = law.family("ocr").forms["multiplicative-fixed"].params
    assert law.unit == {"llm_params": 1e9, "params_are": "non_embedding"}
    assert params["alpha"] == pytest.approx(0.5)
    assert params["A"] == pytest.approx(0.002, rel=1e-6)
    assert "blind_missing" not in codes(law.family("ocr"))


def test_floor_blind_divides_errors_by_the_blind_error():
    law = fit.fit(study_rows(blind=0.8), "multiplicative-fixed", floor="blind", **FEW)
    assert law.family("ocr").forms["multiplicative-fixed"].params["A"] == pytest.approx(0.002 / 0.8, rel=1e-6)
    with pytest.raises(UserError, match="--floor blind: expected a row with visual_tokens=0"):
        fit.fit(study_rows(blind=None), "multiplicative-fixed", floor="blind", **FEW)


def test_rows_worse_than_blind_give_a_warning():
    law = fit.fit(study_rows(blind=0.1), "multiplicative-fixed", **FEW)
    assert "above_blind" in codes(law.family("ocr"))


@pytest.mark.parametrize(
    ("error", "params", "tokens", "how", "message"),
    [
        ([0.5, 0.4], [1, 1], [1, 4], {}, "expected two or more LLM sizes, got 1 only"),
        ([0.5, 0.4], [1, 2], [4, 4], {}, "expected two or more numbers of visual tokens, got 4 only"),
        ([0.5, 0.4], [1, 2], [0, 0], {}, "expected rows with visual_tokens above 0"),
        ([0.5, 0.0], [1, 2], [1, 4], {"loss": "log"}, "expected an error above 0, got 0"),
        ([0.5, 0.4], [1, 2], [1, 4], {"fixed_floor": 0.45}, "expected an error of at least 0.45, got 0.4 "),
        ([0.5, 0.4], [1, 2], [1, 4], {"form": "multiplicativ"}, "did you mean 'multiplicative'"),
        ([0.5, 0.4], [1, 2], [1, 4], {"family": "other"}, "unknown family 'other'"),
        ([0.5, 0.4], [1, 2], [1, 4], {"loss": "l1"}, "unknown loss"),
        ([0.5, 0.4], [1, 2], [1, 4], {"floor": "zero"}, "unknown floor"),
    ],
)
def test_rows_that_no_law_fits_raise(error, params, tokens, how, message):
    with pytest.raises(UserError, match=message):
        fit.fit(tables.of(error, np.array(params, float), np.array(tokens, float)), **how, **FEW)
