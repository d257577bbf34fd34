"""Costs against XLA's own count of unscanned programs, and against sums written out."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from builders import COMPUTE, causal, inputs, model
from flax.linen import unbox

from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import DecoderSpec, EncoderSpec
from vlm_jax.core.structs import Views, Visual
from vlm_jax.core.tree import count
from vlm_jax.models.decoder import Decoder
from vlm_jax.models.vision import Encoder
from vlm_jax.models.vlm import Vlm
from vlm_jax.sizing import chips, cost, roofline, zoo

# One layer: XLA counts the body of a scan once, so a scan of one is counted right. Wide enough that products rule.
WIDE = DecoderSpec("wide", 256, 1, 4, 2, 64, 768, 512)
EYE = EncoderSpec("eye", 64, 8, 256, 1, 4, 768, pooling_head=False)


def xla_flops(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("spec", [WIDE, dataclasses.replace(WIDE, kv_heads=4, tied_head=False, qkv_bias=True)])
def test_decoder_pass_agrees_with_xla(spec):
    text = jnp.zeros((1, 48), jnp.int32)
    where = causal(text + 1)
    params = jax.eval_shape(Decoder(spec, COMPUTE).init, jax.random.key(0), text, where)
    counted = xla_flops(Decoder(spec, COMPUTE).apply, params, text, where)
    assert cost.pass_flops(spec, 48, 48, 48).total == pytest.approx(counted, rel=0.02)


def test_encoder_agrees_with_xla():
    image = jnp.zeros((1, 64, 64, 3))
    params = jax.eval_shape(Encoder(EYE, COMPUTE).init, jax.random.key(0), image)
    counted = xla_flops(lambda p, x: Encoder(EYE, COMPUTE).apply(p, x, method="encode").tokens, params, image)
    assert cost.encoder_flops(EYE) == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("train", [("decoder",), ("connector", "decoder"), ("connector",)])
def test_training_agrees_with_xla(train):
    wide = {
        name: getattr(WIDE, name) for name in ("width", "depth", "heads", "kv_heads", "head_dim", "mlp_width", "vocab")
    }
    spec = model("pool", **wide)
    rows = inputs(rows=1, questions=8)
    vlm = Vlm(spec, COMPUTE)
    shapes = jax.eval_shape(lambda key: unbox(vlm.init(key) | {"encoder": vlm.init_encoder(key)}), jax.random.key(0))
    frozen = {k: v for k, v in shapes.items() if k not in train}

    def loss(live, rest, rows, features):
        hidden, _ = vlm.forward(live | rest, rows._replace(views=Views(features=features)))
        return jnp.mean(jax.nn.log_softmax(vlm.logits(live | rest, hidden))[..., 0])

    features = jax.eval_shape(vlm.encode, shapes, rows.views.pixels[0])
    features = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), features)
    live = {name: shapes[name] for name in train}
    counted = xla_flops(jax.grad(loss), live, frozen, rows, features)
    got = cost.train_flops(spec, rows.tokens.shape[1], train, "stored")
    assert got == pytest.approx(counted, rel=0.04)  # the softmax of the loss and its gradient are not products


def test_a_row_that_tokens_leave_agrees_with_xla():
    """Two conversations with an image each, of which the second layer sees two tokens; a third view is absent."""
    wide = {name: getattr(WIDE, name) for name in ("width", "heads", "kv_heads", "head_dim", "mlp_width", "vocab")}
    spec = model("victor", 2, depth=2, **wide)
    vlm = Vlm(spec, dataclasses.replace(COMPUTE, scan_layers=False))
    rows = inputs(rows=1, questions=2, visual_tokens=vlm.visual_tokens, views=2)
    rows = jax.tree.map(lambda leaf: jnp.pad(leaf, [(0, 0), (0, 40)]), rows._replace(views=None))
    params = jax.eval_shape(lambda key: unbox(vlm.init(key)), jax.random.key(0))
    features = Visual(jnp.zeros((1, 3, spec.encoder.patches, spec.encoder.width)))

    def forward(params, rows):
        hidden, _ = vlm.forward(params, rows._replace(views=Views(features=features)))
        return vlm.logits(params, hidden)

    length = rows.tokens.shape[1]
    got = cost.row_pass(spec, length, 3)
    assert got.total < 0.8 * cost.pass_flops(spec.decoder, length, length, length).total
    assert got.total == pytest.approx(xla_flops(forward, params, rows), rel=0.02)


def test_decode_flops_are_the_sum_of_the_steps():
    steps = [cost.pass_flops(WIDE, 1, 30 + t, 1) for t in range(1, 8)]
    whole = cost.decode_flops(WIDE, 30, 8)
    assert whole.attention == pytest.approx(sum(s.attention for s in steps))
    assert whole.total == pytest.approx(sum(s.total for s in steps))
    assert cost.decode_flops(WIDE, 30, 1).total == 0


def test_parts_of_a_question():
    spec = model("resampler", 4)
    parts = cost.flops(spec, 10, 3)
    assert parts.prefill == cost.pass_flops(spec.decoder, 14, 14, 1)
    assert parts.question.total == 0
    assert parts.total == pytest.approx(sum(cost.row_fields(parts).values()))
    reads = cost.flops(model("quecc", 4), 10, 3)
    assert reads.question == cost.pass_flops(spec.decoder, 10, 10, 0)
    assert reads.prefill == parts.prefill


def test_blind_costs_text_only():
    parts = cost.flops(model("blind", 0), 10, 3)
    assert (parts.encoder, parts.compressor, parts.projector) == (0, 0, 0)
    assert parts.prefill == cost.pass_flops(model().decoder, 10, 10, 1)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("clip-l14-336", 0.381),
        ("siglip-so400m14-224", 0.219),
        ("siglip-so400m14-384", 0.665),
        ("siglip-b16-224", 0.035),
    ],
)
def test_encoder_flops_of_published_models(name, tflops):
    assert cost.encoder_flops(zoo.encoder(name)) / 1e12 == pytest.approx(tflops, rel=0.005)


@pytest.mark.parametrize("compressor", ["pool", "resampler", "tokenpacker", "quecc"])
def test_a_model_has_as_many_scalars_as_its_parts(compressor):
    spec = model(compressor, 4, tied_head=False)
    vlm = Vlm(spec, COMPUTE)
    shapes = jax.eval_shape(lambda key: vlm.init(key) | {"encoder": vlm.init_encoder(key)}, jax.random.key(0))
    parts = cost.params(spec)
    assert parts.total == count(shapes)
    assert parts.compressor + parts.projector == count(shapes["connector"])
    assert parts.embedding == 2 * spec.decoder.vocab * spec.decoder.width


def test_cache_bytes():
    assert cost.cache_bytes(zoo.decoder("llama2-7b"), 1) == 2 * 32 * 4096 * 2  # half a megabyte a token
    assert cost.cache_bytes(zoo.decoder("llama3.1-8b"), 1) == 2 * 32 * 8 * 128 * 2


def test_unknown_names_raise():
    with pytest.raises(UserError, match="dtype"):
        cost.dtype_bytes("float31")
    with pytest.raises(UserError, match="projector"):
        cost.projector_params("conv", 1, 1)
    with pytest.raises(UserError, match="part"):
        cost.train_flops(model(), 8, ("head",), "stored")


def test_a_part_takes_the_slower_of_its_two_limits():
    v6e = chips.chip("V6E")
    assert roofline.part_time(9.2e14, 1.0, v6e, 1, chips.IDEAL) == (1.0, "compute")
    assert roofline.part_time(1.0, 1.6e12, v6e, 1, chips.IDEAL) == (1.0, "memory")
    assert roofline.part_time(9.2e14, 1.0, v6e, 4, chips.Efficiency(0.5, 1.0)).secs == pytest.approx(0.5)
    with pytest.raises(UserError, match="did you mean 'v6e'"):
        chips.chip("v6")


def test_a_model_whose_stages_lie_beyond_its_decoder_has_no_price():
    good = model("fastv", depth=3)
    assert cost.flops(good, 8, 4).total > 0
    bad = dataclasses.replace(good, compressor=dataclasses.replace(good.compressor, depth=7))
    with pytest.raises(UserError, match=r"nearest possible: compressor\.depth=2"):
        cost.flops(bad, 8, 4)
