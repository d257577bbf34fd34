"""Choices, as frozen dataclasses: what is decided before anything runs, and can be written down, compared and hashed.

`config.resolve` is the only place that makes a `RunSpec` from a `ConfigDict`. A spec holds no machine path and no
array.
"""

import dataclasses
import functools
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlm_jax.core.errors import UserError, unknown

# What CLIP's pixels were normalised with, for red, green and blue.
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

# Fields of `EncoderSpec` that say how images are prepared. They come with the weights, and concern none of them.
PREPARATION = ("pixel_mean", "pixel_std", "pixel_rescale", "resize", "interpolation", "shortest_edge")


@dataclass(frozen=True)
class EncoderSpec:
    """A vision transformer. SigLIP by default; the CLIP differences are fields."""

    name: str
    image_size: int  # H, pixels a side
    patch_size: int
    width: int  # E
    depth: int
    heads: int
    mlp_width: int
    activation: str = "gelu_tanh"  # or "quick_gelu" (CLIP), "gelu"
    class_token: bool = False  # CLIP
    patch_bias: bool = True
    pre_norm: bool = False  # a norm before the first block (CLIP)
    pooling_head: bool = True  # SigLIP's attention pool
    norm_eps: float = 1e-6
    taps: tuple[int, ...] = ()  # blocks whose output is kept, counted from 1
    feature_layer: int = 0  # the tokens are this block's output, without the last norm (LLaVA); 0: behind the norm
    pixel_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # of red, green, blue from 0 to 1: what was subtracted ...
    pixel_std: tuple[float, float, float] = (0.5, 0.5, 0.5)  # ... and divided by, when the encoder was trained
    pixel_rescale: float = 1 / 255  # what takes 8-bit levels to 0 ... 1, before mean and std
    resize: str = "squash"  # or "crop", "pad": how any image becomes H x H (`data.images.fit`)
    interpolation: str = "bilinear"  # of Pillow's, antialiased
    shortest_edge: int = 0  # pixels of the shorter edge before a crop; 0: H

    @property
    def grid(self) -> tuple[int, int]:
        side = self.image_size // self.patch_size
        return side, side

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def blocks(self) -> int:
        """Blocks that run: those behind the last one that is looked at are neither held nor computed."""
        return max(self.feature_layer or self.depth, *self.taps, 0)


@dataclass(frozen=True)
class CompressorSpec:
    """P patches of width E in, V tokens of width E out. Carries the sizes on both of its sides."""

    name: str  # a row of compress.catalog
    tokens: int  # V
    grid: tuple[int, int]  # the patch grid, rows x columns
    encoder_width: int  # E
    taps: int  # A, tapped layers that arrive with the tokens
    text_width: int  # D, width of the question vector
    width: int  # inner width
    heads: int
    depth: int  # layers, where the method has several
    mlp_width: int


RAMPS = ("turns", "channels", "whole channels")


@dataclass(frozen=True)
class RopeBands:
    """Which rotary frequencies `rope_factor` slows down: all of them without this; with it those whose wavelength is
    long against the context of the first training (Llama 3.1, section 3.4.2 of arXiv 2407.21783; YaRN, arXiv
    2309.00071).
    """

    low: float  # wavelengths above original_context / low are stretched by the whole factor
    high: float  # those below original_context / high are left; between the two the stretch goes over smoothly
    original_context: int  # positions
    ramp: str = RAMPS[0]  # what it goes over with: turns in that context (Llama 3.1), or channels (YaRN)


@dataclass(frozen=True)
class DecoderSpec:
    """A decoder-only language model. One module; the families differ in these fields."""

    name: str
    width: int  # D
    depth: int
    heads: int  # N
    kv_heads: int  # K
    head_dim: int  # C
    mlp_width: int  # F
    vocab: int  # W
    tied_head: bool = True
    qkv_bias: bool = False  # Qwen 1.5, 2
    qk_norm: bool = False  # Qwen 3, Gemma 3
    sandwich_norm: bool = False  # norms after attention and MLP too (Gemma 2, 3)
    norm_plus_one: bool = False  # weights act as (1 + w) (Gemma)
    norm_eps: float = 1e-6
    activation: str = "silu"  # or "gelu_tanh" (Gemma)
    scale_embedding: bool = False  # embeddings times sqrt(D) (Gemma)
    query_scale: float | None = None  # None: C ** -0.5
    attention_softcap: float | None = None  # Gemma 2
    logit_softcap: float | None = None  # Gemma 2
    rope_theta: float = 10_000.0
    rope_factor: float = 1.0  # stretch of the positions of the global layers (Gemma 3, Llama 3.1)
    rope_bands: RopeBands | None = None  # the frequencies that it concerns (Llama 3.1); None: all
    window: int | None = None  # keys that a local layer sees; None: every layer is global
    window_pattern: int = 0  # with a window, every n-th layer is global; 0: none is (Mistral)
    local_rope_theta: float | None = None  # base of the local layers (Gemma 3)
    context: int = 0  # positions that it was trained for; 0: not known


@dataclass(frozen=True)
class ModelSpec:
    """Encoder -> compressor -> projector -> decoder."""

    encoder: EncoderSpec | None  # None: text alone; then there is no compressor and no projector
    compressor: CompressorSpec | None
    projector: str | None  # "linear", or "mlp" (LLaVA's two layers with GELU)
    decoder: DecoderSpec | None  # None: an image tower alone, to be exported
    mask: str  # "causal", or "prefix": image and question see each other both ways


@dataclass(frozen=True)
class ComputeSpec:
    """How the same mathematics is executed."""

    dtype: str  # of activations: float32 or bfloat16; parameters and optimiser state are float32
    remat: str  # "none", "dots" or "block"
    attention: str  # "xla", "cudnn" or "splash"
    microbatches: int  # gradient accumulation: equal parts of a batch
    strategy: str  # a table of partitioning.TABLES, or "auto": by the kind of device
    mesh: tuple[int, int, int]  # (data, fsdp, tensor); one -1 takes the devices that are left
    slices: int = 1  # TPU slices joined by the data-centre network; the mesh is that of one slice
    moments: str = "float32"  # of Adam's first moment: float32 or bfloat16
    scan_layers: bool = True  # one scan over the decoder's stacked layers; False: unrolled, as a cache needs them


@dataclass(frozen=True)
class DataSpec:
    """A data set of this project and how it is read."""

    dataset: str  # "glyph_ocr"
    config: str  # a builder config
    train_split: str
    test_split: str
    batch_examples: int
    questions_per_example: int  # questions about one image in a row of training
    text_tokens: int  # T, static: text of a packed row, which holds V more for each question; longer is an error
    frozen_features: bool  # read stored encoder features instead of pixels
    tokenizer: str = ""  # folder of the language model's tokenizer; "": the project's own words


@dataclass(frozen=True)
class StageSpec:
    """One stage of training: which parts move, for how long, how fast."""

    name: str
    total_steps: int
    train: tuple[str, ...]  # of "encoder", "connector", "decoder"
    peak_lr: float
    warmup_steps: int


@dataclass(frozen=True)
class OptimSpec:
    """AdamW with clipping; linear warm-up, then cosine to `final_lr_share` of the peak."""

    weight_decay: float
    clip_norm: float
    b1: float
    b2: float
    final_lr_share: float
    lr_scale: tuple[tuple[str, float], ...]  # (regex on the parameter's path, factor); the first match counts


@dataclass(frozen=True)
class EvaluationSpec:
    examples: int  # test images; 0 takes all
    questions_per_example: int
    batch_examples: int
    max_new_tokens: int
    subset_examples: int = 256  # test images of the evaluations during training: the first ones


@dataclass(frozen=True)
class BadStepSpec:
    """What happens when a step's loss or gradient is not finite, or its loss is a spike."""

    policy: str = "stop"  # or "skip_update": the step leaves parameters and optimiser as they were
    spike_factor: float = 0.0  # a loss above this many times its running mean is bad too; 0: no loss is
    skip_limit: int = 10  # skipped updates of a stage, beyond which the run stops


@dataclass(frozen=True)
class RunSpec:
    """Everything that decides a result. Two runs with the same `spec_hash` are the same experiment."""

    model: ModelSpec
    encoder_checkpoint: str  # big_vision's .npz, or a Hugging Face folder; "" starts from random weights
    data: DataSpec
    stages: tuple[StageSpec, ...]
    optim: OptimSpec
    compute: ComputeSpec
    evaluation: EvaluationSpec
    seed: int
    log_every_steps: int
    save_every_steps: int  # 0: only at the end
    keep_checkpoints: int
    keep_every_steps: int = 0  # checkpoints of these steps are kept for good; 0: none
    bad_step: BadStepSpec = BadStepSpec()
    decoder_checkpoint: str = ""  # likewise
    evaluate_every_steps: int = 0  # during training, on a fixed subset; 0: only at the end


# How often a run logs or saves does not change what it computes, so it is not part of the experiment's identity.
NOT_IDENTITY = (
    "log_every_steps", "save_every_steps", "keep_checkpoints", "keep_every_steps", "evaluate_every_steps",
    "evaluation.subset_examples",
)  # fmt: skip
# A run that goes on elsewhere may also be laid out anew.
MAY_CHANGE = (*NOT_IDENTITY, "compute.mesh", "compute.strategy")


# Fields that came after rows had been committed, with the value that says what was done before: at that value they are
# no part of the identity, so that a new field leaves the names of old experiments as they are.
_ADDED = {
    "model.encoder.feature_layer": 0,
    "model.encoder.pixel_mean": [0.5, 0.5, 0.5],
    "model.encoder.pixel_std": [0.5, 0.5, 0.5],
    "model.encoder.pixel_rescale": 1 / 255,
    "model.encoder.resize": "squash",
    "model.encoder.interpolation": "bilinear",
    "model.encoder.shortest_edge": 0,
    "model.decoder.context": 0,
    "model.decoder.rope_bands.ramp": "turns",  # ahead of the group that it is part of
    "model.decoder.rope_bands": None,
    "bad_step": dataclasses.asdict(BadStepSpec()),
    "data.tokenizer": "",
    "decoder_checkpoint": "",
    "compute.slices": 1,
    "compute.moments": "float32",
    "evaluate_every_steps": 0,
    "evaluation.subset_examples": 256,
    "compute.scan_layers": True,
}


def to_dict(spec: Any) -> dict[str, Any]:
    """A spec as nested plain dicts and lists, ready for JSON."""
    return json.loads(json.dumps(dataclasses.asdict(spec)))


def from_dict(cls: type, values: Any, where: str) -> Any:
    """The inverse of `to_dict`, strict both ways: every field without a default is there, none is unknown, each has its
    type. `where` stands before the names of fields in messages, as "config field " or "rows.jsonl:3: model.". Raises
    `UserError`."""
    if isinstance(values, cls):
        return values
    if not isinstance(values, Mapping):
        raise UserError(f"{where.rstrip('. ')}: expected a group of fields, got {values!r}")
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise UserError(f"{where}{key}: {unknown('field', key, hints)}")
    for field in dataclasses.fields(cls):
        if field.default is dataclasses.MISSING and field.name not in values:
            raise UserError(f"{where}{field.name} is missing")
    return cls(**{key: _value(hints[key], value, f"{where}{key}") for key, value in values.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, f"{where}.")
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _value(next(arg for arg in args if arg is not type(None)), value, where)
    if origin is tuple and isinstance(value, list | tuple):
        if args[-1] is Ellipsis:
            return tuple(_value(args[0], item, f"{where}.{i}") for i, item in enumerate(value))
        if len(args) == len(value):
            pairs = zip(args, value, strict=True)
            return tuple(_value(arg, item, f"{where}.{i}") for i, (arg, item) in enumerate(pairs))
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif hint in (int, str, bool) and type(value) is hint:
        return value
    raise UserError(f"{where}: expected {getattr(hint, '__name__', hint)}, got {value!r}")


def spec_hash(spec: RunSpec) -> str:
    """Twelve hex digits that name the experiment."""
    identity = to_dict(spec)
    for field in dict.fromkeys((*NOT_IDENTITY, *_ADDED)):
        *groups, name = field.split(".")
        group = functools.reduce(lambda part, key: part and part[key], groups, identity)
        if group and (field in NOT_IDENTITY or group[name] == _ADDED[field]):
            del group[name]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def complete(values: dict[str, Any]) -> dict[str, Any]:
    """A stored `to_dict(spec)`, with the fields that came after it was written at what they then meant."""
    values = json.loads(json.dumps(values))
    for field, before in _ADDED.items():
        *groups, name = field.split(".")
        group: Any = values
        for key in groups:
            group = group.get(key, {}) if isinstance(group, dict) else {}
        if isinstance(group, dict):
            group.setdefault(name, before)
    return values


def total_steps(spec: RunSpec) -> int:
    return sum(stage.total_steps for stage in spec.stages)
