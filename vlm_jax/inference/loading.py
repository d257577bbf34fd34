"""Loading of published checkpoints and of runs.

    model = load("llava-folder")                    # a Hugging Face folder, a big_vision .npz, or a run's workdir
    model = load("so400m-folder", llm="qwen-folder", compressor="tokenpacker", tokens=16)      # encoder + LLM

Weights are read tensor by tensor into their shardings.
"""

import contextlib
import dataclasses
import math
import numbers
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax import build
from vlm_jax.checkpoints import orbax, tensor_tables
from vlm_jax.checkpoints.inspection import (
    CheckpointInfo,
    inspect,
    load_connector,
    load_parts,
    prepared_encoder,
    with_encoder,
)
from vlm_jax.compress import catalog
from vlm_jax.config.resolve import spec_from_dict
from vlm_jax.core import reading, text
from vlm_jax.core.errors import UserError, unknown
from vlm_jax.core.specs import ComputeSpec, ModelSpec
from vlm_jax.data import chat_formats, token_files, tokenizers
from vlm_jax.distributed import partitioning
from vlm_jax.distributed.partitioning import Plan
from vlm_jax.inference import sampling
from vlm_jax.inference.joining import has_connector, joined_spec
from vlm_jax.models import connector
from vlm_jax.models.decoder import unstack_layers
from vlm_jax.models.vision import at_size, params_at_size
from vlm_jax.models.vlm import Vlm

DTYPES = ("float32", "bfloat16")
IMAGE_TEXT = "<image>"  # the image placeholder in prompts, unless the tokenizer defines another


class Model(NamedTuple):
    """A model for inference, with unrolled decoder layers (`models.decoder.stack_layers` for training)."""

    spec: ModelSpec  # encoder, compressor and projector are None for text-only models
    compute: ComputeSpec
    params: Any  # {"encoder", "connector", "decoder"}, or {"decoder"}
    plan: Plan
    tokenizer: tokenizers.Tokenizer | None = None  # only `generate` needs one
    chat_format: chat_formats.ChatFormat | None = None
    image_token: int | None = None  # the placeholder id in `tokens`, once for each visual token
    pad: int | None = None
    eos_ids: tuple[int, ...] = ()
    answer_tokens: int = 64  # default of max_new_tokens
    is_trained: bool = True  # False: some weights of the connector are random

    @property
    def visual_tokens(self) -> int:
        """V; 0 for text only."""
        return Vlm(self.spec, self.compute).visual_tokens

    @property
    def reads_question(self) -> bool:
        """Whether visual tokens depend on the question."""
        return Vlm(self.spec, self.compute).reads_question


def load(
    path: str | Path,
    *,
    dtype: Any = None,
    plan: Plan | None = None,
    llm: str | Path | None = None,
    vision: str | Path | None = None,
    compressor: str | None = None,
    tokens: int | None = None,
    tokenizer: str | Path | None = None,
    image_size: int | None = None,
    seed: int = 0,
    on_read: Callable[[int, int], None] | None = None,
) -> Model:
    """A model from a Hugging Face folder, a big_vision `.npz`, or the workdir of a run.

    Args:
        dtype: "float32" or "bfloat16", of weights and activations; None: bfloat16 on TPU and GPU, float32 on CPU, or
            that of a run. A run has float32 weights.
        plan: the sharding of parameters; None: one device.
        llm: a folder whose language model replaces that of `path`; projector and compressor are then random, unless
            `path` is a connector alone (LLaVA's mm_projector.bin).
        vision: the folder of the vision tower, for a checkpoint of LLaVA's own code whose config.json names a folder
            that is not there.
        compressor, tokens: a row of `compress.catalog` and its V, instead of those of `path`. Compressors with weights
            must be trained; others ("pool") work at once.
        tokenizer: a `tokenizer.json`, a SentencePiece `*.model`, or a folder with one; None: that of the checkpoint.
        image_size: pixels a side, if not that of the checkpoint: position embeddings are interpolated.
        seed: of random weights.
        on_read: called after each tensor with (bytes read, total bytes).

    Uses the compilation cache of `build.default_cache`, where it can be written, unless `jax_compilation_cache_dir` is
    set.

    Raises `UserError` for files that are missing, unsupported or inconsistent.
    """
    path, llm, tokenizer = _path("path", path), llm and _path("llm", llm), tokenizer and _path("tokenizer", tokenizer)
    vision_folder = vision and _path("vision", vision)
    dtype, tokens, image_size = _dtype(dtype), as_int("tokens", tokens), as_int("image_size", image_size)
    seed = check_seed(seed)
    if not isinstance(compressor, str | None):
        raise unknown("compressor", compressor, catalog.names())
    if not isinstance(plan, Plan | None):
        raise UserError(f"plan: expected a Plan of partitioning.make_plan, got {str(plan)[:80]}")
    if jax.config.jax_compilation_cache_dir is None:
        with contextlib.suppress(UserError):
            build.use_compilation_cache(build.default_cache())
    if (path / "spec.json").is_file():
        if llm or vision or compressor or image_size is not None:
            raise UserError(f"{path}: a run has its own llm, vision, compressor and image_size: leave them out")
        return _load_run(path, dtype, plan, tokens)
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    compute = ComputeSpec(dtype, "none", "xla", 1, "replicated", (1, 1, 1))
    plan = plan or partitioning.make_plan(compute, jax.local_devices()[:1])
    compute = sampling.compute_for_decoding(compute)
    vision_info = inspect(path, vision_folder)
    if vision_info.missing:
        raise UserError(vision_info.missing)
    if vision and not vision_info.prepared:
        raise UserError(f"vision={vision}: {path} is no checkpoint of LLaVA's own code: leave vision out")
    llm_info = inspect(llm) if llm else vision_info
    if llm_info.decoder is None:
        raise UserError(f"{llm or path}: has no language model: name one with llm=FOLDER")
    if llm and vision_info.encoder is None:
        raise UserError(f"{path}: has no image encoder to join with {llm}")
    if image_size is not None and vision_info.encoder is None:
        raise UserError(f"{path}: a text-only model has no images: leave image_size out")
    own = prepared_encoder(vision_info)
    resized = vision_info if own is None else vision_info._replace(encoder=at_size(own, image_size))
    spec = joined_spec(resized, llm_info if llm else resized, compressor, tokens)
    if own is not None:
        # The compressor's taps, at the checkpoint's own resolution.
        vision_info = with_encoder(vision_info, dataclasses.replace(spec.encoder, image_size=own.image_size))
    parts = ("encoder",) if spec.encoder is not None else ()
    own_parts = (*parts, "connector") if parts and has_connector(vision_info, llm_info) else parts
    count = _byte_counter(((llm_info, ("decoder",)), (vision_info, own_parts)), on_read)
    params, is_trained = load_parts(llm_info, ("decoder",), plan, dtype, count, scan_layers=False), True
    if spec.encoder is not None:
        loaded = load_parts(vision_info, parts, plan, dtype, count)
        connector_params = plan.init(lambda key: connector.init_weights(key, spec), jax.random.key(seed))
        connector_params = jax.tree.map(lambda leaf: leaf.astype(dtype), connector_params)
        trained = load_connector(vision_info, spec, plan, dtype, count) if own_parts != parts else {}
        connector_params |= trained
        method = "bilinear" if path.suffix == ".npz" else "bicubic"
        encoder = params_at_size(loaded["encoder"], vision_info.encoder, spec.encoder.image_size, method)
        params |= {"encoder": encoder, "connector": connector_params}
        is_trained = all(part in trained or not jax.tree.leaves(leaf) for part, leaf in connector_params.items())
    return _add_tokenizer(Model(spec, compute, params, plan, is_trained=is_trained), llm_info, tokenizer)


def _dtype(dtype: Any) -> str | None:
    try:
        name = dtype if dtype is None or isinstance(dtype, str) else jnp.dtype(dtype).name
    except TypeError:
        name = repr(dtype)
    if name not in (None, *DTYPES):
        raise unknown("dtype", name, DTYPES)
    return name


def _path(name: str, value: Any) -> Path:
    if not isinstance(value, str | Path):
        raise UserError(f"{name}: expected the name of a folder or file, got {str(value)[:80]}")
    reading.kind(value)  # raises for a device, and for a name that no file can have
    return Path(value)


def as_int(name: str, value: Any) -> int | None:
    """An integer of any type as int; None stays. Raises `UserError`."""
    if value is not None and (not isinstance(value, numbers.Integral) or isinstance(value, bool)):
        raise UserError(f"{name}: expected an integer, got {str(value)[:80]}")
    return None if value is None else int(value)


def check_seed(seed: Any) -> int:
    """The seed as int. Raises `UserError`."""
    number = as_int("seed", seed)
    if number is None or not 0 <= number < 2**32:
        raise UserError(f"seed: expected an integer from 0 to {2**32 - 1}, got {seed}")
    return number


def _byte_counter(
    sources: Sequence[tuple[CheckpointInfo, Sequence[str]]], on_read: Callable[[int, int], None] | None
) -> Callable[[int], None] | None:
    """`count(size)`, called for each tensor, which calls `on_read` with running and total bytes."""
    if on_read is None:
        return None
    total = done = 0
    for info, parts in sources:
        for name, shape in tensor_tables.expected([info.tables[part] for part in parts]).items():
            total += math.prod(shape) * info.weights.shapes[name][1].itemsize

    def count(size: int) -> None:
        nonlocal done
        done += size
        on_read(done, total)

    return count


def _add_tokenizer(model: Model, llm_info: CheckpointInfo, path: str | Path | None) -> Model:
    """The model with tokenizer, chat format and special ids. Raises `UserError` for ids outside the vocabulary."""
    vocab, config = model.spec.decoder.vocab, llm_info.config
    folder = Path(path) if path else Path(llm_info.weights.path)
    if model.spec.encoder is not None:
        model = model._replace(image_token=vocab if llm_info.image_token is None else llm_info.image_token)
    if path is None and token_files.find(folder) is None:
        pad, eos_ids = config.get("pad_token_id"), tuple(token_files.eos_ids(folder, config) or ())
        if pad is not None and type(pad) is not int:
            raise UserError(f"{folder}: config.json: pad_token_id: expected an integer, got {str(pad)[:80]!r}")
        model = model._replace(pad=pad, eos_ids=eos_ids)
    else:
        image_text = () if model.spec.encoder is None else (IMAGE_TEXT,)
        tokenizer = tokenizers.read_tokenizer(folder, config, image_text)
        if tokenizer.size > vocab:
            raise UserError(f"{folder}: expected tokenizer ids below {vocab} (vocabulary), got {tokenizer.size - 1}")
        image_token = tokenizer.special.get("image_token", IMAGE_TEXT)
        if model.spec.encoder is not None and llm_info.image_token is None:
            # Other than an added token without embedding (Llama 2's <pad>).
            model = model._replace(image_token=max(vocab, tokenizer.id(image_token) or 0))
        chat_format = chat_formats.chat_format_of(llm_info.kind, tokenizer, image_token)
        model = model._replace(
            tokenizer=tokenizer, chat_format=chat_format, pad=tokenizer.pad, eos_ids=tokenizer.eos_ids
        )
    if outside := [eos for eos in model.eos_ids if eos >= vocab]:
        raise UserError(f"{folder}: expected an eos_token_id below the vocabulary of {vocab}, got {outside[0]}")
    return model


def _load_run(workdir: Path, dtype: str | None, plan: Plan | None, tokens: int | None) -> Model:
    """The model of a workdir of `vlm_jax.train`, with its tokenizer."""
    run = spec_from_dict(orbax.read_spec(workdir))
    own = run.model.compressor.elastic or (run.model.compressor.tokens,)
    if tokens not in (None, *own):
        raise UserError(f"{workdir}: tokens: expected {' or '.join(map(str, own))} of this run, got {tokens}")
    context = run.model.decoder.context or run.data.row_tokens + run.evaluation.max_new_tokens
    compute = dataclasses.replace(run.compute, dtype=dtype or run.compute.dtype)
    if plan is None:
        compute = dataclasses.replace(compute, strategy="replicated", mesh=(1, 1, 1))
        plan = partitioning.make_plan(compute, jax.local_devices()[:1])
    network = build.open_network(dataclasses.replace(run, compute=compute), plan)
    compute = sampling.compute_for_decoding(compute)
    decoder = dataclasses.replace(run.model.decoder, context=context)
    spec = dataclasses.replace(network.model.spec, decoder=decoder)
    if tokens is not None:
        spec = catalog.at_tokens(spec, tokens)
    abstract = jax.eval_shape(lambda key: build.init_params(network, key), jax.random.key(0))
    unboxed, shardings = nn.meta.unbox(abstract), plan.shardings(abstract)

    def on_damaged(step: int, reason: str) -> None:
        note = f"note: checkpoint {step} is damaged ({reason}): the one before is used"
        print(text.one_line(note), file=sys.stderr)

    params = orbax.restore_params(workdir, unboxed, shardings, on_damaged)
    params = {"encoder": jax.device_put(network.encoder, plan.replicated), **params}
    params["decoder"] = unstack_layers(params.pop("decoder"), run.model.decoder.depth)
    tokenizer = build.load_tokenizer(run.data.tokenizer)
    return Model(
        spec, compute, params, plan, tokenizer, chat_formats.format_named(run.data.format, tokenizer), decoder.vocab,
        tokenizer.pad, tokenizer.eos_ids, run.evaluation.max_new_tokens,
    )  # fmt: skip
