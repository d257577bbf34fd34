"""What is done with a run, from its first step to its row.

params = train(run, workdir, on_log)        # resumes what it finds in workdir
row = evaluate(run, params, cell, workdir)  # one typed row
text = answer(network, params, image, "read row two")
"""

import contextlib
import functools
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

import vlm_jax
from vlm_jax import build
from vlm_jax.build import Network, Run
from vlm_jax.core import specs, tree
from vlm_jax.core.errors import UserError
from vlm_jax.core.rows import ResultRow
from vlm_jax.core.specs import RunSpec, StageSpec
from vlm_jax.core.structs import Batch, TrainState
from vlm_jax.data import pipeline, tokenizer
from vlm_jax.evaluation import generate, harness
from vlm_jax.sizing import chips, cost
from vlm_jax.store.checkpoint import Checkpoints, claim
from vlm_jax.store.metrics import MetricWriter
from vlm_jax.training import loop, optim
from vlm_jax.training import step as training_step


def stages(spec: RunSpec) -> Iterator[tuple[StageSpec, int, int]]:
    """(stage, its first step, its last step), counted over the whole run."""
    first = 0
    for stage in spec.stages:
        yield stage, first, first + stage.total_steps
        first += stage.total_steps


def train(run: Run, workdir: Path, on_log: Callable[[loop.Log, dict[str, float]], None]) -> Any:
    """Trains to the end, from the newest checkpoint of `workdir` if there is one. Returns the parameters.

    Writes `summary.json`. `on_log` is called from the metrics thread with each log and its numbers. Raises `UserError`
    if `workdir` belongs to another spec.
    """
    spec = run.network.spec
    claim(workdir, specs.to_dict(spec), specs.MAY_CHANGE)
    started = time.monotonic()
    with contextlib.closing(Checkpoints(workdir, spec.keep_checkpoints)) as checkpoints:
        restored = checkpoints.latest() or 0
        with contextlib.closing(MetricWriter(workdir, restored)) as metrics:
            params = _train_stages(run, restored, checkpoints, metrics, on_log).params
    # A run may have died behind its last checkpoint, but before this.
    if restored < specs.total_steps(spec) or not (workdir / "summary.json").exists():
        _write_summary(run, workdir, params, metrics.last, time.monotonic() - started)
    return params


def _train_stages(
    run: Run,
    restored: int,
    checkpoints: Checkpoints,
    metrics: MetricWriter,
    on_log: Callable[[loop.Log, dict[str, float]], None],
) -> TrainState:
    """All stages that the checkpoint at step `restored` has not finished; 0 starts from fresh parameters."""
    network, spec, plan = run.network, run.network.spec, run.network.plan
    params = cursor = state = None

    def save(step: int, state: TrainState, cursor: pipeline.Cursor) -> None:
        checkpoints.save(step, state, cursor, specs.to_dict(spec))

    for stage, first, last in stages(spec):
        if restored > last:
            continue
        update = build.train_step(network, stage)
        if restored > first:
            state, cursor = checkpoints.restore(restored, nn.meta.unbox(update.abstract), update.shardings)
        else:
            params = build.first_params(network) if params is None else params
            start = functools.partial(
                training_step.init_state, optimiser=update.optimiser, train=stage.train, step=first
            )
            state = plan.jit(start, out_shardings=update.shardings, donate_argnums=0)(params)
        state, cursor = loop.run(
            state,
            max(first, restored),
            last,
            pipeline.train_batches(run.train, spec.data, spec.seed, cursor, run.train_features),
            plan.put,
            update.step,
            log_every_steps=spec.log_every_steps,
            save_every_steps=spec.save_every_steps,
            on_log=_publisher(run, stage, first, metrics, on_log),
            on_save=save,
        )
        params = state.params
    if restored < last:
        save(last, state, cursor)
    return state


def _publisher(
    run: Run, stage: StageSpec, first: int, metrics: MetricWriter, on_log: Callable[[loop.Log, dict[str, float]], None]
) -> Callable[[loop.Log], None]:
    """Hands each log to the metrics thread, which alone waits for the device and so knows when steps were done."""
    finished: list[float] = []  # the span up to the first log includes compilation, so it has no speed

    def make(log: loop.Log) -> dict[str, float]:
        values = _numbers(run, log, stage, first)
        finished.append(time.monotonic())
        if len(finished) > 1:
            values |= _speed(run, stage, (finished[-1] - finished[-2]) / log.steps)
        on_log(log, values)
        return values

    return lambda log: metrics.write(log.step, lambda: make(log))


def _numbers(run: Run, log: loop.Log, stage: StageSpec, first: int) -> dict[str, float]:
    """A log as plain numbers, once the device has computed them."""
    sums, norms = jax.device_get((log.sums, log.norms))
    count = max(float(sums.count), 1.0)
    return {
        "loss": float(sums.nll) / count,
        "token_error": 1 - float(sums.hits) / count,
        "grad_norm": float(norms.grad),
        "update_norm": float(norms.update),
        "learning_rate": float(optim.schedule(run.network.spec.optim, stage)(log.step - first - 1)),
    }


def _speed(run: Run, stage: StageSpec, step_secs: float) -> dict[str, float]:
    """Seconds a step, examples and model FLOPs a second, and their share of the chips' peak where that is known."""
    spec, plan = run.network.spec, run.network.plan
    flops = cost.step_flops(spec, stage, _question_tokens(run))
    values = {
        "step_secs": step_secs,
        "examples_per_sec": spec.data.batch_examples / step_secs,
        "model_flops_per_sec": flops / step_secs,
    }
    chip = chips.of_device(jax.devices()[0].device_kind)
    return values if chip is None else {**values, "mfu": flops / step_secs / (chip.peak_flops * plan.mesh.size)}


def _question_tokens(run: Run) -> float:
    """Mean length of a question in training."""
    return float(run.train.question_lengths.mean())


def _write_summary(run: Run, workdir: Path, params: Any, values: dict[str, float], secs: float) -> None:
    """`summary.json`; seconds are those of this process."""
    path = workdir / "summary.json"
    summary = {
        "step": specs.total_steps(run.network.spec),
        **{name: value if math.isfinite(value) else None for name, value in values.items()},
        "params_sha256": tree.sha256(jax.device_get(params)),
        "secs": secs,
        "train_flops": cost.run_flops(run.network.spec, _question_tokens(run)),
        "spec_hash": specs.spec_hash(run.network.spec),
        "spec": specs.to_dict(run.network.spec),
    }
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(summary, indent=1) + "\n")
    temporary.replace(path)


def restore(network: Network, workdir: Path) -> Any:
    """Parameters of the newest checkpoint. Raises `UserError` if the workdir has none or belongs to another spec."""
    if not (workdir / "checkpoints").is_dir():
        raise UserError(f"{workdir}: no checkpoint here; train this run first, or name its --workdir")
    claim(workdir, specs.to_dict(network.spec), specs.MAY_CHANGE)
    with contextlib.closing(Checkpoints(workdir, network.spec.keep_checkpoints)) as checkpoints:
        step = checkpoints.latest()
        if step is None:
            raise UserError(f"{checkpoints.directory}: no complete checkpoint; train this run first")
        stage = next(stage for stage, _, last in stages(network.spec) if step <= last)
        abstract = build.abstract_state(network, stage)
        state, _ = checkpoints.restore(step, nn.meta.unbox(abstract), network.plan.shardings(abstract))
        return state.params


def answer(network: Network, params: Any, image: np.ndarray, question: str) -> str:
    """Greedy answer to one question about one image (uint8[H, H, 3]). Raises `UserError` for an unknown word."""
    if not question.strip():
        raise UserError("the question is empty")
    tokens = np.array([tokenizer.encode(question)], np.int32)
    ones = np.ones_like(tokens)
    batch = Batch(
        text=tokens,
        target=tokens,
        weight=np.zeros(tokens.shape, np.float32),
        segment=ones,
        position=np.arange(tokens.size, dtype=np.int32)[None],
        question=ones > 0,
        example=ones[:, 0],
        image=image[None],
    )
    new_tokens, end = network.spec.evaluation.max_new_tokens, tokenizer.END_ID
    program = network.plan.jit(lambda p, b: generate.greedy(network.model, p, b, new_tokens, end))
    return tokenizer.decode(program({"encoder": network.encoder, **params}, batch)[0].tolist())


def evaluation_batches(run: Run) -> int:
    """How many batches `evaluate` will go through."""
    evaluation = run.network.spec.evaluation
    images = min(evaluation.examples or run.test.examples, run.test.examples)
    return -(-images * evaluation.questions_per_example // evaluation.batch_examples)


def evaluate(
    run: Run, params: Any, cell: str, workdir: Path, on_batch: Callable[[int], None] = lambda rows: None
) -> ResultRow:
    """Scores `params` on the test split and joins errors with costs into the row of this cell.

    Raises `UserError` unless the training of `workdir` has ended.
    """
    if not (workdir / "summary.json").exists():
        raise UserError(f"{workdir}: its training has not ended (no summary.json); run vlm_jax.train on it again")
    summary = json.loads((workdir / "summary.json").read_text())
    spec, model, plan = run.network.spec, run.network.spec.model, run.network.plan
    program = plan.jit(harness.make_evaluate(run.network.model, spec.evaluation.max_new_tokens, tokenizer.END_ID))
    batches = pipeline.evaluation_batches(run.test, spec.data, spec.evaluation, run.test_features)
    result = harness.run(program, plan.put, params, batches, on_batch)
    return ResultRow(
        cell=cell,
        spec_hash=specs.spec_hash(spec),
        family=run.test.family,
        task=run.test.name,
        encoder=model.encoder.name,
        llm=model.decoder.name,
        compressor=model.compressor.name,
        llm_params=cost.decoder_params(model.decoder, "excluded"),
        llm_params_total=cost.decoder_params(model.decoder, "included"),
        visual_tokens=model.compressor.tokens,
        question_tokens=result.question_tokens,
        answer_tokens=result.answer_tokens,
        error=result.error[0],
        stderr=result.error[1],
        exact_error=result.exact[0],
        exact_stderr=result.exact[1],
        forced_error=result.forced[0],
        forced_stderr=result.forced[1],
        forced_nll=result.forced_nll,
        images=result.images,
        questions=result.questions,
        **cost.row_fields(cost.flops(model, result.question_tokens, result.answer_tokens + 1)),
        train_steps=specs.total_steps(spec),
        train_flops=summary["train_flops"],
        train_secs=summary["secs"],
        seed=spec.seed,
        encoder_sha256=run.network.encoder_sha256,
        params_sha256=summary["params_sha256"],
        version=vlm_jax.__version__,
        device=jax.devices()[0].device_kind,
    )
