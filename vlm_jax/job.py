"""Training and evaluation of a run.

params = train(run, workdir, on_log)        # resumes from the checkpoints of workdir
row = evaluate(run, params, cell, workdir)  # a ResultRow
"""

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

import vlm_jax
from vlm_jax import bad_steps, build, logbook
from vlm_jax.build import Network, Run, fitting
from vlm_jax.checkpoints import orbax
from vlm_jax.checkpoints.orbax import Checkpoints, disk_errors, lock_workdir
from vlm_jax.core import specs, tree
from vlm_jax.core.errors import STOPPED, RunStopped, UserError
from vlm_jax.core.files import write_json
from vlm_jax.core.rows import ResultRow
from vlm_jax.core.specs import RunSpec, StageSpec
from vlm_jax.core.structs import TrainState
from vlm_jax.data import pipeline
from vlm_jax.data.views import Data
from vlm_jax.distributed import processes
from vlm_jax.distributed.ownership import own_workdir
from vlm_jax.evaluation import harness
from vlm_jax.inference import sampling
from vlm_jax.models.decoder import unstack_layers
from vlm_jax.sizing import cost
from vlm_jax.training import guard, loop
from vlm_jax.training import step as training_step
from vlm_jax.training.metrics import MetricWriter

OnLog = Callable[[loop.Log, dict[str, float]], None]
_SHARED = ("question_tokens", "answer_tokens", "forced_nll", "images", "questions")  # of harness.Result and ResultRow


def print_notice(message: str) -> None:
    print(f"note: {message}", file=sys.stderr)


def stages(spec: RunSpec) -> Iterator[tuple[StageSpec, int, int]]:
    """(stage, steps before it, its last step), counted over the whole run."""
    first = 0
    for stage in spec.stages:
        yield stage, first, first + stage.total_steps
        first += stage.total_steps


def train(
    run: Run,
    workdir: Path,
    on_log: OnLog,
    stop: Callable[[int], bool] = lambda step: False,
    on_notice: Callable[[str], None] = print_notice,
    on_start: Callable[[], object] = lambda: None,
) -> Any:
    """Trains to the end, from the newest intact checkpoint of `workdir` if there is one. Returns the parameters.

    Writes `summary.json`. `on_log` is called in the metrics thread of the primary process with each log and its
    metrics, `on_notice` for a damaged checkpoint, `on_start` once the workdir has been checked.

    Raises:
        UserError: another process trains in `workdir`, it belongs to another spec or is not writable, or none of its
            checkpoints is intact.
        RunStopped: `stop(step)` was True, and the state is saved; or a bad step, see `bad_steps`.
    """
    with own_workdir(workdir):
        return _train(run, workdir, on_log, stop, on_notice, on_start)


def _train(
    run: Run,
    workdir: Path,
    on_log: OnLog,
    stop: Callable[[int], bool],
    on_notice: Callable[[str], None],
    on_start: Callable[[], object],
) -> Any:
    """`train` of a workdir that this run owns."""
    spec, started = run.network.spec, time.monotonic()
    lock_workdir(workdir, specs.to_dict(spec), specs.MAY_CHANGE)
    with disk_errors(workdir), contextlib.ExitStack() as stack:
        checkpoints = Checkpoints(workdir, spec.keep_checkpoints, spec.keep_every_steps)
        stack.enter_context(contextlib.closing(checkpoints))
        restored = _intact_step(checkpoints, on_notice)
        metrics = None
        if processes.is_primary():
            metrics = stack.enter_context(contextlib.closing(MetricWriter(workdir, restored)))
        bad_steps.forget_after(workdir, restored)
        _report_data(run, workdir, on_notice)
        if left := [stage for stage, _, last in stages(spec) if last > restored]:
            run = _fitted(run, left, on_notice)
        on_start()
        end = _train_stages(run, workdir, restored, checkpoints, metrics, on_log, stop, started)
    summary = workdir / "summary.json"  # may be missing after the last checkpoint
    if processes.broadcast_from_primary(end.step > restored or not summary.is_file()):
        sha256 = tree.sha256(end.state.params, processes.fetch)
        if metrics is not None:
            with disk_errors(workdir):
                logbook.write_summary(summary, run.network, metrics.last, sha256, end.secs, _question_tokens(run))
    processes.barrier("end of training")
    return end.state.params


def _fitted(run: Run, left: Sequence[StageSpec], on_notice: Callable[[str], None]) -> Run:
    """The run with compute.remat="auto" replaced by what fits in its devices' memory in the stages that are left."""
    limit = fitting.usable_bytes(run.network.plan)
    network, choice = fitting.fitted(run.network, limit, left)
    if network is not run.network and processes.is_primary():
        memory = "the memory of this kind of device is not known"
        if choice is not None:
            peak = max(program.memory.peak for program in choice.programs)
            memory = f"{peak / fitting.GIB:.2f} of {limit / fitting.GIB:.2f} GiB of a device"
        on_notice(f"compute.remat=auto: {network.model.compute.remat} ({memory})")
    return run._replace(network=network)


def _report_data(run: Run, workdir: Path, on_notice: Callable[[str], None]) -> None:
    """Writes `data.json`, and says what is skipped, cut or dropped."""
    if not processes.is_primary():
        return
    reports = {stage.name: logbook.data_report(b) for stage, b in zip(run.network.spec.stages, run.train, strict=True)}
    write_json(workdir / "data.json", reports)
    for name, report in reports.items():
        skipped = sum(map(len, report["skipped"].values())) + len(report["unreadable"])
        if skipped or report["cut"] or report["dropped"]:
            on_notice(
                f"data of stage {name}: {report['kept']:,} items kept, {skipped:,} skipped, {report['cut']:,} "
                f"conversations cut, {report['dropped']:,} dropped (ids in {workdir / 'data.json'})"
            )


def _intact_step(checkpoints: Checkpoints, on_notice: Callable[[str], None]) -> int:
    """The step to resume from, 0 without a checkpoint. Moves damaged checkpoints to another folder."""
    damaged = {}
    step = checkpoints.latest_intact(damaged.__setitem__)
    for other, reason in damaged.items():
        folder = checkpoints.set_aside(other)
        on_notice(f"checkpoint {other} is damaged ({reason}): moved to {folder}, resuming from step {step}")
    return step or 0


class _Trained(NamedTuple):
    step: int
    state: TrainState
    secs: float  # training time, including that before the run was resumed


def _train_stages(
    run: Run,
    workdir: Path,
    restored: int,
    checkpoints: Checkpoints,
    metrics: MetricWriter | None,
    on_log: OnLog,
    stop: Callable[[int], bool],
    started: float,
) -> _Trained:
    """Trains the stages that are not finished at step `restored`; 0 starts from initial parameters."""
    network, spec, plan = run.network, run.network.spec, run.network.plan
    params = state = None
    secs_before, step, log_sums = 0.0, restored, loop.LogSums()

    def secs() -> float:
        return secs_before + time.monotonic() - started

    def save(step: int, state: TrainState, log_sums: loop.LogSums) -> None:
        if metrics is not None:
            metrics.wait()
        checkpoints.save(step, state, {"secs": secs(), **logbook.log_sums_to_dict(log_sums)})

    subset = functools.cache(lambda: make_evaluator(run, spec.evaluation.subset_examples))
    evaluation_secs = [0.0]  # since the last log

    def evaluate_subset(step: int, state: TrainState) -> None:
        jax.block_until_ready(state.params)
        if metrics is not None:
            metrics.wait()  # so that the logs so far end before the evaluation does, and only the next leaves it out
        begin = time.monotonic()
        result = harness.summarise(subset()(state.params))
        evaluation_secs[0] += time.monotonic() - begin
        if metrics is not None:
            metrics.write(step, lambda: logbook.evaluation_numbers(result))

    elsewhere = 0  # steps of earlier stages on data of their own
    for batches, (stage, first, last) in zip(run.train, stages(spec), strict=True):
        data_first = first if stage.data else elsewhere  # stages without data of their own share those of the run
        elsewhere += stage.total_steps if stage.data else 0
        if restored > last:
            continue
        update = build.train_step(network, stage)
        if restored > first:
            abstract = nn.meta.unbox(update.abstract)
            state, progress = checkpoints.restore(restored, abstract, update.shardings)
            secs_before, log_sums = progress.get("secs", 0.0), logbook.log_sums_from_dict(progress)
            if restored == last == specs.total_steps(spec):
                return _Trained(restored, state, secs_before)
        else:
            params = build.first_params(network) if params is None else params
            parts = dict(optimiser=update.optimiser, train=stage.train, step=first)
            init = functools.partial(training_step.init_state, **parts)
            state = plan.jit(init, out_shardings=update.shardings, donate_argnums=0)(params)
        step = max(first, restored)
        end = loop.run(
            state,
            step,
            last,
            pipeline.train_batches(batches, step - data_first, last - data_first),
            plan.put,
            update.step,
            log_every_steps=spec.log_every_steps,
            save_every_steps=spec.save_every_steps,
            on_log=_log_writer(run, batches.data.mixture.names, stage, first, metrics, on_log, evaluation_secs),
            on_save=save,
            evaluate_every_steps=spec.evaluate_every_steps,
            on_evaluate=evaluate_subset,
            check=bad_steps.make_check(workdir, batches, data_first, spec, guard.skipped(state.opt_state)),
            stop=stop,
            log_sums=log_sums,
        )
        step, state, log_sums = end.step, end.state, end.log_sums
        params = state.params
        if end.stopped and step < specs.total_steps(spec):
            save(step, state, log_sums)
            checkpoints.wait()
            raise RunStopped(f"saved step {step} of {specs.total_steps(spec)}; the same command resumes", STOPPED)
    if restored < last:
        save(last, state, log_sums)
    return _Trained(step, state, secs())


def _log_writer(
    run: Run,
    names: Sequence[str],
    stage: StageSpec,
    first: int,
    metrics: MetricWriter | None,
    on_log: OnLog,
    evaluation_secs: list[float],
) -> Callable[[loop.Log], None]:
    """`write(log)`, which queues a log for the metrics thread; that thread waits for the device and so can time steps.
    `evaluation_secs` is subtracted from the time of steps.
    """
    if metrics is None:
        return lambda log: None
    spec, plan = run.network.spec, run.network.plan
    finished: list[float] = []  # the first log has no speed: its time includes compilation

    def make(log: loop.Log, excluded_secs: float) -> dict[str, float]:
        values = logbook.numbers(spec, stage, first, log, names)
        finished.append(time.monotonic())
        if len(finished) > 1:
            step_secs = (finished[-1] - finished[-2] - excluded_secs) / log.steps
            values |= logbook.speed(spec, stage, plan, _question_tokens(run), step_secs)
        on_log(log, values)
        return values

    def write(log: loop.Log) -> None:
        excluded_secs, evaluation_secs[0] = evaluation_secs[0], 0.0
        metrics.write(log.step, lambda: make(log, excluded_secs))

    return write


def _question_tokens(run: Run) -> float:
    """Mean length of a training question, as a compressor reads it."""
    parts = run.train[-1].data.mixture.parts
    return float(np.mean(np.concatenate([np.diff(part.question_bounds) for part in parts])))


def restore(
    network: Network,
    workdir: Path,
    on_notice: Callable[[str], None] = print_notice,
    least_step: int = 0,
) -> Any:
    """Parameters of the newest intact checkpoint. Raises `UserError` if the workdir is another spec's or has no
    checkpoint of `least_step` or later.
    """
    if not (workdir / "checkpoints").is_dir():
        raise UserError(f"{workdir}: expected a checkpoint, got none (train this run first, or name its --workdir)")
    lock_workdir(workdir, specs.to_dict(network.spec), specs.MAY_CHANGE)
    boxed = build.abstract_state(network, network.spec.stages[0])
    shapes, shardings = nn.meta.unbox(boxed).params, network.plan.shardings(boxed).params

    def on_damaged(step: int, reason: str) -> None:
        on_notice(f"checkpoint {step} is damaged ({reason}): the one before is used")

    return orbax.restore_params(workdir, shapes, shardings, on_damaged, least_step)


def evaluation_batches(run: Run) -> int:
    """The number of batches of `evaluate`."""
    evaluation = run.network.spec.evaluation
    return -(-len(pipeline.evaluation_pairs(_test(run), evaluation)) // evaluation.batch_examples)


def _test(run: Run) -> Data:
    if run.test is None:
        raise UserError("config field data.test: expected held-out data to evaluate on, got none")
    return run.test


def make_evaluator(run: Run, examples: int | None = None) -> Callable[..., harness.QuestionScores]:
    """`(params, on_batch) -> QuestionScores` on the first `examples` of the test data (None: those of the spec),
    compiled once.
    """
    spec, plan, network = run.network.spec, run.network.plan, run.network
    model = network.model._replace(compute=sampling.compute_for_decoding(network.model.compute))
    eos_id = build.load_tokenizer(spec.data.tokenizer).eos_ids[0]
    program = plan.jit(harness.make_evaluate(model, spec.evaluation.max_new_tokens, eos_id))
    rows = plan.rows(spec.evaluation.batch_examples)

    def evaluate(params: Any, on_batch: Callable[[int], None] = lambda rows: None) -> harness.QuestionScores:
        params = {**params, "decoder": unstack_layers(params["decoder"], spec.model.decoder.depth)}
        batches = pipeline.evaluation_batches(_test(run), spec.evaluation, rows, examples)
        return harness.run(program, plan.put, params, batches, on_batch, processes.fetch)

    return evaluate


def evaluate(
    run: Run, params: Any, cell: str, workdir: Path, on_batch: Callable[[int], None] = lambda rows: None
) -> ResultRow:
    """Evaluates `params` on the test split; returns the cell's row of errors and costs. Raises `UserError` unless the
    training of `workdir` is complete.
    """
    summary = logbook.read_summary(workdir / "summary.json")
    spec, model, mixture = run.network.spec, run.network.spec.model, _test(run).mixture
    result = harness.summarise(make_evaluator(run)(params, on_batch))
    return ResultRow(
        cell=cell,
        spec_hash=specs.spec_hash(spec),
        family=mixture.name,
        task=" + ".join(part.source.name for part in mixture.parts),
        encoder=model.encoder.name,
        llm=model.decoder.name,
        compressor=model.compressor.name,
        llm_params=cost.decoder_params(model.decoder, "excluded"),
        llm_params_total=cost.decoder_params(model.decoder, "included"),
        visual_tokens=model.compressor.tokens,
        **{name: getattr(result, name) for name in _SHARED},
        error=result.error[0],
        stderr=result.error[1],
        exact_error=result.exact[0],
        exact_stderr=result.exact[1],
        forced_error=result.forced[0],
        forced_stderr=result.forced[1],
        **cost.row_fields(cost.flops(model, result.question_tokens, result.answer_tokens + 1)),
        train_steps=specs.total_steps(spec),
        train_flops=summary["train_flops"],
        train_secs=summary["secs"],
        seed=spec.seed,
        encoder_sha256=run.network.encoder_sha256,
        params_sha256=summary["params_sha256"],
        version=vlm_jax.__version__,
        device=jax.devices()[0].device_kind,
        model=model,
    )
