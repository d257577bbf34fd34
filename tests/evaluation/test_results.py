"""Rows survive crashes and concurrent writers, and errors in files are one line."""

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor

import builders
import pytest
from filelock import FileLock
from result_rows import row

from vlm_jax.core import specs
from vlm_jax.core.errors import UserError
from vlm_jax.evaluation import results

MODEL = specs.to_dict(builders.model())


def test_a_row_spells_out_its_model(tmp_path):
    one = row(compressor="resampler", visual_tokens=4, model=builders.model())
    results.append(tmp_path / "rows.jsonl", one)
    assert json.loads((tmp_path / "rows.jsonl").read_text())["model"] == MODEL
    assert results.read(tmp_path / "rows.jsonl") == [one]


def test_what_was_appended_is_read(tmp_path):
    path = tmp_path / "deep" / "rows.jsonl"
    rows = [row(cell="a", error=0.25, spec_hash="x"), row(cell="b", seed=3, spec_hash="y")]
    for one in rows:
        results.append(path, one)
    assert results.read(path) == rows
    assert results.done(path) == {"x", "y"}
    assert results.done(tmp_path / "none.jsonl") == set()


def test_writers_do_not_mix_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: results.append(path, row(cell="c" * 500, spec_hash=str(i))), range(64)))
    assert results.done(path) == {str(i) for i in range(64)}


def test_a_reader_waits_for_a_writer(tmp_path):
    """A line that is being written, under the lock that `append` takes, is read whole."""
    path = tmp_path / "rows.jsonl"
    results.append(path, row(spec_hash="x"))
    line = results.to_line(row(spec_hash="y"), path)
    with ThreadPoolExecutor(1) as pool:
        with FileLock(f"{path}.lock"), path.open("a") as file:
            file.write(line[:20])
            file.flush()
            reading = pool.submit(results.done, path)
            with pytest.raises(TimeoutError):
                reading.result(timeout=0.1)
            file.write(line[20:])
        assert reading.result() == {"x", "y"}


def test_reading_leaves_no_trace(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(results.to_line(row(spec_hash="x"), path))
    assert results.done(path) == {"x"}
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_half_written_line_is_named_and_swallows_nothing(tmp_path):
    path = tmp_path / "rows.jsonl"
    results.append(path, row(spec_hash="x"))
    with path.open("a") as file:
        file.write('{"cell": "half')
    with pytest.raises(UserError, match=r"rows\.jsonl:2: a half-written last line: .* delete it"):
        results.read(path)
    results.append(path, row(spec_hash="y"))
    with pytest.raises(UserError, match=r"rows\.jsonl:2"):
        results.read(path)
    whole = [line for line in path.read_text().splitlines() if line.endswith("}")]
    assert [json.loads(line)["spec_hash"] for line in whole] == ["x", "y"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"error": None}, r"rows\.jsonl:1: missing field\(s\) error"),
        ({"colour": "red"}, r"rows\.jsonl:1: unknown field\(s\) colour"),
        ({"error": "0.5"}, r"rows\.jsonl:1: error: expected a finite float, got '0\.5'"),
        ({"llm_params": 1.5}, r"llm_params: expected a finite int, got 1\.5"),
        ({"cell": 3}, "cell: expected text, got 3"),
        ({"model": None}, r"rows\.jsonl:1: missing field\(s\) model; evaluate the cell again"),
        ({"model": MODEL | {"encoder": None}}, r"rows\.jsonl:1: model: expected the row's encoder 'test', got None"),
        ({"visual_tokens": 2}, "model: expected 2 tokens, got 1"),
        ({"model": {"encoder": None}}, r"rows\.jsonl:1: model\.compressor is missing"),
        ({"model": {**MODEL, "mask": 1}}, r"rows\.jsonl:1: model\.mask: expected str, got 1"),
        ({"model": {**MODEL, "mode": 1}}, r"rows\.jsonl:1: model\.mode: unknown field 'mode'"),
    ],
)
def test_an_invalid_line_is_an_error(tmp_path, change, message):
    values = {**dataclasses.asdict(row()), **change}
    values = {name: value for name, value in values.items() if value is not None}
    (tmp_path / "rows.jsonl").write_text(json.dumps(values) + "\n")
    with pytest.raises(UserError, match=message):
        results.read(tmp_path / "rows.jsonl")


def test_a_row_that_is_not_finite_is_not_written(tmp_path):
    with pytest.raises(UserError, match="expected a finite number, got error=nan"):
        results.append(tmp_path / "rows.jsonl", row(error=float("nan")))
    assert not (tmp_path / "rows.jsonl").exists()


@pytest.mark.parametrize("name", ["file/rows.jsonl", "folder"])
def test_an_unwritable_file_is_an_error(tmp_path, name):
    """Beforehand too, and then without a trace."""
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for attempt in (results.check_writable, lambda path: results.append(path, row())):
        with pytest.raises(UserError, match=rf"{name}: cannot write rows here \(.+\)"):
            attempt(tmp_path / name)
    results.check_writable(tmp_path / "new" / "rows.jsonl")
    results.check_writable(tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        results.read(tmp_path / "none.jsonl")


@pytest.mark.parametrize("name", ["fastv", "victor", "pyramiddrop"])
def test_stages_beyond_the_decoder_are_refused_with_the_nearest_depth(tmp_path, name):
    """A row edited by hand: MODEL's decoder has 2 layers, so that at most one layer or stage is possible."""
    path = tmp_path / "rows.jsonl"
    line = json.loads(results.to_line(row(compressor=name), path))
    path.write_text(json.dumps(line) + "\n")
    assert results.read(path) == [row(compressor=name)]
    line["model"]["compressor"]["depth"] = 40
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(UserError, match=r"rows\.jsonl:1: model\..*2 layers \(nearest possible: compressor\.depth=1\)$"):
        results.read(path)


def test_encoder_layers_beyond_its_depth_are_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    for field, value in (("feature_layer", 4), ("taps", [1, 9]), ("attention_layer", 5)):
        line = json.loads(results.to_line(row(), path))
        line["model"]["encoder"][field] = value
        path.write_text(json.dumps(line) + "\n")
        with pytest.raises(UserError, match=rf"rows\.jsonl:1: model\.encoder\.{field}: expected at most the depth, 3"):
            results.read(path)
