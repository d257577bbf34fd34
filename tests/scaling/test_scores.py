"""Every way a table can be bad is told with its file, its row and the fix."""

import pytest

from vlm_jax.core.errors import UserError
from vlm_jax.scaling import scores

HEAD = "family,llm_params_billion,visual_tokens,mean_score,note\n"


def write(tmp_path, text, name="rows.csv"):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_a_plain_table_is_read_with_its_extra_columns(tmp_path):
    rows = scores.read(write(tmp_path, HEAD + "ocr,0.5,4,0.25,copied\nocr,0.5,0,0.1,\n"))
    assert rows.params_are == "nominal"
    assert [(c.params, c.tokens, c.error) for c in rows.cells] == [(0.5, 4, 0.75), (0.5, 0, 0.9)]
    assert rows.cells[0].extra == {"note": "copied"}
    assert scores.blind_errors(rows.cells) == {0.5: 0.9}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("family,llm_params_billion,mean_score\nocr,1,0.5\n", r"rows\.csv: missing column\(s\) visual_tokens"),
        (HEAD + "ocr,1,4,nan,\n", r"rows\.csv:2: mean_score is 'nan'"),
        (HEAD + "ocr,1,4,0.5,\nocr,x,4,0.5,\n", r"rows\.csv:3: llm_params_billion is 'x'"),
        (HEAD + "ocr,1,4,1.5,\n", r"rows\.csv:2: mean_score=1\.5 looks like a percentage; divide by 100"),
        (HEAD + "ocr,1,4,53.5,\n", "divide by 100"),
        (HEAD + "ocr,1,4,-0.1,\n", "must be between 0 and 1"),
        (HEAD + "ocr,1,4.5,0.5,\n", "must be a whole number"),
        (HEAD + "ocr,0,4,0.5,\n", "must be above 0"),
        (HEAD + "ocr,1,4\n", r"rows\.csv:2: this line does not have as many fields"),
        (HEAD, "no rows"),
        ("", "missing column"),
    ],
)
def test_a_bad_table_is_told(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        scores.read(write(tmp_path, text))


def test_other_files_are_told(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        scores.read(tmp_path / "none.csv")
    with pytest.raises(UserError, match=r"from \.jsonl .* or \.csv"):
        scores.read(write(tmp_path, HEAD, "rows.txt"))
    with pytest.raises(UserError, match="half-written last line"):
        scores.read(write(tmp_path, '{"cell"', "rows.jsonl"))


@pytest.mark.parametrize(
    ("params", "text"), [(7, "7B"), (0.5, "0.5B"), (0.135, "135M"), (5.6e-5, "56k"), (1e-7, "100")]
)
def test_sizes_read_as_people_say_them(params, text):
    assert scores.params_label(params) == text
