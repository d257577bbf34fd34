"""The GPU experiment's results, their resumption, the planner's arithmetic, and the page."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from experiments.gpu import cases, correctness, goldens, planner, run, sizes, table, training
from experiments.gpu import results as rows_of
from experiments.gpu.cases import Case, run_cases
from experiments.gpu.results import Results
from vlm_jax.core.errors import UserError
from vlm_jax.ops.masks import attention_mask
from vlm_jax.sizing import chips, cost
from vlm_jax.sizing.chips import Efficiency

NEVER = float("inf")


def fails() -> None:
    raise ValueError("no such kernel")


def case(name: str, value: float = 1.0) -> Case:
    return Case(name, lambda: value, lambda prepared: {"value": prepared})


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return Results(tmp_path / "results.jsonl", "card", "1.0")


def test_the_page_is_that_of_the_results() -> None:
    page = (run.HERE / "README.md").read_text()
    assert table.markdown(rows_of.read(run.RESULTS), sizes.GPU) in page


def test_without_results_every_cell_is_empty() -> None:
    lines = [line for line in table.markdown([], sizes.GPU).splitlines() if line.startswith("| qwen")]
    assert len(lines) == 4 + 8 + 8
    assert all("not measured" in line or "calibrates" in line for line in lines)


def test_an_exception_is_a_result_and_the_next_case_runs(results: Results) -> None:
    broken = [Case("compile", fails, lambda _: {}), Case("measure", lambda: None, lambda _: fails())]
    run_cases("part", [*broken, case("good")], results, NEVER, workers=2)
    found = results.rows("part")
    assert [found[name].get("error") for name in ("compile", "measure")] == ["ValueError: no such kernel"] * 2
    assert results.measured("part").keys() == {"good"}


def test_too_little_memory_is_a_result_of_a_train_step_and_an_error_elsewhere(results: Results) -> None:
    def full() -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    decoder, tokens, choices = sizes.GPU.decoders[0], sizes.GPU.tokens[0], sizes.GPU.choices
    names = [training.choice_name(decoder, tokens, choice) for choice in choices]
    large = [Case(name, full, lambda _: {}, may_not_fit=True) for name in names]
    run_cases("training", large[:1], results, NEVER, workers=1)
    assert "| does not fit |" not in table.markdown(rows_of.read(results.path), sizes.GPU)  # the other choices may
    run_cases("training", large, results, NEVER, workers=1)
    run_cases("planner", [Case("cell", full, lambda _: {})], results, NEVER, workers=1)
    assert set(results.measured("training")) == set(names)
    assert results.measured("planner") == {}
    text = table.markdown(rows_of.read(results.path), sizes.GPU)
    assert f"| {training.cell_name(decoder, tokens)} |{' does not fit |' * 6}" in text
    assert f"Does not fit: {'; '.join(sorted(names))}." in text
    assert "* planner, cell: RuntimeError: RESOURCE_EXHAUSTED: out of memory" in text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("finite", [[], [0.5], [0.5, 3.0]])
def test_what_is_not_finite_is_the_worst_value_and_fails_the_run(
    results: Results, capsys: pytest.CaptureFixture[str], value: float, finite: list[float]
) -> None:
    kind = "logits, float32, default precision"
    for number, each in enumerate([*finite, value, *finite]):
        results.add("correctness", f"model {number}", kind=kind, relative=each, max_abs=each, ok=each < 0.6)
    assert run.main(["--table", "--out", str(results.path)]) == 1
    shown = capsys.readouterr().out
    (line,) = (line for line in shown.splitlines() if line.startswith(f"| {kind}"))
    count = 2 * len(finite) + 1
    passed = sum(2 for each in finite if each < 0.6)
    assert line == f"| {kind} | {count} | {value} | 0.02 | {value} | {passed} of {count} |"
    assert f"* correctness, model {len(finite)}: out of tolerance" in shown


def test_a_parameter_that_is_not_a_number_is_the_largest_difference() -> None:
    zeros, some = np.zeros(2), np.array([0.0, np.nan])
    for found in ([zeros, some], [some, zeros]):
        assert np.isnan(correctness._largest(found, [zeros, zeros]))


def test_a_run_without_failures_ends_with_0(results: Results, capsys: pytest.CaptureFixture[str]) -> None:
    results.add("correctness", "model", kind="logits, float32, default precision", relative=0.01, max_abs=1.0, ok=True)
    assert run.main(["--table", "--out", str(results.path)]) == 0
    assert "1 of 1" in capsys.readouterr().out


def test_a_second_run_measures_what_is_missing_or_failed(results: Results) -> None:
    run_cases("part", [case("a"), Case("b", fails, lambda _: {})], results, NEVER, workers=1)
    run_cases("part", [case("a", 2.0), case("b", 2.0), case("c", 2.0)], results, NEVER, workers=2)
    assert {name: row["value"] for name, row in results.measured("part").items()} == {"a": 1.0, "b": 2.0, "c": 2.0}
    results._replace(device="other").add("part", "a", value=5.0)
    results.forget("part")
    assert [row["device"] for row in rows_of.read(results.path)] == ["other"]


def test_no_case_begins_after_the_deadline(results: Results) -> None:
    run_cases("part", [case("a")], results, time.monotonic() - 1, workers=1)
    assert results.rows("part") == {}


def test_the_deadline_holds_within_cases_that_were_prepared_together(
    results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(cases, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def tick(_: object) -> dict[str, float]:
        clock[0] += 1
        return {"value": clock[0]}

    run_cases("part", [Case(name, lambda: None, tick) for name in "abcd"], results, 1.5, workers=4)
    assert set(results.rows("part")) == {"a", "b"}


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_line_that_was_cut_off_costs_that_line_alone(results: Results, cut: int) -> None:
    results.add("part", "a", value=float("nan"))
    results.add("part", "b", value=2.0)
    results.path.write_bytes(results.path.read_bytes()[:-cut])
    results.add("part", "c", value=3.0)
    names = [row["name"] for row in rows_of.read(results.path)]
    assert names == (["a", "b", "c"] if cut == 1 else ["a", "c"])
    assert "NaN" not in results.path.read_text()


@pytest.mark.parametrize("at", [("h100", Efficiency(0.5, 0.7)), ("h200", Efficiency(0.6, 0.4))])
def test_a_device_that_follows_the_roofline_is_predicted_without_error(at) -> None:
    """Seconds computed here from FLOPs, bytes and efficiencies: calibration finds these efficiencies again."""
    chip, efficiency = chips.chip(at[0]), at[1]
    found = {}
    for model, batch in planner.cells(sizes.GPU):
        flops, moved = cost.flops(model, 50, 32).by_part, cost.moved_bytes(model, 50, 32, batch)
        parts = {"encoder": ("encoder",), "prefill": ("compressor", "question", "prefill"), "decode": ("decode",)}
        values = {}
        for name, within in parts.items():
            work, data = batch * sum(flops[part] for part in within), sum(moved[part] for part in within)
            secs = max(work / chip.peak_flops / efficiency.compute, data / chip.bandwidth / efficiency.bandwidth)
            values[name] = {"flops": work, "bytes": data, "secs": secs}
        calibrates = planner.calibrates(sizes.GPU, model, batch)
        found[planner.cell_name(model, batch)] = {"chip": chip.name, "calibrates": calibrates, "parts": values}
    errors = planner.prediction(sizes.GPU, found)
    assert len(errors) == len(found) / 2
    # The compressor is planned apart from prefill, and memory-bound where prefill is bound by compute.
    assert max(planner.median_errors(errors).values()) < 0.02
    assert max(abs(each["decode"]) for each in errors.values()) < 1e-9
    assert planner.prediction(sizes.GPU, dict(list(found.items())[1:])) == {}


def test_both_halves_of_the_cells_have_every_size() -> None:
    halves: dict[bool, list] = {True: [], False: []}
    for model, batch in planner.cells(sizes.GPU):
        kind = (model.decoder.name, model.compressor.tokens, batch)
        halves[planner.calibrates(sizes.GPU, model, batch)].append(kind)
    assert [set(each) for each in zip(*halves[True], strict=True)] == [
        set(each) for each in zip(*halves[False], strict=True)
    ]


def test_the_prompt_is_that_of_the_plan() -> None:
    model, batch = next(planner.cells(sizes.TOY))
    inputs = planner.prompt(model, batch, sizes.TOY)
    assert inputs.segment.sum(axis=1).tolist() == [model.compressor.tokens + sizes.TOY.question_tokens] * batch
    assert np.array_equal(np.unique(inputs.visual), np.arange(-1, model.compressor.tokens))


def test_a_wrong_flag_is_one_line() -> None:
    with pytest.raises(UserError, match="--toy are no measurements"):
        run.main(["--toy", "--table"])
    with pytest.raises(UserError, match="did you mean 'training'"):
        run.main(["--parts", "traning"])


def test_tables_of_a_file_without_results_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("no results\n")
    for name, told in (("none.jsonl", "a file with results, got none"), ("empty.jsonl", "got none"), ("", "a folder")):
        with pytest.raises(UserError, match=f"--out .*: expected .*{told}"):
            run.main(["--table", "--out", str(tmp_path / name)])


def test_goldens_are_all_models_with_logits() -> None:
    found = goldens.read()
    assert len({golden.name for golden in found}) == len(found) == 14 + 5 + 7 + 3
    for golden in found:
        batch, length, _ = golden.logits.shape
        assert len(golden.tokens) == batch
        assert length <= golden.tokens.shape[1]


@pytest.mark.parametrize("pattern", ["causal", "packed", "padded right", "padded left", "prefix"])
def test_comparisons_of_attention_have_the_masks_of_rows(pattern: str) -> None:
    """Padding alone has queries without keys, a prefix alone attends to what follows."""
    place = correctness.metadata(pattern, 4, 32)
    mask = np.asarray(attention_mask(place, place))[:, 0]
    assert bool(mask.any(-1).all()) == (pattern in ("causal", "prefix"))
    assert bool(np.triu(mask[0], 1).any()) == (pattern == "prefix")


def test_an_error_is_relative_to_the_spread_of_the_reference() -> None:
    reference = np.array([1.0, -1.0, 1.0, -1.0]) * 10
    found = correctness.difference(reference + np.array([3.0, 0.0, 0.0, 0.0]), reference)
    assert found == {"max_abs": 3.0, "relative": pytest.approx(0.15)}


def test_results_are_json_of_one_line(results: Results) -> None:
    row = results.add("part", "a", nested={"x": float("inf"), "y": 1}, ok=True)
    assert json.loads(results.path.read_text()) == row
    assert row["nested"] == {"x": "inf", "y": 1}
