"""Efficiencies from measured parts."""

import pytest

from vlm_jax.core.errors import UserError
from vlm_jax.sizing import calibration, chips, roofline


def test_calibration_recovers_planted_efficiencies(tmp_path):
    rows = ["chip,chips,flops,bytes,secs"]
    v6e = chips.chip("v6e")
    for flops, moved in ((1e14, 1e9), (3e14, 1e10), (1e12, 1e11), (1e11, 3e11)):
        secs = roofline.part_time(flops, moved, v6e, 1, chips.Efficiency(0.45, 0.7)).secs
        rows.append(f"v6e,1,{flops},{moved},{secs}")
    path = tmp_path / "measured.csv"
    path.write_text("\n".join(rows) + "\n")
    found = calibration.calibrate(path)
    assert (found.compute, found.bandwidth) == pytest.approx((0.45, 0.7))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("chip,flops\nv6e,1\n", "expected columns chip,chips,flops,bytes,secs, missing chips,bytes,secs"),
        ("chip,chips,flops,bytes,secs\nv6e,1,x,1,1\n", r"measured\.csv:2: expected numbers in"),
        ("chip,chips,flops,bytes,secs\nv6e,1,1e15,1,0.1\n", "expected at most the peak of v6e"),
        ("chip,chips,flops,bytes,secs\nv6e,1,1,1,0\n", "expected chips,flops,bytes,secs above 0"),
        ("chip,chips,flops,bytes,secs\nv9,1,1,1,1\n", "unknown chip"),
    ],
)
def test_a_bad_calibration_names_row_and_fix(tmp_path, text, message):
    (tmp_path / "measured.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        calibration.calibrate(tmp_path / "measured.csv")
