"""The composition root: builds model, mesh, data and features from a `RunSpec`.

network = open_network(spec)            # without data: enough for inference
run = open_run(spec, cache_dir)         # with data and features, cached in cache_dir
"""

import dataclasses
import functools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

import vlm_jax
from vlm_jax.checkpoints import big_vision, inspection
from vlm_jax.checkpoints.huggingface import processors
from vlm_jax.compress import catalog
from vlm_jax.core import specs, tree
from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import (
    PREPARATION,
    ComputeSpec,
    DataSpec,
    DecoderSpec,
    EncoderSpec,
    RunSpec,
    SourceSpec,
    StageSpec,
)  # fmt: skip
from vlm_jax.core.structs import LossSums
from vlm_jax.data import chat, conversations, tokenized, tokenizers
from vlm_jax.data import features as feature_store
from vlm_jax.data.conversations import Conversation
from vlm_jax.data.examples import Turn
from vlm_jax.data.packing import RowLayout
from vlm_jax.data.pipeline import Batches, evaluation_pairs
from vlm_jax.data.readers.mixture import epoch_counts
from vlm_jax.data.readers.open import open_source
from vlm_jax.data.tokenized import Mixture
from vlm_jax.data.views import BadImages, Data, Features, read_pixels
from vlm_jax.distributed import partitioning, processes
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

    step: Any  # (state, batch) -> (state, LossSums, Norms); the state is donated
    optimiser: Any
    abstract: Any  # boxed shapes of the state
    shardings: Any  # of the state, unboxed


class Run(NamedTuple):
    """A network and its data."""

    network: Network  # the stages of its spec have their numbers of steps
    train: tuple[Batches, ...]  # of each stage
    test: Data | None


def default_cache() -> Path:
    """The folder of data sets, features and compiled programs: `$VLM_JAX_CACHE`, else `~/.cache/vlm_jax`."""
    return Path(os.environ.get("VLM_JAX_CACHE", "~/.cache/vlm_jax")).expanduser()


def use_compilation_cache(cache_dir: Path) -> None:
    """Turns on JAX's persistent compilation cache."""
    jax.config.update("jax_compilation_cache_dir", str(cache_dir / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


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
    platform = plan.mesh.devices.flat[0].platform
    if platform not in ("gpu", "cuda"):
        raise UserError(f"compute.attention=cudnn runs on NVIDIA GPUs, not on {platform}: set it to xla")
    if compute.dtype == "float32":
        raise UserError("compute.attention=cudnn: expected compute.dtype=bfloat16, got float32")


def open_run(spec: RunSpec, cache_dir: Path) -> Run:
    """The network with its data and features, which are made under `cache_dir` if missing. Raises `UserError`."""
    network = open_network(spec)
    slots = network.plan.rows
    train, stages = [], []
    for stage in spec.stages:
        data_spec = specs.data_of(spec, stage)
        data = open_data(network, data_spec, data_spec.train, cache_dir)
        batches = Batches(data, spec.seed, slots(data_spec.batch_rows))
        stages.append(_with_steps(stage, data_spec, batches))
        train.append(batches)
    network = network._replace(spec=dataclasses.replace(spec, stages=tuple(stages)))
    test = open_data(network, spec.data, spec.data.test, cache_dir) if spec.data.test else None
    if test is not None:
        evaluation_pairs(test, spec.evaluation)  # raises before anything is trained
    return Run(network, tuple(train), test)


def _with_steps(stage: StageSpec, data: DataSpec, batches: Batches) -> StageSpec:
    """The stage with its number of steps, where it is given in epochs or examples, and of warm-up steps."""
    steps = stage.total_steps
    if not steps:
        rows = batches.epoch(0)
        epochs = stage.epochs or stage.examples / rows.examples
        steps = max(1, math.ceil(round(epochs * len(rows) / data.batch_rows, 6)))
    warmup = stage.warmup_steps or min(round(stage.warmup_share * steps), steps - 1)
    if warmup >= steps:
        raise UserError(f"stage {stage.name}: expected warmup_steps below its {steps} steps, got {warmup}")
    return dataclasses.replace(stage, total_steps=steps, warmup_steps=warmup)


def open_data(network: Network, spec: DataSpec, sources: Sequence[SourceSpec], cache_dir: Path) -> Data:
    """Tokenized sources as one mixture, with stored features where the encoder is frozen. Raises `UserError`."""
    mixture = open_mixture(spec, sources, cache_dir)
    encoder = network.model.spec.encoder
    encoder = dataclasses.replace(encoder, resize=spec.resize or encoder.resize)  # a stage may have its own
    data = Data(mixture, spec, row_layout(network.model, spec), encoder, BadImages(mixture, spec.max_bad_share))
    if not spec.frozen_features or not network.model.visual_tokens:
        return data
    return data._replace(
        features=tuple(_features(network, data, part, cache_dir / "features") for part in range(len(mixture.parts)))
    )


def open_mixture(spec: DataSpec, sources: Sequence[SourceSpec], cache_dir: Path) -> Mixture:
    """The tokenized conversations of some sources. Raises `UserError`."""
    tokenizer = load_tokenizer(spec.tokenizer)
    chat_format = chat.format_named(spec.format, tokenizer)
    key = f"{tokenized.folder_fingerprint(tokenizer_folder(spec.tokenizer))} {chat_format}"

    def tokenize(turns: Sequence[Turn]) -> Conversation:
        return conversations.tokenize(chat_format, tokenizer, turns)

    def bare_ids(turns: Sequence[Turn]) -> list[int]:
        return tokenizer.encode(conversations.bare_question(turns))

    opened = [open_source(source, cache_dir) for source in sources]
    parts = [
        tokenized.open_tokenized(source, s.separate, tokenize, bare_ids, key, cache_dir / "tokens")
        for source, s in zip(opened, sources, strict=True)
    ]
    names = [s.name or source.name for source, s in zip(opened, sources, strict=True)]
    names = [f"{name} {before + 1}" if (before := names[:i].count(name)) else name for i, name in enumerate(names)]
    items = [part.items for part in parts]
    passes = [count / n for count, n in zip(epoch_counts(sources, items), items, strict=True)]
    return tokenized.mix(parts, names, passes)


def row_layout(model: Vlm, spec: DataSpec) -> RowLayout:
    """The row layout of a model for some data."""
    shares_image = spec.shares_image and catalog.shares_image(model.spec, model.compute)
    return RowLayout(model.visual_tokens, model.spec.mask, model.reads_question, shares_image)


_STORES: dict[tuple[Path, str], feature_store.Stored] = {}  # open feature stores


def tokenizer_folder(folder: str) -> Path:
    """ "" is the tokenizer of the glyph suite."""
    return located(folder) if folder else Path(vlm_jax.__file__).parent / "studies" / "glyphs" / "tokenizer"


@functools.lru_cache(maxsize=4)
def load_tokenizer(folder: str) -> tokenizers.Tokenizer:
    """The tokenizer of a language model's folder; "" is that of the glyph suite."""
    path = tokenizer_folder(folder)
    config = inspection.read_config(path) if (path / "config.json").is_file() else {}
    tokenizer = tokenizers.read_tokenizer(path, config)
    if not tokenizer.eos_ids:
        raise UserError(f"{folder}: expected an eos_token for training, got none")
    return tokenizer


def _features(network: Network, data: Data, number: int, folder: Path) -> Features:
    """The stored features of a part; images that cannot be decoded are added to `data.bad`."""
    spec, model, part = network.spec, network.model, data.mixture.parts[number]
    # With several processes, each encodes on its own devices.
    local = dataclasses.replace(spec.compute, strategy="replicated", mesh=(-1, 1, 1), slices=1)
    plan = network.plan if jax.process_count() == 1 else partitioning.make_plan(local, jax.local_devices())
    settings = {**dataclasses.asdict(data.encoder), "dtype": spec.compute.dtype}
    key = feature_store.key(part.images_fingerprint, network.encoder_sha256, settings)
    if not part.image_count:  # text only
        shape = jax.ShapeDtypeStruct((1, data.encoder.image_size, data.encoder.image_size, 3), np.uint8)
        shapes = jax.eval_shape(model.encode, {"encoder": network.encoder}, shape)
        none = jax.tree.map(lambda leaf: np.zeros((0, *leaf.shape[1:]), np.float16), shapes)
        return lambda numbers: none
    if (folder, key) not in _STORES:
        weights = jax.device_put({"encoder": network.encoder}, plan.replicated)
        encode = plan.jit(model.encode)
        images = feature_store.Images(
            part.image_count,
            part.image,
            lambda n: read_pixels(part, np.array([n]), data.encoder)[0],
            data.encoder.image_size,
            part.source.name,
        )
        store = feature_store.open_or_compute(folder, key, images, lambda pixels: encode(weights, pixels))
        _STORES[folder, key] = store
    for image, reason in _STORES[folder, key].bad.items():
        data.bad.add(number, image, reason)
    return _STORES[folder, key].read


def _prepared(spec: RunSpec) -> EncoderSpec:
    """The encoder spec with the image preparation of its checkpoint, except for `data.resize`."""
    encoder, path = spec.model.encoder, located(spec.encoder_checkpoint)
    if spec.encoder_checkpoint:
        known = inspection.inspect(path).encoder if path.suffix != ".npz" else None
        source = processors.with_processor_files(known or encoder, path)
        encoder = dataclasses.replace(encoder, **{name: getattr(source, name) for name in PREPARATION})
    return dataclasses.replace(encoder, resize=spec.data.resize or encoder.resize)


def _encoder_weights(spec: RunSpec, model: Vlm) -> Any:
    """Encoder weights of the checkpoint, or random ones that are the same for every run."""
    if not spec.encoder_checkpoint:
        return jax.device_get(nn.meta.unbox(model.init_encoder(jax.random.key(0))))
    path = located(spec.encoder_checkpoint)
    if path.suffix == ".npz":
        return big_vision.load_encoder(path, spec.model.encoder)
    return jax.device_get(_public_params(path, "encoder", spec.model.encoder, None))


def located(checkpoint: str) -> Path:
    """A path relative to the working directory, else to the repository."""
    path, in_repository = Path(checkpoint), Path(vlm_jax.__file__).parent.parent / checkpoint
    return path if path.exists() or not in_repository.exists() else in_repository


# Spec fields that do not affect the weights, or are chosen by the run.
_MAY_DIFFER = ("name", "context", "taps", "feature_layer", "pooling_head", *PREPARATION)


def _public_params(
    path: Path, part: str, spec: EncoderSpec | DecoderSpec, plan: partitioning.Plan | None, scan_layers: bool = True
) -> Any:
    """float32 weights of one part of a published model. Raises `UserError` where its spec is another one."""
    info = inspection.inspect(path)
    found = getattr(info, part)
    if found is None:
        raise UserError(f"{path}: expected a model with a {part}, got one without")
    for field in dataclasses.fields(spec):
        actual, expected = getattr(found, field.name), getattr(spec, field.name)
        if isinstance(actual, float) and isinstance(expected, float) and math.isclose(actual, expected, rel_tol=1e-5):
            continue  # a float32 that went through JSON
        if actual != expected and field.name not in _MAY_DIFFER:
            raise UserError(f"{path}: expected {part} {spec.name} with {field.name}={expected}, got {actual}")
    info = inspection.with_encoder(info, spec) if part == "encoder" else info
    return inspection.load_parts(info, (part,), plan, "float32", scan_layers=scan_layers)[part]


def init_params(network: Network, key: jax.Array) -> Any:
    """Boxed random parameters of all parts in the train state."""
    params, model = network.model.init(key), network.model
    return params if network.spec.data.frozen_features else {**params, "encoder": model.init_encoder(key)}


def train_step(network: Network, stage: StageSpec) -> TrainStep:
    """The train step of a stage."""
    spec, model, plan = network.spec, network.model, network.plan
    optimiser, abstract = _optimiser(spec, stage), abstract_state(network, stage)
    shardings = plan.shardings(abstract)

    eos_ids, sources = load_tokenizer(spec.data.tokenizer).eos_ids, len(specs.data_of(spec, stage).train)

    def forward(params: Any, batch: Any) -> LossSums:
        return loss.sums(model.forward(params, batch)[0], model.head(params), batch, eos_ids, sources)

    step = training_step.make_step(forward, optimiser, stage.train, spec.compute.microbatches)
    jitted = plan.jit(step, donate_argnums=0, out_shardings=(shardings, None, None))
    return TrainStep(jitted, optimiser, abstract, shardings)


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
        params["decoder"] = _public_params(path, "decoder", spec.model.decoder, plan, scan_layers)
    if "encoder" in params:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, params["encoder"])
        params["encoder"] = jax.device_put(network.encoder, shardings)
    return params
