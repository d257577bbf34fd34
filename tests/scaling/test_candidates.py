"""Candidates of a plan and their prices."""

import dataclasses
import re
from pathlib import Path

import pytest

from tests.result_rows import on_a_law
from vlm_jax.compress import catalog
from vlm_jax.config.arguments import load_config
from vlm_jax.config.resolve import resolve
from vlm_jax.core.errors import UserError
from vlm_jax.evaluation import results
from vlm_jax.scaling import candidates, fit, lawfile, scores
from vlm_jax.sizing import chips, cost, roofline, zoo
from vlm_jax.sizing.roofline import Request

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "experiments" / "published_law" / "published_scores.csv"
ROWS = results.read(ROOT / "experiments" / "size_by_tokens" / "rows.jsonl")


FLOPS = ("encoder_flops", "compressor_flops", "question_flops", "prefill_flops", "decode_flops")


@pytest.fixture(scope="module")
def study():
    """The law of the committed rows."""
    return lawfile.read(ROOT / "experiments" / "size_by_tokens" / "law.json")


@pytest.fixture(scope="module")
def published():
    return lawfile.read(ROOT / "experiments" / "published_law" / "law.json")


@pytest.fixture(scope="module")
def reasoning(published):
    return published.family("reasoning")


def sides(found):
    return {(one.model.encoder.name, one.model.compressor.name) for one in found}


def test_a_committed_row_has_the_model_of_its_config():
    """The config of the row's cell resolves to the model that was trained."""
    for row in ROWS:
        spec = resolve(load_config(f"{ROOT / 'configs' / 'vlm.py'}:{row.cell}"))
        assert spec.model == row.model


def test_prices_equal_the_flops_of_committed_rows(study):
    """All five parts, exactly: of a default candidate, and of a blind row's model."""
    for name, family in study.families.items():
        found = {(one.model.decoder.name, one.tokens): one for one in candidates.candidates(family, "non_embedding")}
        for row in (row for row in ROWS if row.family == name):
            model = row.model
            if row.visual_tokens:
                one = found[row.llm, row.visual_tokens]
                assert (one.model, one.extrapolates, one.params) == (model, (), row.llm_params / 1e9)
                model = one.model
            price = candidates.price(model, Request(row.question_tokens, row.answer_tokens + 1))
            assert {f"{part}_flops": value for part, value in price.flops.items()} == {
                field: getattr(row, field) for field in FLOPS
            }


def test_default_candidates_are_the_measured_models(reasoning):
    """At every V of the compressor, with every LLM of the family."""
    found = candidates.candidates(reasoning, "nominal")
    assert sides(found) == {("clip-l14-336", "tokenpacker")}
    assert {one.model.decoder.name for one in found} == {n for n in zoo.DECODERS if n.startswith("qwen1.5-")}
    assert {one.tokens for one in found} == set(catalog.row("tokenpacker").tokens_out((24, 24)))
    assert {one.extrapolates for one in found} == {()}
    assert {(one.model.projector, one.model.mask) for one in found} == {("mlp", "causal")}
    fitting = fit.fit(scores.of_rows(on_a_law(row for row in ROWS if row.family == "facts")), bootstraps=20)
    own = candidates.candidates(fitting.family("facts"), "non_embedding")
    assert sides(own) == {("glyph-64", "resampler")}
    assert {one.model.decoder.name for one in own} == {n for n in zoo.DECODERS if re.fullmatch(r"d\d+", n)}
    assert {one.model.projector for one in own} == {"linear"}


def test_named_candidates_list_what_they_extrapolate(reasoning):
    names = {"encoders": ("clip-l14-336", "siglip-b16-224"), "compressors": ("tokenpacker", "pool")}
    found = candidates.candidates(reasoning, "nominal", llms=("qwen1.5-7b", "vicuna-7b"), tokens=(4,), **names)
    beyond_of = {(*side, one.model.decoder.name): one.extrapolates for one in found for side in sides([one])}
    for (encoder, compressor, llm), kinds in beyond_of.items():
        beyond = {"encoder": encoder[0] == "s", "compressor": compressor == "pool", "family": llm == "llama2-7b"}
        assert kinds == tuple(kind for kind, outside in beyond.items() if outside)
    assert len(found) == len(beyond_of) == 8
    for one in found:
        spec = one.model
        again = catalog.model_spec(zoo.encoder(spec.encoder.name), spec.compressor.name, 4, spec.decoder)
        assert spec == again


def test_an_unmeasured_pair_of_measured_parts_extrapolates(reasoning):
    pool = catalog.model_spec(zoo.encoder("siglip-b16-224"), "pool", 4, zoo.decoder("qwen1.5-7b"))
    family = reasoning._replace(models=(*reasoning.models, pool))
    assert len(sides(candidates.candidates(family, "nominal"))) == 2
    found = candidates.candidates(family, "nominal", encoders=("siglip-b16-224",), tokens=(4,))
    assert {one.model.compressor.name: one.extrapolates for one in found} == {
        "pool": (), "tokenpacker": ("compressor",),
    }  # fmt: skip


def test_what_a_compressor_takes_from_the_language_model_follows_it(reasoning):
    """The fusion layers of LLaVA-Mini have the decoder's sizes: measured at two sizes it is one visual side."""
    sizes = [zoo.decoder(name) for name in ("d24", "d96")]
    models = [catalog.model_spec(zoo.encoder("glyph-64"), "llava_mini", 4, llm, "linear") for llm in sizes]
    family = reasoning._replace(models=tuple(models))
    found = candidates.candidates(family, "non_embedding", llms=[llm.name for llm in sizes], tokens=(4,))
    assert [one.model for one in found] == models


def test_other_compressors_keep_the_measured_encoder(reasoning):
    """One that merges tokens, say."""
    encoder = dataclasses.replace(zoo.encoder("glyph-64"), merge=(8, 8, 8, 8))
    measured = catalog.model_spec(encoder, "perceiver", 4, zoo.decoder("d24"))
    family = reasoning._replace(models=(measured,))
    found = candidates.candidates(family, "non_embedding", compressors=("none",), llms=("d24",))
    (one,) = found
    assert (one.model.encoder.merge, one.tokens, one.extrapolates) == ((8, 8, 8, 8), 32, ("compressor",))


def test_a_law_without_models_requires_names(reasoning):
    silent = reasoning._replace(models=())
    with pytest.raises(UserError, match="--encoders: expected names, got none"):
        candidates.candidates(silent, "nominal", llms=("qwen1.5-7b",), compressors=("pool",))
    (one,) = candidates.candidates(silent, "nominal", ("clip-l14-336",), ("qwen1.5-7b",), ("pool",), (4,))
    assert one.extrapolates == ("encoder", "compressor", "family")


def test_an_impossible_v_raises(reasoning):
    with pytest.raises(UserError, match="expected one with V above 0"):
        candidates.candidates(reasoning, "nominal", compressors=("blind",))
    with pytest.raises(UserError, match=r"got 5 \(near: 1, 2, 3, 4, 6"):
        candidates.candidates(reasoning, "nominal", tokens=(4, 5))


def test_a_law_keeps_the_models_of_its_rows(published, study):
    """One of each encoder, compressor and language model, from a file whose rows name or spell them out."""
    for law, rows in ((published, scores.read(PUBLISHED)), (study, scores.of_rows(ROWS))):
        for name, family in law.families.items():
            seen = [cell.model for cell in scores.seen(rows.of(name).cells)]
            assert {(m.encoder, m.decoder) for m in family.models} == {(m.encoder, m.decoder) for m in seen}
            assert len(family.models) == len({m.decoder for m in seen})
    assert {m.encoder.taps for m in published.family("ocr").models} == {(12, 16, 22, 23)}


def test_query_dependent_compressors_pay_for_the_question_twice_and_cannot_cache_it():
    encoder, decoder = zoo.encoder("clip-l14-336"), zoo.decoder("qwen1.5-7b")
    fresh, cached = (
        {
            name: candidates.price(
                catalog.model_spec(encoder, name, 16, decoder), Request(100, 20, question=kind, on=chips.chip("v6e"))
            )
            for name in ("quecc", "tokenpacker")
        }
        for kind in ("fresh", "cached")
    )
    assert fresh["tokenpacker"].flops["question"] == 0 == fresh["tokenpacker"].times["question"].secs
    assert fresh["quecc"].flops["question"] == cost.pass_flops(decoder, 100, 100, 0).total
    assert cached["quecc"] == fresh["quecc"]
    assert cached["tokenpacker"].flops["prefill"] < fresh["tokenpacker"].flops["prefill"] / 5
    assert cached["tokenpacker"].cache_bytes == fresh["tokenpacker"].cache_bytes


def test_a_7b_prefill_is_bound_by_its_weights_at_batch_1_and_by_compute_at_32():
    times, decoder = {}, zoo.decoder("llama2-7b")
    for batch in (1, 32):
        request = Request(50, 20, batch, on=chips.chip("v6e"), efficiency=chips.IDEAL)
        of = [catalog.model_spec(zoo.encoder("clip-l14-336"), "pool", v, decoder) for v in (1, 144, 576)]
        times[batch] = [roofline.request_times(model, request)["prefill"] for model in of]
    assert [t.binds for t in times[1]][:2] == ["memory", "memory"]
    assert times[1][0].secs * 1e3 == pytest.approx(8.8, rel=0.07)
    assert times[1][1].secs < 1.1 * times[1][0].secs
    assert [t.binds for t in times[32]] == ["compute"] * 3
    assert [t.secs * 1e3 for t in times[32]] == pytest.approx([24.8, 94.5, 304.8], rel=0.08)


def test_a_batch_reads_weights_once_and_moves_activations_per_request():
    """By hand, for a small decoder in int8, one byte per scalar."""
    encoder, decoder = zoo.encoder("glyph-64"), zoo.decoder("d24")
    model = catalog.model_spec(encoder, "quecc", 4, decoder)
    one, three = (cost.moved_bytes(model, 10, 3, batch, "int8") for batch in (1, 3))
    inner, head = cost.decoder_params(decoder, "excluded"), decoder.vocab * decoder.width
    width, inside = decoder.width, decoder.heads * decoder.head_dim
    token = decoder.depth * (6 * width + 4 * inside + 4 * inside + 4 * decoder.mlp_width)
    cached = 2 * decoder.depth * inside
    assert one["question"] == inner + 10 * token
    assert one["prefill"] == inner + head + 14 * (token + cached)
    assert one["decode"] == sum(inner + head + token + keys * cached for keys in (15, 16))
    weights = {
        "encoder": cost.encoder_params(model.encoder),
        "compressor": cost.projector_params("mlp", encoder.width, width),
        "question": inner, "prefill": inner + head, "decode": 2 * (inner + head),
    }  # fmt: skip
    for part, value in weights.items():
        assert three[part] - value == pytest.approx(3 * (one[part] - value))
    blind = dataclasses.replace(model.compressor, name="blind", tokens=0)
    assert cost.moved_bytes(dataclasses.replace(model, compressor=blind), 10, 3)["encoder"] == 0
