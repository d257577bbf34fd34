"""Reading score tables; errors name file, row and fix."""

import pytest

from vlm_jax.core.errors import UserError
from vlm_jax.scaling import scores

HEAD = "family,llm_params_billion,visual_tokens,mean_score,note\n"


def write(tmp_path, text, name="rows.csv"):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_a_table_keeps_its_extra_columns(tmp_path):
    rows = scores.read(write(tmp_path, HEAD + "ocr,0.5,4,0.25,copied\nocr,0.5,0,0.1,\n"))
    assert rows.params_are == "nominal"
    assert [(c.params, c.tokens, c.error) for c in rows.cells] == [(0.5, 4, 0.75), (0.5, 0, 0.9)]
    assert rows.cells[0].extra == {"note": "copied"}
    assert scores.blind_errors(rows.cells) == {0.5: 0.9}


def test_a_byte_order_mark_is_no_part_of_the_header(tmp_path):
    """As spreadsheets save CSV."""
    plain = scores.read(write(tmp_path, HEAD + "ocr,1,4,0.5,\n"))
    (tmp_path / "rows.csv").write_text(HEAD + "ocr,1,4,0.5,\n", encoding="utf-8-sig")
    assert scores.read(tmp_path / "rows.csv") == plain


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("family,llm_params_billion,mean_score\nocr,1,0.5\n", r"rows\.csv: expected columns .*, missing visual_tokens"),
        (HEAD + "ocr,1,4,nan,\n", r"rows\.csv:2: expected a finite number as mean_score, got 'nan'"),
        (
            HEAD + "ocr,1,4,0.5,\nocr,x,4,0.5,\n",
            r"rows\.csv:3: expected a finite number as llm_params_billion, got 'x'",
        ),
        (HEAD + "ocr,1,4,1.5,\n", r"rows\.csv:2: expected mean_score between 0 and 1, got 1\.5 \(a percentage"),
        (HEAD + "ocr,1,4,53.5,\n", "divide by 100"),
        (HEAD + "ocr,1,4,-0.1,\n", "between 0 and 1, got -0.1$"),
        (HEAD + "ocr,1,4.5,0.5,\n", "expected an integer visual_tokens"),
        (HEAD + "ocr,0,4,0.5,\n", "expected llm_params_billion above 0, got 0"),
        (HEAD + "ocr,1,4\n", r"rows\.csv:2: expected as many fields"),
        (HEAD, "no rows"),
        ("", "missing family"),
    ],
)
def test_a_bad_table_raises_with_row_and_fix(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        scores.read(write(tmp_path, text))


def test_unreadable_files_raise(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        scores.read(tmp_path / "none.csv")
    with pytest.raises(UserError, match=r"expected \.jsonl .* or \.csv"):
        scores.read(write(tmp_path, HEAD, "rows.txt"))
    with pytest.raises(UserError, match="half-written last line"):
        scores.read(write(tmp_path, '{"cell"', "rows.jsonl"))


@pytest.mark.parametrize(
    ("params", "text"), [(7, "7B"), (0.5, "0.5B"), (0.135, "135M"), (5.6e-5, "56k"), (1e-7, "100")]
)
def test_labels_of_sizes(params, text):
    assert scores.params_label(params) == text
