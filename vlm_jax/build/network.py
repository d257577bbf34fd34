"""The model of a `RunSpec` on a mesh, its initial parameters and its train step."""

import contextlib
import dataclasses
import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from vlm_jax.build.published import load_tokenizer, public_connector, public_params
from vlm_jax.checkpoints import big_vision, inspection
from vlm_jax.checkpoints.huggingface import processors
from vlm_jax.compress import catalog
from vlm_jax.core import specs, tree
from vlm_jax.core.errors import UserError
from vlm_jax.core.files import disk_problem, is_full
from vlm_jax.core.located import located
from vlm_jax.core.specs import (
    PREPARATION,
    ComputeSpec,
    EncoderSpec,
    RunSpec,
    StageSpec,
)  # fmt: skip
from vlm_jax.core.structs import Inputs, LossSums, TrainState
from vlm_jax.distributed import partitioning, processes
from vlm_jax.models import elastic
from vlm_jax.models.vlm import Vlm
from vlm_jax.training import guard, loss, optim
from vlm_jax.training import step as training_step


class Network(NamedTuple):
    """A model on a mesh, without data."""

    spec: RunSpec
    plan: partitioning.Plan
    model: Vlm  # its spec has the image preparation of the encoder's checkpoint
    encoder: Any  # frozen or initial weights as numpy arrays; None: shapes only
    encoder_sha256: str


class TrainStep(NamedTuple):
    """The jitted update of one stage."""

    program: Any  # (state, batch, V or None) -> (state, LossSums, Norms); the state is donated
    tokens: Callable[[int], int | None]  # the V of a step; None where every step is the same
    optimiser: Any
    abstract: Any  # boxed shapes of the state
    shardings: Any  # of the state, unboxed

    def step(self, state: TrainState, batch: Inputs, number: int) -> tuple[TrainState, LossSums, Any]:
        """The step of that number."""
        return self.program(state, batch, self.tokens(number))


def default_cache() -> Path:
    """The folder of data sets, features and compiled programs: `$VLM_JAX_CACHE`, else `~/.cache/vlm_jax`. Raises
    `UserError` for a user without a home directory."""
    try:
        return Path(os.environ.get("VLM_JAX_CACHE") or "~/.cache/vlm_jax").expanduser()
    except RuntimeError as error:
        raise UserError(f"no cache: {error} (set VLM_JAX_CACHE=FOLDER or HOME=FOLDER)") from error


def use_compilation_cache(cache_dir: Path) -> None:
    """Turns on JAX's persistent compilation cache. Raises `UserError` if `cache_dir` cannot be created or written."""
    programs = cache_dir / "programs"
    try:
        programs.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=programs).close()
    except OSError as error:
        raise _cache_error(cache_dir, disk_problem(error) or str(error)) from error
    jax.config.update("jax_compilation_cache_dir", str(programs))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@contextlib.contextmanager
def cache_errors(cache_dir: Path) -> Iterator[None]:
    """Turns errors of the cache's disk into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (reason := disk_problem(error)) is None:
            raise
        raise _cache_error(cache_dir, reason) from error


def _cache_error(cache_dir: Path, reason: str) -> UserError:
    fix = "free disk space, or " if is_full(reason) else ""
    return UserError(f"{cache_dir}: the cache cannot be written ({reason}): {fix}set VLM_JAX_CACHE to another folder")


def open_network(spec: RunSpec, plan: partitioning.Plan | None = None) -> Network:
    """The model of a spec on `plan`, or all devices. Raises `UserError` for a mesh or checkpoint that does not fit."""
    processes.check_initialized()
    vocab, tokenizer = spec.model.decoder.vocab, load_tokenizer(spec.data.tokenizer)
    if vocab < tokenizer.size:
        raise UserError(f"model.vocab: expected at least the tokenizer's size {tokenizer.size}, got {vocab}")
    if vocab <= (eos := max(tokenizer.eos_ids)):
        raise UserError(
            f"model.vocab: expected more than {eos}, the eos_token_id of {spec.data.tokenizer}, got {vocab}"
        )
    network = lay_out(spec, plan or partitioning.make_plan(spec.compute))
    encoder = _encoder_weights(spec, network.model)
    model = network.model._replace(spec=dataclasses.replace(spec.model, encoder=_prepared(spec)))
    return network._replace(model=model, encoder=encoder, encoder_sha256=tree.sha256(encoder))


def lay_out(spec: RunSpec, plan: partitioning.Plan) -> Network:
    """The model of a spec on a plan, without weights: enough to compile its programs. Raises `UserError` where batch,
    model, mesh and devices do not fit together.
    """
    if spec.compute.attention == "cudnn":  # "splash" runs everywhere
        _check_cudnn(spec.compute, plan)
    for rows in {specs.data_of(spec, stage).batch_rows for stage in spec.stages}:
        partitioning.check_batch(plan, "data.batch_rows", rows, spec.compute.microbatches)
    partitioning.check_batch(plan, "evaluation.batch_examples", spec.evaluation.batch_examples)
    model = Vlm(spec.model, spec.compute)
    partitioning.check_sharded(plan, jax.eval_shape(model.init, jax.random.key(0)))
    return Network(spec, plan, model, None, "")


def _check_cudnn(compute: ComputeSpec, plan: partitioning.Plan) -> None:
    if plan.platform not in ("gpu", "cuda"):
        raise UserError(f"compute.attention=cudnn runs on NVIDIA GPUs, not on {plan.platform}: set it to xla")
    if compute.dtype == "float32":
        raise UserError("compute.attention=cudnn: expected compute.dtype=bfloat16, got float32")


def _prepared(spec: RunSpec) -> EncoderSpec:
    """The encoder spec with the image preparation of its checkpoint, except for `data.resize`."""
    encoder, path = spec.model.encoder, located(spec.encoder_checkpoint)
    if spec.encoder_checkpoint:
        if path.suffix == ".npz":
            source = processors.with_processor_files(encoder, path)
        else:
            source = inspection.prepared_encoder(inspection.inspect(path)) or encoder
        encoder = dataclasses.replace(encoder, **{name: getattr(source, name) for name in PREPARATION})
    return dataclasses.replace(encoder, resize=spec.data.resize or encoder.resize)


def _encoder_weights(spec: RunSpec, model: Vlm) -> Any:
    """Encoder weights of the checkpoint, or random ones that are the same for every run."""
    if not spec.encoder_checkpoint:
        return jax.device_get(nn.meta.unbox(model.init_encoder(jax.random.key(0))))
    path = located(spec.encoder_checkpoint)
    if path.suffix == ".npz":
        return big_vision.load_encoder(path, spec.model.encoder)
    return jax.device_get(public_params(path, "encoder", spec.model.encoder, None))


def init_params(network: Network, key: jax.Array) -> Any:
    """Boxed random parameters of all parts in the train state."""
    params, model = network.model.init(key), network.model
    return params if network.spec.data.frozen_features else {**params, "encoder": model.init_encoder(key)}


def train_step(network: Network, stage: StageSpec) -> TrainStep:
    """The train step of a stage. With an elastic compressor a step is at one V of its weights, drawn anew each time, or
    at all of them (`specs.ELASTIC_STEPS`); where the tokens of a smaller V come first among those of a larger, one
    program serves all.
    """
    spec, model, plan = network.spec, network.model, network.plan
    optimiser, abstract = _optimiser(spec, stage), abstract_state(network, stage)
    shardings = plan.shardings(abstract)

    eos_ids, sources = load_tokenizer(spec.data.tokenizer).eos_ids, len(specs.data_of(spec, stage).train)
    several = spec.model.compressor.elastic

    def sums(params: Any, batch: Inputs, tokens: Any) -> LossSums:
        hidden = model.forward(params, batch)[0] if tokens is None else elastic.forward(model, params, batch, tokens)
        return loss.sums(hidden, model.head(params), batch, eos_ids, sources)

    def forward(params: Any, batch: Inputs, tokens: Any) -> LossSums:
        if spec.elastic != "all":
            return sums(params, batch, tokens)
        return jax.tree.map(lambda *parts: sum(parts), *(sums(params, batch, each) for each in several))

    step = training_step.make_step(forward, optimiser, stage.train, spec.compute.microbatches)
    is_ladder = catalog.row(spec.model.compressor.name).elastic == "ladder"
    static = dict(static_argnums=2) if is_ladder else {}
    program = plan.jit(step, donate_argnums=0, out_shardings=(shardings, None, None), **static)
    is_drawn = bool(several) and spec.elastic == "drawn"
    tokens = functools.partial(specs.drawn_tokens, spec) if is_drawn else lambda number: None
    return TrainStep(program, tokens, optimiser, abstract, shardings)


def _optimiser(spec: RunSpec, stage: StageSpec) -> Any:
    return guard.guarded(optim.make_optimiser(spec.optim, stage, spec.compute.moments), spec.bad_step)


def abstract_state(network: Network, stage: StageSpec) -> Any:
    """Boxed shapes of the train state of a stage."""
    optimiser = _optimiser(network.spec, stage)
    return jax.eval_shape(
        lambda key: training_step.init_state(init_params(network, key), optimiser, stage.train), jax.random.key(0)
    )


def first_params(network: Network) -> Any:
    """The initial parameters: random, or from a checkpoint where a part has one."""
    spec, plan = network.spec, network.plan
    loaded = {"decoder"} if spec.decoder_checkpoint else set()

    def init(key: jax.Array) -> Any:
        return {name: part for name, part in init_params(network, key).items() if name not in loaded}

    params = plan.init(init, jax.random.key(spec.seed))
    if loaded:
        path, scan_layers = located(spec.decoder_checkpoint), spec.compute.scan_layers
        params["decoder"] = public_params(path, "decoder", spec.model.decoder, plan, scan_layers)
    if spec.connector_checkpoint:
        tower = located(spec.encoder_checkpoint)
        vision = tower if spec.encoder_checkpoint and tower.is_dir() else None
        public = public_connector(located(spec.connector_checkpoint), spec.model, plan, vision)
        params["connector"] = {**params["connector"], **public}
    if "encoder" in params:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, params["encoder"])
        params["encoder"] = jax.device_put(network.encoder, shardings)
    return params
