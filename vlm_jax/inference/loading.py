"""Public models, and this project's runs, from the files that users hold.

    model = load("llava-folder")                    # a Hugging Face folder, a big_vision .npz, or a run's workdir
    model = load("so400m-folder", llm="qwen-folder", compressor="tokenpacker", tokens=16)      # two, joined

Weights stream from the file into the placements of a plan, one tensor at a time. `inference.api` is what
models are for.
"""

import dataclasses
import math
import numbers
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax import build
from vlm_jax.checkpoints import orbax, tensor_tables
from vlm_jax.checkpoints.huggingface import processors
from vlm_jax.checkpoints.inspection import CheckpointInfo, inspect, load_parts, with_encoder
from vlm_jax.compress import catalog
from vlm_jax.config.resolve import spec_from_dict
from vlm_jax.core.errors import UserError, unknown
from vlm_jax.core.specs import ComputeSpec, ModelSpec
from vlm_jax.data import chat, token_files, tokenizers
from vlm_jax.distributed import partitioning
from vlm_jax.distributed.partitioning import Plan
from vlm_jax.inference import sampling
from vlm_jax.models import connector, vision
from vlm_jax.models.decoder import unstack_layers
from vlm_jax.models.vlm import Vlm

DTYPES = ("float32", "bfloat16")
MARK = "<image>"  # stands for the image in a prompt, where a folder names no other text


class Model(NamedTuple):
    """A model that answers. Its decoder is unrolled; `models.decoder.stack_layers` gives what training reads."""

    spec: ModelSpec  # encoder, compressor and projector are None for text alone
    compute: ComputeSpec
    params: Any  # {"encoder", "connector", "decoder"}, as far as there are
    plan: Plan
    tokenizer: tokenizers.Tokenizer | None = (
        None  # None where the folder has none: `forward` and `generate_tokens` need none
    )
    layout: chat.ChatFormat | None = None  # how a question becomes a prompt
    image_token: int | None = None  # the placeholder in `tokens`, once for each visual token
    pad: int | None = None
    eos_ids: tuple[int, ...] = ()
    answer_tokens: int = 64  # of the longest answer, where the caller does not say

    @property
    def visual_tokens(self) -> int:
        """V; 0 for text alone."""
        return 0 if self.spec.compressor is None else self.spec.compressor.tokens

    @property
    def reads_question(self) -> bool:
        """Whether visual tokens follow the question."""
        return Vlm(self.spec, self.compute).reads_question


def load(
    path: str | Path,
    *,
    dtype: Any = None,
    plan: Plan | None = None,
    llm: str | Path | None = None,
    compressor: str | None = None,
    tokens: int | None = None,
    tokenizer: str | Path | None = None,
    image_size: int | None = None,
    seed: int = 0,
    on_read: Callable[[int, int], None] | None = None,
) -> Model:
    """A model from a Hugging Face folder, a big_vision `.npz`, or the workdir of a run.

    Args:
        dtype: "float32" or "bfloat16", or a type of that name, of weights and activations; None: bfloat16 on TPU and
            GPU, float32 on CPU. A run keeps its own, with float32 weights.
        plan: where the parameters live; None is one device.
        llm: another folder, whose language model takes the place of the one in `path`, if that has any. The projector
            is then fresh, and so is the compressor.
        compressor, tokens: a row of `compress.catalog` and its V, in the place of what `path` has. A method without
            weights ("pool") works on a trained model at once; others are fresh and want training.
        tokenizer: a `tokenizer.json`, a SentencePiece `*.model`, or a folder with one; None looks beside the weights.
        image_size: pixels a side, if not those of the files: learned positions are resized as their library does it.
        seed: of fresh weights.
        on_read: called after each tensor with (bytes read so far, bytes to be read).

    Compiled programs are kept where `jax_compilation_cache_dir` says, else under `build.default_cache`.

    Raises `UserError` for files that are missing, not understood or inconsistent with each other.
    """
    path, llm, tokenizer = _path("path", path), llm and _path("llm", llm), tokenizer and _path("tokenizer", tokenizer)
    dtype, tokens, image_size = _dtype(dtype), whole("tokens", tokens), whole("image_size", image_size)
    seed = checked_seed(seed)
    if not isinstance(compressor, str | None):
        raise unknown("compressor", compressor, catalog.ROWS)
    if not isinstance(plan, Plan | None):
        raise UserError(f"plan={str(plan)[:80]}: a Plan is wanted, as partitioning.make_plan gives it")
    if jax.config.jax_compilation_cache_dir is None:
        build.use_compilation_cache(build.default_cache())
    if (path / "spec.json").is_file():
        if llm or compressor or tokens is not None or image_size is not None:
            raise UserError(f"{path}: a run has its own llm, compressor, tokens and image_size; leave them out")
        return _load_run(path, dtype, plan)
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    compute = ComputeSpec(dtype, "none", "xla", 1, "replicated", (1, 1, 1))
    plan = plan or partitioning.make_plan(compute, jax.local_devices()[:1])
    compute = sampling.compute_for_decoding(compute)
    vision_info = inspect(path)
    llm_info = inspect(llm) if llm else vision_info
    if llm_info.decoder is None:
        raise UserError(f"{llm or path}: holds no language model; name one with llm=FOLDER")
    if llm and vision_info.encoder is None:
        raise UserError(f"{path}: holds no image encoder to join with {llm}")
    if image_size is not None and vision_info.encoder is None:
        raise UserError(f"{path}: a language model alone has no images: leave image_size out")
    own = vision_info.encoder and processors.with_processor_files(vision_info.encoder, path)
    resized = vision_info if own is None else vision_info._replace(encoder=vision.at_size(own, image_size))
    spec = _joined_spec(resized, llm_info if llm else resized, compressor, tokens)
    if own is not None:
        # Which blocks are read is chosen with the compressor; the tensors are those of the files' own resolution.
        vision_info = with_encoder(vision_info, dataclasses.replace(spec.encoder, image_size=own.image_size))
    parts = () if spec.encoder is None else ("encoder",) if llm else ("encoder", "connector")
    count = _counter(((llm_info, ("decoder",)), (vision_info, parts)), on_read)
    params = load_parts(llm_info, ("decoder",), plan, dtype, count, scan_layers=False)
    if spec.encoder is not None:
        read = load_parts(vision_info, parts, plan, dtype, count)
        fresh = plan.init(lambda key: connector.init_weights(key, spec), jax.random.key(seed))
        fresh = jax.tree.map(lambda leaf: leaf.astype(dtype), fresh)
        how = "bilinear" if path.suffix == ".npz" else "bicubic"
        encoder = vision.params_at_size(read["encoder"], vision_info.encoder, spec.encoder.image_size, how)
        params |= {"encoder": encoder, "connector": {**fresh, **_projector(read)}}
    return _with_words(Model(spec, compute, params, plan), llm_info, tokenizer)


def _dtype(dtype: Any) -> str | None:
    try:
        name = dtype if dtype is None or isinstance(dtype, str) else jnp.dtype(dtype).name
    except TypeError:
        name = repr(dtype)
    if name not in (None, *DTYPES):
        raise unknown("dtype", name, DTYPES)
    return name


def _path(name: str, given: Any) -> Path:
    if not isinstance(given, str | Path):
        raise UserError(f"{name}={str(given)[:80]}: the name of a folder or a file is wanted")
    return Path(given)


def whole(name: str, given: Any) -> int | None:
    """A whole number of any type, or None. Raises `UserError`."""
    if given is not None and (not isinstance(given, numbers.Integral) or isinstance(given, bool)):
        raise UserError(f"{name}={str(given)[:80]}: a whole number is wanted")
    return None if given is None else int(given)


def checked_seed(seed: Any) -> int:
    """The seed, if a key can be made of it. Raises `UserError`."""
    number = whole("seed", seed)
    if number is None or not 0 <= number < 2**32:
        raise UserError(f"seed={seed}: a whole number from 0 to {2**32 - 1} is wanted")
    return number


def _counter(
    wanted: Sequence[tuple[CheckpointInfo, Sequence[str]]], on_read: Callable[[int, int], None] | None
) -> Callable[[int], None] | None:
    """Sums up the bytes of single tensors, against those of all parts that are wanted."""
    if on_read is None:
        return None
    names = [(found.weights, tensor_tables.expected([found.tables[p] for p in parts])) for found, parts in wanted]
    total = sum(
        math.prod(shape) * files.shapes[name][1].itemsize for files, some in names for name, shape in some.items()
    )
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        on_read(done, total)

    return count


def _projector(read: Mapping[str, Any]) -> dict[str, Any]:
    return {"projector": read["connector"]["projector"]} if "connector" in read else {}


def _joined_spec(
    vision_info: CheckpointInfo, llm_info: CheckpointInfo, name: str | None, tokens: int | None
) -> ModelSpec:
    """Raises `UserError` for a compressor that does not exist, or cannot give that many tokens."""
    encoder, decoder = vision_info.encoder, llm_info.decoder
    if encoder is None:
        if name or tokens is not None:
            raise UserError("a language model alone has no visual tokens: leave compressor and tokens out")
        return ModelSpec(None, None, None, decoder, llm_info.mask)
    if name is None and tokens is not None and tokens != encoder.patches:
        raise UserError(f"tokens={tokens}: name the compressor that makes them of {encoder.patches} patches")
    own = {"projector": vision_info.projector, "mask": vision_info.mask} if vision_info is llm_info else {}
    return catalog.model_spec(encoder, name or "none", tokens, decoder, **own)


def _with_words(model: Model, llm_info: CheckpointInfo, tokenizer: str | Path | None) -> Model:
    """The model with its tokenizer and prompt layout."""
    spec, config = model.spec, llm_info.config
    folder = Path(tokenizer) if tokenizer else Path(llm_info.weights.path)
    sees = spec.encoder is not None
    image_token = None
    if sees:
        image_token = spec.decoder.vocab if llm_info.image_token is None else llm_info.image_token
        model = model._replace(image_token=image_token)
    if tokenizer is None and token_files.find(folder) is None:
        pad, ends = config.get("pad_token_id"), tuple(token_files.eos_ids(folder, config) or ())
        if pad is not None and type(pad) is not int:
            raise UserError(f"{folder}: config.json: pad_token_id={str(pad)[:80]!r}: a whole number is wanted")
        return model._replace(pad=pad, eos_ids=_inside(ends, spec, folder))
    words = tokenizers.read_tokenizer(folder, config, (MARK,) if sees else ())
    if words.size > spec.decoder.vocab:
        raise UserError(
            f"{folder}: the tokenizer has ids up to {words.size - 1}, the language model only {spec.decoder.vocab} "
            "embeddings: they do not belong together"
        )
    layout = chat.chat_format_of(llm_info.kind, words, words.special.get("image_token", MARK))
    return model._replace(tokenizer=words, layout=layout, pad=words.pad, eos_ids=_inside(words.eos_ids, spec, folder))


def _inside(ends: tuple[int, ...], spec: ModelSpec, folder: Path) -> tuple[int, ...]:
    far = [end for end in ends if end >= spec.decoder.vocab]
    if far:
        raise UserError(f"{folder}: eos_token_id {far[0]} lies outside the vocabulary of {spec.decoder.vocab}")
    return ends


def _load_run(workdir: Path, dtype: str | None, plan: Plan | None) -> Model:
    """What `vlm_jax.train` made, with the words it was trained on."""
    run = spec_from_dict(orbax.read_spec(workdir))
    context = run.model.decoder.context or run.model.compressor.tokens + run.data.text_tokens
    compute = dataclasses.replace(run.compute, dtype=dtype or run.compute.dtype)
    if plan is None:
        compute = dataclasses.replace(compute, strategy="replicated", mesh=(1, 1, 1))
        plan = partitioning.make_plan(compute, jax.local_devices()[:1])
    network = build.open_network(dataclasses.replace(run, compute=compute), plan)
    compute = sampling.compute_for_decoding(compute)
    decoder = dataclasses.replace(run.model.decoder, context=context)
    spec = dataclasses.replace(network.model.spec, decoder=decoder)
    abstract = jax.eval_shape(lambda key: build.init_params(network, key), jax.random.key(0))
    unboxed, shardings = nn.meta.unbox(abstract), plan.shardings(abstract)
    params = orbax.restore_params(workdir, unboxed, shardings, _tell)
    params = {"encoder": jax.device_put(network.encoder, plan.replicated), **params}
    params["decoder"] = unstack_layers(params.pop("decoder"), run.model.decoder.depth)
    words = build.load_tokenizer(run.data.tokenizer)
    layout = chat.ChatFormat("image first", None, MARK)
    token = spec.decoder.vocab
    return Model(
        spec, compute, params, plan, words, layout, token, words.pad, words.eos_ids,
        run.evaluation.max_new_tokens,
    )  # fmt: skip


def _tell(step: int, what: str) -> None:
    print(f"note: checkpoint {step} is damaged ({what}): the one before is used", file=sys.stderr)
