"""A user's mistake is one line that names the fix."""

import dataclasses

import pytest

from vlm_jax.compress import catalog
from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import CompressorSpec

GOOD = CompressorSpec("quecc", 8, (8, 8), 16, taps=2, text_width=12, width=24, heads=4, depth=1, mlp_width=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "tokenpaker"}, "did you mean 'tokenpacker'"),
        ({"tokens": 6}, r"'quecc' cannot give tokens=6 on a 8 x 8 .* possible: 1, 2, 4, 8, 16, 32, 64$"),
        ({"name": "none", "tokens": 6}, "possible: 64$"),
        ({"name": "blind", "tokens": 1}, "possible: 0$"),
        ({"name": "resampler", "tokens": 65}, r"nearest possible: 57, .*, 64 \(of 64, 1 to 64\)$"),
        ({"name": "resampler", "tokens": 0}, r"nearest possible: 1, 2, .* 8 \(of 64, 1 to 64\)$"),
        ({"heads": 5}, "width=24 is not a multiple of heads=5"),
        ({"heads": 0}, "heads=0 must be at least 1"),
        ({"taps": -1}, "taps=-1 must be at least 0"),
        ({"text_width": 0}, "'quecc' needs the decoder: text_width=0"),
    ],
)
def test_a_spec_that_cannot_be_is_refused_in_one_line(change, message):
    catalog.check(GOOD)
    with pytest.raises(UserError, match=message) as caught:
        catalog.check(dataclasses.replace(GOOD, **change))
    assert "\n" not in str(caught.value)


def test_a_method_that_does_not_read_the_question_needs_no_width_of_it():
    catalog.check(dataclasses.replace(GOOD, name="tokenpacker", text_width=0))
