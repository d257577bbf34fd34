"""One training that serves several V."""

import dataclasses
from collections import Counter

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax import build, job
from vlm_jax.compress import catalog
from vlm_jax.config.arguments import load_config
from vlm_jax.config.resolve import resolve
from vlm_jax.core import specs
from vlm_jax.core.errors import RunStopped, UserError
from vlm_jax.core.specs import EncoderSpec, RunSpec
from vlm_jax.sizing import cost
from vlm_jax.training import step as training_step

STEPS = 6
ENCODER = EncoderSpec("tiny", image_size=64, patch_size=16, width=16, depth=1, heads=2, mlp_width=16)


def elastic_spec(compressor: str, elastic: str, steps: str = "drawn") -> RunSpec:
    config = load_config(
        f"configs/vlm.py:llm=d24,data=rows4_tiny,compressor={compressor},elastic={elastic},elastic_steps={steps}",
        {"stages.0.total_steps": f"{STEPS}", "stages.0.warmup_steps": "1", "log_every_steps": "2",
         "evaluation.examples": "4", "encoder_checkpoint": "", "data.batch_rows": "8"},
    )  # fmt: skip
    spec = resolve(config)
    found = dataclasses.replace(spec.model.compressor, grid=ENCODER.grid, encoder_width=ENCODER.width)
    return dataclasses.replace(spec, model=dataclasses.replace(spec.model, encoder=ENCODER, compressor=found))


def first_step(network: build.Network, params: object, batch: object, number: int) -> tuple:
    """The loss sums and the norm of the gradient of a step from `params`."""
    update = build.train_step(network, network.spec.stages[0])
    state = training_step.init_state(jax.tree.map(jnp.array, params), update.optimiser, network.spec.stages[0].train)
    _, sums, norms = update.step(state, network.plan.put(batch), number)
    return jax.device_get((sums, norms.grad))


def initial(network: build.Network) -> object:
    return jax.device_get(nn.meta.unbox(build.init_params(network, jax.random.key(0))))


def alone(spec: RunSpec) -> RunSpec:
    """The run of one V, whose rows have places for no more."""
    fewer = max(spec.model.compressor.elastic) - catalog.entering(spec.model.compressor)
    places = spec.data.row_tokens - fewer
    compressor = dataclasses.replace(spec.model.compressor, elastic=())
    model, data = (
        dataclasses.replace(spec.model, compressor=compressor),
        dataclasses.replace(spec.data, row_tokens=places),
    )
    return dataclasses.replace(spec, model=model, data=data)


@pytest.mark.parametrize(("compressor", "elastic"), [("resampler", (1, 4)), ("m3", (1, 4))])
def test_a_drawn_step_is_the_step_of_that_v(compressor: str, elastic: tuple[int, ...], tmp_path) -> None:
    """Loss and gradient of a step equal those of the run of the drawn V alone, whose rows have fewer places."""
    run = build.open_run(elastic_spec(compressor, "+".join(map(str, elastic))), tmp_path)
    params, batch, spec = initial(run.network), run.train[0][0], run.network.spec
    numbers = {specs.drawn_tokens(spec, number): number for number in range(1, 9)}
    assert set(numbers) == set(elastic)
    for at in specs.at_every_v(spec):
        number = numbers[at.model.compressor.tokens]
        one = build.open_run(alone(at), tmp_path)
        found = first_step(run.network, params, batch, number)
        expected = first_step(one.network, params, one.train[0][0], number)
        assert found[0].count == expected[0].count
        np.testing.assert_allclose(found[0].nll, expected[0].nll, rtol=1e-5)
        np.testing.assert_allclose(found[1], expected[1], rtol=1e-4)


def test_a_step_at_all_v_is_the_sum_of_them(tmp_path) -> None:
    run = build.open_run(elastic_spec("m3", "1+4", "all"), tmp_path)
    batch = run.train[0][0]
    drawn = run.network._replace(spec=dataclasses.replace(run.network.spec, elastic="drawn"))
    numbers = {specs.drawn_tokens(drawn.spec, number): number for number in range(1, 9)}
    params = initial(drawn)
    parts = [first_step(drawn, params, batch, number)[0] for number in numbers.values()]
    whole = first_step(run.network, params, batch, 1)[0]
    np.testing.assert_allclose(whole.nll, sum(part.nll for part in parts), rtol=1e-5)
    assert whole.count == sum(part.count for part in parts)


def test_every_v_is_drawn_equally_often_and_again_by_seed_and_step() -> None:
    spec = elastic_spec("resampler", "1+2+4")
    drawn = [specs.drawn_tokens(spec, step) for step in range(3000)]
    assert min(Counter(drawn).values()) > 900
    assert drawn[1000:1010] == [specs.drawn_tokens(spec, step) for step in range(1000, 1010)]
    other = dataclasses.replace(spec, seed=1)
    assert drawn[:50] != [specs.drawn_tokens(other, step) for step in range(50)]


def test_an_interrupted_run_goes_on_with_the_v_of_its_steps(tmp_path) -> None:
    spec = elastic_spec("resampler", "1+2+4")
    run = build.open_run(spec, tmp_path / "cache")
    whole = job.train(run, tmp_path / "whole", lambda log, values: None)
    with pytest.raises(RunStopped):
        job.train(run, tmp_path / "stopped", lambda log, values: None, stop=lambda step: step == 3)
    resumed = job.train(run, tmp_path / "stopped", lambda log, values: None)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(whole), jax.device_get(resumed))


def test_one_training_gives_a_row_for_every_v(tmp_path) -> None:
    spec = elastic_spec("resampler", "1+2+4")
    run = build.open_run(spec, tmp_path)
    params = job.train(run, tmp_path / "run", lambda log, values: None)
    rows = [job.evaluate(at, params, "cell", tmp_path / "run") for at in build.runs_at_every_v(run, tmp_path)]
    assert [row.visual_tokens for row in rows] == [1, 2, 4]
    assert len({row.spec_hash for row in rows}) == 3
    assert rows[-1].spec_hash == specs.spec_hash(run.network.spec)
    for row, at in zip(rows, specs.at_every_v(spec), strict=True):
        assert row.model == at.model
        expected = cost.flops(at.model, row.question_tokens, row.answer_tokens + 1)
        assert row.prefill_flops == expected.prefill.total
    assert len({row.forced_nll for row in rows}) == 3  # the V reaches the answer
    assert len({row.questions for row in rows}) == 1


def test_the_cost_of_a_step() -> None:
    """A prefix computes all tokens at every step; of others a drawn step is the mean and a step at all V the sum."""
    for compressor, elastic in (("resampler", "1+4"), ("m3", "1+4")):
        spec = elastic_spec(compressor, elastic)
        stage = spec.stages[0]
        places = dict(data=spec.data)  # as many as the most tokens need
        each = [cost.step_flops(dataclasses.replace(alone(at), **places), stage) for at in specs.at_every_v(spec)]
        drawn = cost.step_flops(spec, stage)
        assert drawn == pytest.approx(each[-1] if compressor == "resampler" else sum(each) / 2)
        every = cost.step_flops(dataclasses.replace(spec, elastic="all"), stage)
        assert every == pytest.approx(2 * each[-1] if compressor == "resampler" else sum(each))


def test_an_elastic_run_trains_at_its_most_tokens() -> None:
    config = load_config("configs/vlm.py:elastic=1+4", {"model.compressor.tokens": "1"})
    with pytest.raises(UserError, match=r"model.compressor.tokens: expected 4, the most of elastic=\[1, 4\], got 1"):
        resolve(config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("elastic=4+1", r"expected ascending numbers, got \[4, 1\] \(sort them\)"),
        ("elastic=1+4,tokens=7", r"^tokens: expected 4, the most of elastic=1\+4, got 7 \(leave it out\)"),
        ("elastic=1+4,tokens=0", r"^tokens: expected 4, the most of elastic=1\+4, got 0 \(leave it out\)"),
        ("elastic=1+x", r"elastic: expected numbers such as 1\+4\+16, got '1\+x'"),
        ("elastic=1+4,compressor=quecc", "the weights of this method serve one V"),
        ("elastic=1+4,elastic_steps=both", "elastic: unknown 'both'|unknown config field elastic: 'both'"),
    ],
)
def test_what_cannot_be_elastic_is_one_line(arguments: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        resolve(load_config(f"configs/vlm.py:{arguments}"))
    assert "\n" not in str(caught.value)
