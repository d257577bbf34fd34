"""The composition root: a `RunSpec` becomes a model on a mesh, splits and features. Doors, grids and tests come here.

    network = open_network(spec)            # no data needed: enough to answer questions
    run = open_run(spec, cache_dir)         # data and features are made on first use, shared by every run

What is done with a run stands in `job`.
"""

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax

import vlm_jax
from vlm_jax.checkpoints import big_vision, inspection
from vlm_jax.checkpoints.huggingface import processors
from vlm_jax.core import tree
from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import PREPARATION, ComputeSpec, DecoderSpec, EncoderSpec, RunSpec, StageSpec
from vlm_jax.core.structs import LossSums
from vlm_jax.data import features as feature_store
from vlm_jax.data import pipeline, sources, tokenizers
from vlm_jax.distributed import partitioning, processes
from vlm_jax.models.vlm import Vlm
from vlm_jax.training import guard, loss, optim
from vlm_jax.training import step as training_step


class Network(NamedTuple):
    """A model on a mesh, without data. `encoder` holds the frozen or initial encoder weights, as numpy arrays; None
    where only shapes are wanted. `model.spec` is `spec.model` with the image preparation of the encoder's checkpoint.
    """

    spec: RunSpec
    plan: partitioning.Plan
    model: Vlm
    encoder: Any
    encoder_sha256: str


class TrainStep(NamedTuple):
    """The compiled-on-first-use update of one stage, and what it works on."""

    step: Any  # (state, batch) -> (state, LossSums, Norms); the state is donated
    optimiser: Any
    abstract: Any  # boxed shapes of the state
    shardings: Any  # of the state, unboxed


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


def open_network(spec: RunSpec, plan: partitioning.Plan | None = None) -> Network:
    """The model of a spec on this machine's devices, or on the given plan. Raises `UserError` for a mesh or checkpoint
    that does not fit.
    """
    processes.check_initialized()
    vocab, words = spec.model.decoder.vocab, load_tokenizer(spec.data.tokenizer)
    if vocab < words.size:
        raise UserError(f"model.vocab={vocab}: the tokenizer has {words.size} words")
    if vocab <= (end := max(words.eos_ids)):
        raise UserError(f"model.vocab={vocab}: {spec.data.tokenizer} ends answers with token {end} (eos_token_id)")
    network = lay_out(spec, plan or partitioning.make_plan(spec.compute))
    encoder = _encoder_weights(spec, network.model)
    model = network.model._replace(spec=dataclasses.replace(spec.model, encoder=_prepared(spec)))
    return network._replace(model=model, encoder=encoder, encoder_sha256=tree.sha256(encoder))


def lay_out(spec: RunSpec, plan: partitioning.Plan) -> Network:
    """The model of a spec on that plan, without any weights: enough to compile its programs.

    Raises `UserError` where batch, model, mesh and the kind of its devices do not fit together.
    """
    if spec.compute.attention == "cudnn":  # "splash" runs everywhere
        _check_cudnn(spec.compute, plan)
    partitioning.check_batch(plan, "data.batch_examples", spec.data.batch_examples, spec.compute.microbatches)
    partitioning.check_batch(plan, "evaluation.batch_examples", spec.evaluation.batch_examples)
    model = Vlm(spec.model, spec.compute)
    partitioning.check_sharded(plan, jax.eval_shape(model.init, jax.random.key(0)))
    return Network(spec, plan, model, None, "")


def _check_cudnn(compute: ComputeSpec, plan: partitioning.Plan) -> None:
    platform = plan.mesh.devices.flat[0].platform
    if platform not in ("gpu", "cuda"):
        raise UserError(f"compute.attention=cudnn runs on NVIDIA GPUs, not on {platform}: set it to xla")
    if compute.dtype == "float32":
        raise UserError("compute.attention=cudnn takes 16-bit numbers: set compute.dtype=bfloat16, or attention=xla")


def open_run(spec: RunSpec, cache_dir: Path) -> Run:
    """Builds what is missing under `cache_dir`, reads the rest. Raises `UserError` for what the spec cannot have."""
    network = open_network(spec)
    data, evaluation = spec.data, spec.evaluation
    train, test = (
        _split(data.dataset, data.config, name, cache_dir / "data", data.tokenizer)
        for name in (data.train_split, data.test_split)
    )
    train, test = (split._replace(encoder=network.model.spec.encoder) for split in (train, test))
    pipeline.check_training(train, data)
    pipeline.check(test, evaluation.questions_per_example)
    if not data.frozen_features:
        return Run(network, train, test, None, None)
    return Run(network, train, test, *(_features(network, split, cache_dir / "features") for split in (train, test)))


# A process that runs many cells reads each split once, and checks each feature store against the encoder once.
_READERS: dict[tuple[Path, str], pipeline.Features] = {}


@functools.lru_cache(maxsize=8)
def _split(dataset: str, config: str, name: str, data_dir: Path, words: str) -> sources.Split:
    sources.build(dataset, config, data_dir)
    return sources.load(dataset, config, name, data_dir, load_tokenizer(words))


@functools.lru_cache(maxsize=4)
def load_tokenizer(folder: str) -> tokenizers.Tokenizer:
    """The tokenizer of a language model's folder; "" is the project's own."""
    if not folder:
        return tokenizers.word_tokenizer()
    there = Path(folder)
    words = tokenizers.read_tokenizer(there, inspection.read_config(there) if (there / "config.json").is_file() else {})
    if not words.eos_ids:
        raise UserError(f"{folder}: names no token that ends an answer (eos_token); training wants one")
    return words


def _features(network: Network, split: sources.Split, folder: Path) -> pipeline.Features:
    spec, model = network.spec, network.model
    # Of several processes each encodes on its own devices what it does not find in the cache.
    alone = dataclasses.replace(spec.compute, strategy="replicated", mesh=(-1, 1, 1), slices=1)
    plan = network.plan if jax.process_count() == 1 else partitioning.make_plan(alone, jax.local_devices())
    how = {**dataclasses.asdict(model.spec.encoder), "dtype": spec.compute.dtype}
    key = feature_store.key(split.sha256, network.encoder_sha256, how)
    if (folder, key) not in _READERS:
        weights = jax.device_put({"encoder": network.encoder}, plan.replicated)
        encode = plan.jit(model.encode)
        _READERS[folder, key] = feature_store.open_or_compute(
            folder, key, split.images, split.examples, lambda image: encode(weights, image), split.name
        )
    return _READERS[folder, key]


def _prepared(spec: RunSpec) -> EncoderSpec:
    """The run's encoder, with the image preparation that came with its checkpoint."""
    encoder, path = spec.model.encoder, _located(spec.encoder_checkpoint)
    if not spec.encoder_checkpoint:
        return encoder
    if path.suffix == ".npz":
        return processors.with_processor_files(encoder, path)
    source = processors.with_processor_files(inspection.inspect(path).encoder or encoder, path)
    return dataclasses.replace(encoder, **{name: getattr(source, name) for name in PREPARATION})


def _encoder_weights(spec: RunSpec, model: Vlm) -> Any:
    """From the checkpoint, or random, the same for every run."""
    if not spec.encoder_checkpoint:
        return jax.device_get(nn.meta.unbox(model.init_encoder(jax.random.key(0))))
    path = _located(spec.encoder_checkpoint)
    if path.suffix == ".npz":
        return big_vision.load_encoder(path, spec.model.encoder)
    return jax.device_get(_public_params(path, "encoder", spec.model.encoder, None))


def _located(checkpoint: str) -> Path:
    """Paths are looked up here, then beside the package."""
    here, beside = Path(checkpoint), Path(vlm_jax.__file__).parent.parent / checkpoint
    return here if here.exists() or not beside.exists() else beside


def _public_params(
    path: Path, part: str, wanted: EncoderSpec | DecoderSpec, plan: partitioning.Plan | None, scan_layers: bool = True
) -> Any:
    """One part of a published model, float32. Raises `UserError` where it is not the model that the spec describes."""
    there = inspection.inspect(path)
    has = getattr(there, part)
    if has is None:
        raise UserError(f"{path}: holds no {part}")
    for field in dataclasses.fields(wanted):
        theirs, ours = getattr(has, field.name), getattr(wanted, field.name)
        if theirs != ours and field.name not in _MAY_DIFFER:
            raise UserError(
                f"{path}: its {part} has {field.name}={theirs}, {wanted.name} has {ours}: name its own size"
            )
    there = inspection.with_encoder(there, wanted) if part == "encoder" else there
    return inspection.load_parts(there, (part,), plan, "float32", scan_layers=scan_layers)[part]


# What does not concern the weights, or is chosen by the run.
_MAY_DIFFER = ("name", "context", "taps", "feature_layer", "pooling_head", *PREPARATION)


def init_params(network: Network, key: jax.Array) -> Any:
    """Boxed parameters of every part that training carries."""
    params, model = network.model.init(key), network.model
    return params if network.spec.data.frozen_features else {**params, "encoder": model.init_encoder(key)}


def train_step(network: Network, stage: StageSpec) -> TrainStep:
    """The update of a stage: what training runs, and what is compiled ahead of time for a topology."""
    spec, model, plan = network.spec, network.model, network.plan
    optimiser, abstract = _optimiser(spec, stage), abstract_state(network, stage)
    shardings = plan.shardings(abstract)

    def forward(params: Any, batch: Any) -> LossSums:
        return loss.sums(model.forward(params, batch)[0], model.head(params), batch)

    step = training_step.make_step(forward, optimiser, stage.train, spec.compute.microbatches)
    jitted = plan.jit(step, donate_argnums=0, out_shardings=(shardings, None, None))
    return TrainStep(jitted, optimiser, abstract, shardings)


def _optimiser(spec: RunSpec, stage: StageSpec) -> Any:
    return guard.guarded(optim.make_optimiser(spec.optim, stage, spec.compute.moments), spec.bad_step)


def abstract_state(network: Network, stage: StageSpec) -> Any:
    """Boxed shapes of the state of a stage."""
    optimiser = _optimiser(network.spec, stage)
    return jax.eval_shape(
        lambda key: training_step.init_state(init_params(network, key), optimiser, stage.train), jax.random.key(0)
    )


def first_params(network: Network) -> Any:
    """Fresh parameters, but for the parts that have a checkpoint."""
    spec, plan = network.spec, network.plan
    given = {"decoder"} if spec.decoder_checkpoint else set()

    def fresh(key: jax.Array) -> Any:
        return {name: part for name, part in init_params(network, key).items() if name not in given}

    params = plan.init(fresh, jax.random.key(spec.seed))
    if given:
        path, scan_layers = _located(spec.decoder_checkpoint), spec.compute.scan_layers
        params["decoder"] = _public_params(path, "decoder", spec.model.decoder, plan, scan_layers)
    if "encoder" in params:
        place = lambda new, old: jax.device_put(new, old.sharding)  # noqa: E731
        params["encoder"] = jax.tree.map(place, network.encoder, params["encoder"])
    return params
