"""The composition root: a `RunSpec` becomes splits, features, a model and a plan; doors, grids and tests all come
through here.

run = open_run(spec, cache_dir)         # data and features are made on first use, shared by every run
params = train(run, workdir, on_log)    # resumes what it finds in workdir
row = evaluate(run, params, cell)       # one typed row
"""

import contextlib
import functools
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

import vlm_jax
from vlm_jax import partitioning
from vlm_jax.core import specs, tree
from vlm_jax.core.errors import UserError
from vlm_jax.core.rows import ResultRow
from vlm_jax.core.specs import RunSpec, StageSpec
from vlm_jax.core.structs import Batch, TrainState
from vlm_jax.data import pipeline, sources, tokenizer
from vlm_jax.evaluation import generate, harness
from vlm_jax.models.importers import big_vision
from vlm_jax.models.vlm import Vlm
from vlm_jax.sizing import chips, cost
from vlm_jax.store import features as feature_store
from vlm_jax.store.checkpoint import Checkpoints, claim
from vlm_jax.store.metrics import MetricWriter
from vlm_jax.training import loop, loss, optim
from vlm_jax.training import step as training_step


class Network(NamedTuple):
    """A model on a mesh, without data. `encoder` holds the frozen or initial encoder weights, as numpy arrays."""

    spec: RunSpec
    plan: partitioning.Plan
    model: Vlm
    encoder: Any
    encoder_sha256: str


class Run(NamedTuple):
    """A network and what it is trained and tested on. Without stored features the batches carry pixels."""

    network: Network
    train: sources.Split
    test: sources.Split
    train_features: pipeline.Features | None
    test_features: pipeline.Features | None


def default_cache() -> Path:
    """Where data sets, features and compiled programs are kept: `$VLM_JAX_CACHE`, else `~/.cache/vlm_jax`."""
    return Path(os.environ.get("VLM_JAX_CACHE", "~/.cache/vlm_jax")).expanduser()


def use_compilation_cache(cache_dir: Path) -> None:
    """Compiled programs outlive the process: a cell with the shapes of an earlier one starts at once."""
    jax.config.update("jax_compilation_cache_dir", str(cache_dir / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def open_network(spec: RunSpec) -> Network:
    """The model of a spec on this machine's devices. Raises `UserError` for a mesh or checkpoint that does not fit."""
    plan = partitioning.make_plan(spec.compute)
    partitioning.check_batch(plan, spec.compute, spec.data.batch_examples)
    model = Vlm(spec.model, spec.compute)
    encoder = _encoder_weights(spec, model)
    return Network(spec, plan, model, encoder, tree.sha256(encoder))


def open_run(spec: RunSpec, cache_dir: Path) -> Run:
    """Builds what is missing under `cache_dir`, reads the rest. Raises `UserError` for what the spec cannot have."""
    network = open_network(spec)
    splits, readers = [], []
    for name in (spec.data.train_split, spec.data.test_split):
        split = _split(spec.data.dataset, spec.data.config, name, cache_dir / "data")
        splits.append(split)
        readers.append(_features(network, split, cache_dir / "features") if spec.data.frozen_features else None)
    return Run(network, *splits, *readers)


# A process that runs many cells reads each split once, and checks each feature store against the encoder once.
_READERS: dict[tuple[Path, str], pipeline.Features] = {}


@functools.lru_cache(maxsize=8)
def _split(dataset: str, config: str, name: str, data_dir: Path) -> sources.Split:
    sources.build(dataset, config, data_dir)
    return sources.load(dataset, config, name, data_dir)


def _features(network: Network, split: sources.Split, folder: Path) -> pipeline.Features:
    spec, plan, model = network.spec, network.plan, network.model
    key = feature_store.key(split.sha256, network.encoder_sha256, spec.model.encoder.taps)
    if (folder, key) not in _READERS:
        weights, encode = jax.device_put({"encoder": network.encoder}, plan.replicated), plan.jit(model.encode)
        _READERS[folder, key] = feature_store.open_or_compute(
            folder, key, split.images, split.examples, lambda image: encode(weights, image), split.name
        )
    return _READERS[folder, key]


def _encoder_weights(spec: RunSpec, model: Vlm) -> Any:
    """From the checkpoint, or random, the same for every run. Paths are looked up here, then beside the package."""
    if not spec.encoder_checkpoint:
        return jax.device_get(nn.meta.unbox(model.init_encoder(jax.random.key(0))))
    here, beside = Path(spec.encoder_checkpoint), Path(vlm_jax.__file__).parent.parent / spec.encoder_checkpoint
    return big_vision.load_encoder(here if here.exists() or not beside.exists() else beside, spec.model.encoder)


def _init_params(network: Network, key: jax.Array) -> Any:
    """Boxed parameters of every part that training carries."""
    params, model = network.model.init(key), network.model
    return params if network.spec.data.frozen_features else {**params, "encoder": model.init_encoder(key)}


def _abstract_state(network: Network, stage: StageSpec) -> Any:
    """Boxed shapes of the state of a stage."""
    optimiser = optim.make_optimiser(network.spec.optim, stage)
    return jax.eval_shape(
        lambda key: training_step.init_state(_init_params(network, key), optimiser, stage.train), jax.random.key(0)
    )


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
    claim(workdir, specs.to_dict(spec))
    started = time.monotonic()
    with (
        contextlib.closing(Checkpoints(workdir, spec.keep_checkpoints)) as checkpoints,
        contextlib.closing(MetricWriter(workdir)) as metrics,
    ):
        restored = checkpoints.latest() or 0
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
        optimiser, abstract = optim.make_optimiser(spec.optim, stage), _abstract_state(network, stage)
        shardings = plan.shardings(abstract)
        if restored > first:
            state, cursor = checkpoints.restore(restored, nn.meta.unbox(abstract), shardings)
        else:
            params = _first_params(network) if params is None else params
            start = functools.partial(training_step.init_state, optimiser=optimiser, train=stage.train, step=first)
            state = plan.jit(start, out_shardings=shardings)(params)
        step = training_step.make_step(_forward(network), optimiser, stage.train, spec.compute.microbatches)
        state, cursor = loop.run(
            state,
            max(first, restored),
            last,
            pipeline.train_batches(run.train, spec.data, spec.seed, cursor, run.train_features),
            plan.put,
            plan.jit(step, donate_argnums=0, out_shardings=(shardings, None, None)),
            log_every_steps=spec.log_every_steps,
            save_every_steps=spec.save_every_steps,
            on_log=_publisher(run, stage, first, metrics, on_log),
            on_save=save,
        )
        params = state.params
    if restored < last:
        save(last, state, cursor)
    return state


def _forward(network: Network) -> training_step.Forward:
    return lambda params, batch: loss.sums(network.model.forward(params, batch), batch)


def _publisher(
    run: Run, stage: StageSpec, first: int, metrics: MetricWriter, on_log: Callable[[loop.Log, dict[str, float]], None]
) -> Callable[[loop.Log], None]:
    """Hands each log to the metrics thread, which alone waits for the device."""

    def make(log: loop.Log) -> dict[str, float]:
        values = _numbers(run, log, stage, first)
        on_log(log, values)
        return values

    return lambda log: metrics.write(log.step, lambda: make(log))


def _first_params(network: Network) -> Any:
    """Fresh parameters, and the encoder's from its checkpoint."""
    params = network.plan.init(lambda key: _init_params(network, key), jax.random.key(network.spec.seed))
    if "encoder" in params:
        place = lambda new, old: jax.device_put(new, old.sharding)  # noqa: E731
        params["encoder"] = jax.tree.map(place, network.encoder, params["encoder"])
    return params


def _numbers(run: Run, log: loop.Log, stage: StageSpec, first: int) -> dict[str, float]:
    """A log as plain numbers."""
    spec, plan = run.network.spec, run.network.plan
    sums, norms = jax.device_get((log.sums, log.norms))
    count = max(float(sums.count), 1.0)
    values = {
        "loss": float(sums.nll) / count,
        "token_error": 1 - float(sums.hits) / count,
        "grad_norm": float(norms.grad),
        "update_norm": float(norms.update),
        "learning_rate": float(optim.schedule(spec.optim, stage)(log.step - first - 1)),
    }
    if log.secs > 0:
        step_secs = log.secs / log.examples
        flops = step_flops(run, stage)
        values |= {
            "step_secs": step_secs,
            "examples_per_sec": spec.data.batch_examples / step_secs,
            "model_flops_per_sec": flops / step_secs,
        }
        chip = chips.of_device(jax.devices()[0].device_kind)
        if chip is not None:
            values["mfu"] = flops / step_secs / (chip.peak_flops * plan.mesh.size)
    return values


def step_flops(run: Run, stage: StageSpec) -> float:
    """Model FLOPs of one step of a stage, forward and backward."""
    spec, data = run.network.spec, run.network.spec.data
    features = "stored" if data.frozen_features else "pixels"
    question = float(run.train.question_lengths.mean())
    return data.batch_examples * cost.train_flops(spec.model, data.text_tokens, stage.train, features, question)


def train_flops(run: Run) -> float:
    """Model FLOPs of the whole run."""
    return sum(stage.total_steps * step_flops(run, stage) for stage in run.network.spec.stages)


def _write_summary(run: Run, workdir: Path, params: Any, values: dict[str, float], secs: float) -> None:
    """`summary.json`; seconds are those of this process."""
    path = workdir / "summary.json"
    summary = {
        "step": specs.total_steps(run.network.spec),
        **values,
        "params_sha256": tree.sha256(jax.device_get(params)),
        "secs": secs,
        "train_flops": train_flops(run),
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
    claim(workdir, specs.to_dict(network.spec))
    with contextlib.closing(Checkpoints(workdir, network.spec.keep_checkpoints)) as checkpoints:
        step = checkpoints.latest()
        if step is None:
            raise UserError(f"{checkpoints.directory}: no complete checkpoint; train this run first")
        stage = next(stage for stage, _, last in stages(network.spec) if step <= last)
        abstract = _abstract_state(network, stage)
        state, _ = checkpoints.restore(step, nn.meta.unbox(abstract), network.plan.shardings(abstract))
        return state.params


def answer(network: Network, params: Any, image: np.ndarray, question: str) -> str:
    """Greedy answer to one question about one image (uint8[H, H, 3]). Raises `UserError` for an unknown word."""
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
    """Scores `params` on the test split and joins errors with costs into the row of this cell."""
    spec, model, plan = run.network.spec, run.network.spec.model, run.network.plan
    program = plan.jit(harness.make_evaluate(run.network.model, spec.evaluation.max_new_tokens, tokenizer.END_ID))
    batches = pipeline.evaluation_batches(run.test, spec.data, spec.evaluation, run.test_features)
    result = harness.run(program, plan.put, params, batches, on_batch)
    summary = json.loads((workdir / "summary.json").read_text())
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
        **cost.row_fields(cost.flops(model, result.question_tokens, result.answer_tokens)),
        train_steps=specs.total_steps(spec),
        train_flops=train_flops(run),
        train_secs=summary["secs"],
        seed=spec.seed,
        encoder_sha256=run.network.encoder_sha256,
        params_sha256=summary["params_sha256"],
        version=vlm_jax.__version__,
        device=jax.devices()[0].device_kind,
    )
