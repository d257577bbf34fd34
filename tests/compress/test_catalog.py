"""A user's mistake is one line that names the fix."""

import dataclasses
import re
from pathlib import Path

import pytest

from vlm_jax.compress import catalog
from vlm_jax.config.arguments import load_config
from vlm_jax.config.resolve import resolve
from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import CompressorSpec
from vlm_jax.sizing import zoo

ROOT = Path(__file__).parents[2]

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
        ({"name": "perceiver", "mlp_width": 0}, "'perceiver': mlp_width=0 must be at least 1"),
        ({"name": "mqt", "queries": 10}, "'mqt': queries=10 must be a square of at least tokens=8"),
        (
            {"name": "llava_mini", "tokens": 4, "fusion_heads": 5},
            "fusion_heads=5 must divide half of the decoder's width",
        ),
        ({"name": "pixel_shuffle", "tokens": 5}, "possible: 1, 4, 16, 64$"),
        ({"name": "c_abstractor", "tokens": 5}, "possible: 1, 4, 9, 16, 25, 36, 49, 64$"),
        ({"name": "prumerge_plus", "tokens": 4}, "nearest possible: 3, 5"),
        ({"name": "fastv", "tokens": 64}, r"nearest possible: 56, .*, 63 \(of 63, 1 to 63\)$"),
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


@pytest.mark.parametrize(
    ("name", "depth", "message"),
    [
        (
            "fastv",
            4,
            r"expected a decoder with layers before and behind each of its stages \(behind layers 4\), got .* 4",
        ),
        ("victor", 9, r"behind layers 9\), got d48 with 4 layers"),
        ("pyramiddrop", 6, r"behind layers 0, 1, 1, 2, 2, 3\), got d48 with 4 layers"),
    ],
)
def test_stages_beyond_the_depth_are_one_line(name, depth, message):
    decoder = dataclasses.replace(zoo.decoder("d48"), depth=4)
    model = catalog.model_spec(zoo.encoder("siglip-b16-224"), name, 4, decoder)
    changed = dataclasses.replace(model, compressor=dataclasses.replace(model.compressor, depth=depth))
    with pytest.raises(UserError, match=message) as caught:
        catalog.check_decoder(changed)
    assert "\n" not in str(caught.value)


def test_what_follows_a_summary_needs_a_causal_mask():
    with pytest.raises(UserError, match=r"'voco': expected model\.mask=causal, got prefix"):
        catalog.model_spec(zoo.encoder("siglip-b16-224"), "voco", 4, zoo.decoder("d48"), mask="prefix")


def test_more_tokens_than_patches_are_one_line():
    config = load_config(f"{ROOT / 'configs' / 'vlm.py'}:compressor=vision_zip")
    config.model.compressor.tokens = 65
    with pytest.raises(UserError, match=r"cannot give tokens=65 .* nearest possible: 57"):
        resolve(config)


def test_a_merge_that_cannot_be_is_named_before_what_follows_from_it():
    config = load_config(f"{ROOT / 'configs' / 'vlm.py'}:compressor=perceiver,tokens=4")
    with config.unlocked():
        config.model.merge = (40, 8, 8, 8)
    with pytest.raises(UserError, match=r"^model\.merge=\[40, 8, 8, 8\]: block 1: expected 0 to 32"):
        resolve(config)


def test_the_documentation_names_every_row():
    text = (ROOT / "docs" / "compressors.md").read_text()
    listed = {}
    for line in text.partition("\n## ")[0].splitlines():
        if line.startswith("| `"):
            names, _, question, elastic, _ = line.strip("| ").split(" | ")
            listed |= dict.fromkeys(re.findall("`([a-z0-9_]+)`", names), (question == "yes", elastic == "yes"))
    assert listed == {name: (row.query_dependent, row.elastic != "no") for name, row in catalog.ROWS.items()}
